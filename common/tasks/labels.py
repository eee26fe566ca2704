"""Classes as files write them: by name, in words the task lists beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wardround.common.tasks.base import unfit

Names = tuple[tuple[str, ...], ...]  # how each class may be written, class 0 first


def numbers(written: Sequence[str], names: Names, column: str) -> Tensor:
    """The number of the class each text names, (records,) int64.

    Raises:
        DataRefused: a text names no class; how many is told to the site alone.
    """
    number = {name: position for position, spelled in enumerate(names) for name in spelled}
    found = np.array([number.get(text, -1) for text in written], dtype=np.int64)
    wrong = found < 0
    if wrong.any():
        raise unfit(f"label {column}", wrong, f"are not one of {sorted(number)}")
    return torch.from_numpy(found)
