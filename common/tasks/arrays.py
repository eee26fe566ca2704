"""Fields that arrive as ready arrays, such as small images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wardround.common.errors import DataRefused
from wardround.common.tasks.base import Records, blank, numbered, unfit


@dataclass(frozen=True)
class ArraySchema:
    """Fields that arrive as ready arrays, such as images.

    Attributes:
        shapes: shape of one record's entry for each field.
        classes: labels are 0 .. classes - 1.
        low, high: the plausible range of every value.
        centre, scale: public constants; values become (value - centre) / scale.
    """

    shapes: Mapping[str, tuple[int, ...]]
    classes: int
    low: float
    high: float
    centre: float = 0.0
    scale: float = 1.0

    def blank(self, count: int) -> Records:
        """See `Schema.blank`."""
        return blank(count, **self.shapes)

    def encode(self, raw: Mapping[str, NDArray[Any]], label: NDArray[Any], patient: Sequence[str]) -> Records:
        """Arrays by field, labels and a patient id per record -> `Records`; raises `DataRefused`."""
        numeric = label.dtype.kind in "biuf" and label.shape == (len(patient),)
        if not numeric or not np.isin(label, np.arange(self.classes)).all():
            raise DataRefused(f"the labels are not one number from 0 to {self.classes - 1} for each record")
        found = {}
        for name, shape in self.shapes.items():
            if name not in raw or raw[name].shape != (len(label), *shape) or raw[name].dtype.kind not in "biuf":
                raise DataRefused(f"field {name} is not one array of shape {list(shape)} for each record")
            values: NDArray[Any] = raw[name]
            inside = ((values >= self.low) & (values <= self.high)).reshape(len(label), -1)
            wrong = ~np.asarray(inside.all(axis=1))
            if wrong.any():
                raise unfit(f"field {name}", wrong, f"hold values outside {self.low:g} to {self.high:g}")
            found[name] = torch.from_numpy((values.astype(np.float32) - self.centre) / self.scale)
        return Records(found, torch.from_numpy(label.astype(np.int64)), numbered(patient))
