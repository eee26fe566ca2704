"""Judged of boxes: what each predicted box hit, kept as flat arrays over all records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wardround.common.metrics import ranking
from wardround.common.metrics.scores import Flags, Floats, Whole

OVERLAP = 0.5  # intersection over union from which a predicted box is a hit


@dataclass(frozen=True)
class BoxScores:
    """Predicted boxes of one class beside the true ones.

    Attributes:
        score: (boxes,) float64, from 0 to 1.
        hit: (boxes,) bool, whether the box is that of a true one.
        record: (boxes,) int64, whose box it is.
        true: (records,) int64, how many true boxes each record has.

    Raises:
        ValueError: the shapes do not fit together, or a record has more hits than true boxes.
    """

    score: Floats
    hit: Flags
    record: Whole
    true: Whole

    def __post_init__(self) -> None:
        if not self.score.shape == self.hit.shape == self.record.shape or self.score.ndim != 1 or self.true.ndim != 1:
            raise ValueError("score, hit and record are not one number for each box, or true is not one for each record")
        if not ((self.record >= 0) & (self.record < len(self.true))).all():
            raise ValueError(f"a box belongs to none of {len(self.true)} records")
        if (np.bincount(self.record[self.hit], minlength=len(self.true)) > self.true).any():
            raise ValueError("a record has more hits than true boxes")

    @classmethod
    def of(cls, predicted: Sequence[tuple[Floats, Floats]], true: Sequence[Floats]) -> BoxScores:
        """From boxes (centre x, centre y, width, height), as parts of the image in [0, 1].

        In a record, boxes choose in descending order of score; each takes the true box it overlaps most of those left, if
        their intersection over union is 0.5 or more, as in the COCO evaluation (Lin et al. 2014).

        Args:
            predicted: for each record, boxes (boxes, 4) and their scores (boxes,). A box that is no numbers has no score.
            true: for each record, boxes (boxes, 4).

        Raises:
            ValueError: the shapes do not fit together, or a true box is no numbers.
        """
        if len(predicted) != len(true):
            raise ValueError(f"predictions for {len(predicted)} records do not fit {len(true)} records")
        parts = [_matched(*pair, wanted) for pair, wanted in zip(predicted, true, strict=True)]
        sizes = np.array([len(score) for score, _ in parts], dtype=np.int64)
        return cls(
            np.concatenate([np.zeros(0), *(score for score, _ in parts)]),
            np.concatenate([np.zeros(0, dtype=np.bool_), *(hit for _, hit in parts)]),
            np.repeat(np.arange(len(true)), sizes),
            np.array([len(wanted) for wanted in true], dtype=np.int64),
        )

    @property
    def sound(self) -> bool:
        """Whether every score is from 0 to 1."""
        return bool(((self.score >= 0) & (self.score <= 1)).all())

    @property
    def classes(self) -> int:
        """What is boxed and what is not."""
        return 2

    def __len__(self) -> int:
        return len(self.true)

    def __add__(self, other: BoxScores) -> BoxScores:
        return BoxScores(
            np.concatenate([self.score, other.score]),
            np.concatenate([self.hit, other.hit]),
            np.concatenate([self.record, other.record + len(self)]),
            np.concatenate([self.true, other.true]),
        )

    def take(self, index: Whole) -> BoxScores:
        """The records at `index`, (records,)."""
        order = np.argsort(self.record, kind="stable")
        sizes = np.bincount(self.record, minlength=len(self))
        starts, taken = (np.cumsum(sizes) - sizes)[index], sizes[index]
        within = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
        boxes = order[np.repeat(starts, taken) + within]
        return BoxScores(self.score[boxes], self.hit[boxes], np.repeat(np.arange(len(index)), taken), self.true[index])


def ap50(scores: BoxScores, weight: Floats) -> Floats:
    """Average precision at an overlap of 0.5, interpolated at all points (Everingham et al. 2010, PASCAL VOC since 2010).

    (draws, records) weights -> (draws,); boxes of one score are tied. NaN where there are no true boxes.
    """
    hits, misses = ranking.grouped(scores.score, scores.hit, weight[:, scores.record])
    return ranking.interpolated_precision(hits, misses, weight @ scores.true)


def _matched(boxes: Floats, score: Floats, true: Floats) -> tuple[Floats, Flags]:
    # the scores of a record's boxes, and which of them hit
    if boxes.shape != (len(score), 4) or score.ndim != 1 or true.ndim != 2 or true.shape[1] != 4:
        raise ValueError(f"boxes of shape {boxes.shape} do not fit scores of shape {score.shape} and boxes {true.shape}")
    if not np.isfinite(true).all():
        raise ValueError("a true box is no numbers")
    score = np.where(np.isfinite(boxes).all(axis=1), score, np.nan)
    overlap, hit = _overlap(boxes, true), np.zeros(len(score), dtype=np.bool_)
    for box in np.argsort(-score, kind="stable"):
        if len(true) and overlap[box].max() >= OVERLAP:
            hit[box] = True
            overlap[:, overlap[box].argmax()] = 0.0  # taken
    return score.astype(np.float64), hit


def _overlap(some: Floats, others: Floats) -> Floats:
    # (some, others): intersection over union; 0 for a box without area or numbers
    half = some[:, None, 2:] / 2, others[None, :, 2:] / 2
    centre = some[:, None, :2], others[None, :, :2]
    low = np.maximum(centre[0] - half[0], centre[1] - half[1])
    high = np.minimum(centre[0] + half[0], centre[1] + half[1])
    both = np.clip(high - low, 0, None).prod(axis=2)
    union = some[:, None, 2:].prod(axis=2) + others[None, :, 2:].prod(axis=2) - both
    return np.nan_to_num(ranking.ratio(both, union))
