"""Figures from sums alone: what a site sends where no prediction of a single record may leave it.

Sums add over batches and sites, and are one vector of a public length, so that they can pass a secure sum. Counts are exact.
AUROC, average precision and AP50 come from scores in 1,024 to 16,384 bins. A tally holds no noise, so it is not private of
itself: the sum of a single record tells that record.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from wardround.common.metrics.books import BOOKS, Shapes, Sums
from wardround.common.metrics.scores import Floats, Judged


@dataclass(frozen=True)
class Tally:
    """Sums over records.

    Attributes:
        kind: "classes", "masks" or "boxes".
        classes: how many classes there are; 2 for boxes.
        sums: arrays by name, in the order of the vector.
    """

    kind: str
    classes: int
    sums: Sums

    @classmethod
    def of(cls, scores: Judged) -> Tally:
        """The sums of these predictions; one prediction that is no number leaves no figure defined.

        Raises:
            TypeError: no kind of predictions this knows.
        """
        for kind, book in BOOKS.items():
            if isinstance(scores, book.kind):
                sums = _SOUND | book.sums(scores) if scores.sound else _void(kind, scores.classes)
                return cls(kind, scores.classes, sums)
        raise TypeError(f"there is no tally of {type(scores).__name__}")

    def __add__(self, other: Tally) -> Tally:
        """The records of both.

        Raises:
            ValueError: they are of different kinds or numbers of classes.
        """
        if (self.kind, self.classes) != (other.kind, other.classes):
            raise ValueError(f"{self.classes} {self.kind} and {other.classes} {other.kind} do not add")
        return Tally(self.kind, self.classes, {name: array + other.sums[name] for name, array in self.sums.items()})

    def to_vector(self) -> Floats:
        """All sums, (length,) float64; finite."""
        return np.concatenate([array.ravel() for array in self.sums.values()])

    @classmethod
    def length(cls, kind: str, classes: int = 2) -> int:
        """How long the vector of such a tally is."""
        return sum(prod(shape) for shape in _shapes(kind, classes).values())

    @classmethod
    def from_vector(cls, vector: Floats, kind: str, classes: int = 2) -> Tally:
        """The tally of `to_vector`.

        Raises:
            ValueError: the vector has another length, or holds what is no finite number.
        """
        shapes, length = _shapes(kind, classes), cls.length(kind, classes)
        if vector.shape != (length,) or not np.isfinite(vector).all():
            raise ValueError(f"a tally of {classes} {kind} is a vector of {length} finite numbers")
        ends = np.cumsum([prod(shape) for shape in shapes.values()])
        parts = np.split(np.asarray(vector, dtype=np.float64), ends[:-1])
        return cls(kind, classes, {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)})

    def figures(self) -> dict[str, float]:
        """Every figure by its name in METRICS; NaN where it is undefined."""
        with np.errstate(over="ignore", invalid="ignore"):  # sums that no records have, as a wrong site may send
            found = BOOKS[self.kind].figures(self.sums)
        sound = not self.sums["unsound"].any()
        return {name: float(value) if sound else float("nan") for name, value in found.items()}

    def suppressed(self, floor: int) -> dict[str, float]:
        """`figures`, NaN also where one says something about a group of fewer than `floor`.

        The groups: for accuracy, losses and calibration all records; for other figures of classes the rarest class (with two,
        the positives or the negatives), and for precision and F1 also the smallest group called one class; for masks and
        boxes the records that count or have a box. A class that nobody has is below every floor.
        """
        support = BOOKS[self.kind].supports(self.sums)
        return {name: value if support[name] >= floor else float("nan") for name, value in self.figures().items()}


_SOUND: dict[str, Floats] = {"unsound": np.zeros(1)}


def _shapes(kind: str, classes: int) -> Shapes:
    return {"unsound": (1,), **BOOKS[kind].shapes(classes)}


def _void(kind: str, classes: int) -> Sums:
    # a NaN would not pass a secure sum, so sums say in a number of their own that they are void
    return {name: np.zeros(shape) for name, shape in _shapes(kind, classes).items()} | {"unsound": np.ones(1)}
