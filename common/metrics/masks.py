"""Judged of masks: a class for each pixel or voxel, kept as counts of pixels per record and class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wardround.common.metrics.ranking import mean_known, ratio
from wardround.common.metrics.scores import Floats, Whole


@dataclass(frozen=True)
class MaskScores:
    """Pixels of every record and class; class 0 is the background.

    Attributes:
        both: (records, classes) int64, pixels that are of the class and called so.
        predicted: (records, classes) int64, pixels called so.
        true: (records, classes) int64, pixels of the class.

    Raises:
        ValueError: the shapes differ, there are fewer than two classes, or pixels do not add up.
    """

    both: Whole
    predicted: Whole
    true: Whole

    def __post_init__(self) -> None:
        shapes = {self.both.shape, self.predicted.shape, self.true.shape}
        if len(shapes) != 1 or self.both.ndim != 2 or self.both.shape[1] < 2:
            raise ValueError(f"counts of pixels of shapes {sorted(shapes)} are not all (records, classes)")
        if ((self.both < 0) | (self.both > self.predicted) | (self.both > self.true)).any():
            raise ValueError("more pixels are right than there are")

    @classmethod
    def of(cls, predicted: NDArray[Any], true: NDArray[Any], classes: int) -> MaskScores:
        """From class maps, (records, height, width) whole numbers; further axes may follow.

        Raises:
            ValueError: the shapes differ, or a pixel is not the number of a class.
        """
        if predicted.shape != true.shape or true.ndim < 2:
            raise ValueError(f"a class map of shape {predicted.shape} does not fit a mask of shape {true.shape}")
        for name, pixels in (("class map", predicted), ("mask", true)):
            if pixels.dtype.kind not in "biu" or not ((pixels >= 0) & (pixels < classes)).all():
                raise ValueError(f"a pixel of the {name} is not a whole number from 0 to {classes - 1}")
        counts = np.zeros((3, len(true), classes), dtype=np.int64)
        for number, (called, is_) in enumerate(zip(predicted, true, strict=True)):
            for row, pixels in enumerate((is_[called == is_], called.ravel(), is_.ravel())):
                counts[row, number] = np.bincount(pixels.astype(np.int64), minlength=classes)
        return cls(*counts)

    @property
    def sound(self) -> bool:
        """A class map always holds classes."""
        return True

    @property
    def classes(self) -> int:
        """How many classes there are, the background included."""
        return int(self.both.shape[1])

    def __len__(self) -> int:
        return len(self.both)

    def __add__(self, other: MaskScores) -> MaskScores:
        pairs = ((self.both, other.both), (self.predicted, other.predicted), (self.true, other.true))
        return MaskScores(*(np.concatenate(pair) for pair in pairs))

    def take(self, index: Whole) -> MaskScores:
        """The records at `index`, (records,)."""
        return MaskScores(self.both[index], self.predicted[index], self.true[index])


def overlaps(scores: MaskScores) -> Floats:
    """(records, 3): Dice coefficient and intersection over union, means over the classes 1, 2, ..., and 1.

    A class that a record neither has nor is given says nothing and is left out; so is a record without any, whose entries are
    0. So it is done in nnU-Net (Isensee et al. 2021).
    """
    both, total = scores.both[:, 1:], (scores.predicted + scores.true)[:, 1:]
    dice, iou = mean_known(ratio(2 * both, total)), mean_known(ratio(both, total - both))
    found: Floats = np.nan_to_num(np.stack([dice, iou, ~np.isnan(dice)], axis=1))
    return found


def dice(sums: Floats) -> Floats:
    """Mean Dice coefficient of a record (Dice 1945); from `overlaps`, (..., 3) -> (...)."""
    return ratio(sums[..., 0], sums[..., 2])


def iou(sums: Floats) -> Floats:
    """Mean intersection over union of a record (Jaccard 1912); from `overlaps`."""
    return ratio(sums[..., 1], sums[..., 2])


def of_overlaps(figure: Callable[[Floats], Floats]) -> Callable[[MaskScores, Floats], Floats]:
    """(scores, weight (draws, records)) -> (draws,): `figure` of the weighted sums."""
    return lambda scores, weight: figure(weight @ overlaps(scores))
