"""How sure a figure is: intervals over patients."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wardround.common.metrics.metric import Metric
from wardround.common.metrics.scores import Judged

_AT_ONCE = 50  # draws; the weights of more would not stay in a processor's cache


def interval(
    metric: Metric, scores: Judged, *, seed: int, patient: NDArray[np.int64] | None = None, draws: int = 400
) -> tuple[float, float] | None:
    """A 95 % percentile bootstrap interval over patients (Efron & Tibshirani 1993); None where it is undefined.

    A patient is drawn with all records: those of one are alike, and intervals over records would be too narrow. A draw is how
    often each was drawn, so nothing is copied or sorted anew for it.

    Args:
        metric: of the figure.
        scores: predictions for test records.
        seed: of the draws.
        patient: (records,) whose each record is, as 0, 1, ...; None where each record is a patient.
        draws: how many.
    """
    if not len(scores):
        return None
    count = len(scores) if patient is None else int(patient.max()) + 1
    random = np.random.default_rng(seed)
    found = []
    for start in range(0, draws, _AT_ONCE):
        rows = min(_AT_ONCE, draws - start)
        picks = random.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        weight = np.bincount(picks.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
        found.append(metric.weighted(scores, weight if patient is None else weight[:, patient]))
    values = np.concatenate(found)
    finite = values[np.isfinite(values)]
    if len(finite) < draws / 2:
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)
