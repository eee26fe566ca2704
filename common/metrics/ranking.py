"""How well scores rank, from how many positives and negatives stand at each of them.

Counts are arrays (..., scores) in ascending order of the score. One entry may be one score, for exact figures, or a bin of
them; a count may be a weight. What shares an entry is tied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wardround.common.metrics.scores import Flags, Floats, Whole

_REACH = 90.0  # logits; the smallest float32 above 0 lies at -87


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    """The share part / whole, NaN where whole is 0."""
    found: Floats = np.full(np.broadcast_shapes(np.shape(part), np.shape(whole)), np.nan)
    np.divide(part, whole, out=found, where=np.not_equal(whole, 0))
    return found


def mean_known(values: Floats) -> Floats:
    """The mean over the last axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1))


def grouped(score: Floats, positive: Flags, weight: Floats) -> tuple[Floats, Floats]:
    """Weight of positives and negatives at each different score: (draws, scores) each.

    Args:
        score: (records,).
        positive: (records,).
        weight: (draws, records).
    """
    order = np.argsort(score, kind="stable")
    ascending = score[order]
    starts = np.flatnonzero(np.diff(ascending, prepend=np.nan))
    weight = weight[:, order]
    parts = weight * positive[order], weight * ~positive[order]
    if len(starts) == len(score):  # no ties; also: nothing at all
        return parts
    above, below = (np.add.reduceat(part, starts, axis=1) for part in parts)
    return above, below


def bins_of(score: Floats, bins: int) -> Whole:
    """The bin of each score in [0, 1]: equal steps of asinh(logit / 2), narrow around 0.5 and yet reaching into the tails.

    Of 16,384 bins, one is 0.001 logits wide at 0.5, 0.005 at 1e-4 and at 1 - 1e-4, 0.05 at the smallest float32.
    """
    with np.errstate(divide="ignore"):
        inside = np.clip(score, 0, 1)
        logit = np.log(inside) - np.log1p(-inside)
    place = (np.arcsinh(logit / 2) / np.arcsinh(_REACH / 2) + 1) / 2
    found: Whole = np.clip(place * bins, 0, bins - 1).astype(np.int64)
    return found


def histogram(score: Floats, positive: Flags, bins: int) -> Floats:
    """(2, bins): how many positives, how many negatives are in each bin."""
    place = bins_of(score, bins)
    counts = [np.bincount(place[flags], minlength=bins) for flags in (positive, ~positive)]
    return np.stack(counts).astype(np.float64)


def auroc(positive: Floats, negative: Floats) -> Floats:
    """Area under the ROC curve: the chance that a positive scores above a negative (Mann & Whitney 1947).

    (..., scores) -> (...); NaN where there are no positives or no negatives.
    """
    beaten = np.cumsum(negative, axis=-1) - negative / 2  # a tie is half a win
    return ratio((positive * beaten).sum(axis=-1), positive.sum(axis=-1) * negative.sum(axis=-1))


def average_precision(positive: Floats, negative: Floats) -> Floats:
    """Area under the precision-recall curve as a sum of steps, never interpolated (Davis & Goadrich 2006).

    (..., scores) -> (...); NaN where there are no positives.
    """
    precision = _precision(positive, negative)
    return ratio((positive[..., ::-1] * precision).sum(axis=-1), positive.sum(axis=-1))


def interpolated_precision(hits: Floats, misses: Floats, wanted: Floats) -> Floats:
    """Area under the precision-recall curve made monotone: the interpolation at all points of PASCAL VOC since 2010.

    (..., scores) and how many there were to find, (...) -> (...); NaN where there was nothing to find.
    """
    precision = _precision(hits, misses)
    best = np.maximum.accumulate(precision[..., ::-1], axis=-1)  # of this recall or any larger one, ascending again
    return ratio((hits * best).sum(axis=-1), wanted)


def _precision(positive: Floats, negative: Floats) -> Floats:
    # descending: of the records that score at least so much, the share of positives; 0 where nobody does
    found = np.cumsum(positive[..., ::-1], axis=-1)
    called = found + np.cumsum(negative[..., ::-1], axis=-1)
    share: Floats = found / np.where(called == 0, 1, called)
    return share
