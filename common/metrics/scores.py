"""Judged beside the truth: what every kind of them can do, and those of classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
Flags = NDArray[np.bool_]

_SLACK = 1e-3  # how far the probabilities of one record may be from a sum of 1: a softmax in float32 over many classes


class Judged(Protocol):
    """Judged beside the truth, of one holder of test records."""

    @property
    def sound(self) -> bool:
        """Whether every prediction is what it claims to be; if not, no figure is defined."""
        ...

    @property
    def classes(self) -> int:
        """How many classes there are."""
        ...

    def __len__(self) -> int:
        """How many records."""
        ...

    def __add__(self, other: Self, /) -> Self:
        """The records of both."""
        ...

    def take(self, index: Whole) -> Self:
        """The records at `index`, (records,); one may come twice."""
        ...


@dataclass(frozen=True)
class Scores:
    """Probabilities of classes.

    With two classes, class 1 is the positive one, and its probabilities alone, (records,), may be given.

    Attributes:
        probability: (records, classes) float64; each row sums to 1.
        label: (records,) int64, from 0 to classes - 1.

    Raises:
        ValueError: the shapes do not fit together, or a label is not the number of a class.
    """

    probability: Floats
    label: Whole

    def __post_init__(self) -> None:
        probability, label = np.asarray(self.probability, dtype=np.float64), np.asarray(self.label)
        if probability.ndim == 1:
            probability = np.stack([1 - probability, probability], axis=1)
        if probability.ndim != 2 or probability.shape[1] < 2 or label.shape != probability.shape[:1]:
            raise ValueError(f"probabilities of shape {probability.shape} do not fit labels of shape {label.shape}")
        if label.dtype.kind not in "biu" or not ((label >= 0) & (label < probability.shape[1])).all():
            raise ValueError(f"a label is not a whole number from 0 to {probability.shape[1] - 1}")
        object.__setattr__(self, "probability", probability)
        object.__setattr__(self, "label", label.astype(np.int64))

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.probability.shape[1])

    @cached_property
    def sound(self) -> bool:
        """Whether every row holds probabilities that sum to 1."""
        inside = (self.probability >= -_SLACK) & (self.probability <= 1 + _SLACK)
        return bool(inside.all() and (np.abs(self.probability.sum(axis=1) - 1) <= _SLACK).all())

    @property
    def chosen(self) -> Whole:
        """(records,): the likeliest class; with two classes, class 1 from a probability of 0.5 on."""
        if self.classes == 2:
            return (self.probability[:, 1] >= 0.5).astype(np.int64)
        likeliest: Whole = self.probability.argmax(axis=1)
        return likeliest

    def __len__(self) -> int:
        return len(self.label)

    def __add__(self, other: Scores) -> Scores:
        return Scores(np.concatenate([self.probability, other.probability]), np.concatenate([self.label, other.label]))

    def take(self, index: Whole) -> Scores:
        """The records at `index`, (records,)."""
        return Scores(self.probability[index], self.label[index])
