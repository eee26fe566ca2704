"""Changes that leave a record's meaning: each record by random numbers of its own, so that records stay independent."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from wardround.common.tasks.base import Chance, Records

_PIXELS = 2  # up, down, left and right
_GAIN, _OFFSET = 0.1, 0.05  # of exposure: parts of a value, and of the unit that the task's schema makes


def moved_films(records: Records, chance: Chance) -> Records:
    """`image` (records, channels, side, side) moved by up to 2 pixels each way, brighter or darker by up to a tenth.

    Film cassettes lie a little off, and exposures differ; a chest is not mirrored, for its heart is on the left.
    """
    image = records.fields["image"]
    count = len(image)
    draws = chance(4 * count).view(4, count).to(image.device)
    down, right = ((2 * _PIXELS + 1) * draws[:2]).long() - _PIXELS
    gain, offset = (1 + _GAIN * (2 * draws[2] - 1)), _OFFSET * (2 * draws[3] - 1)
    changed = _shifted(image, down, right) * _each(gain, image) + _each(offset, image)
    return replace(records, fields={**records.fields, "image": changed})


def _shifted(image: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Each image moved by whole pixels; what comes in from outside repeats the edge."""
    height, width = image.shape[2:]
    rows = (torch.arange(height, device=image.device) - down[:, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=image.device) - right[:, None]).clamp(0, width - 1)
    moved = image.gather(2, rows[:, None, :, None].expand_as(image))
    return moved.gather(3, columns[:, None, None, :].expand_as(image))


def _each(values: Tensor, image: Tensor) -> Tensor:
    return values.to(image.dtype)[:, None, None, None]
