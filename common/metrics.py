"""How good is a model: exact figures for one holder of the records, and their intervals.

`Scores` is what a holder of test records has: one score and one label per patient. Figures are plain functions of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Predictions beside the truth.

    Attributes:
        probability: the model's probability of the positive class, shape (patients,).
        label: 0 or 1, shape (patients,).
    """

    probability: Floats
    label: NDArray[np.int64]

    def __add__(self, other: Scores) -> Scores:
        """Both sets of patients together."""
        return Scores(np.concatenate([self.probability, other.probability]), np.concatenate([self.label, other.label]))

    def __len__(self) -> int:
        return len(self.label)


def auroc(scores: Scores) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative (Mann & Whitney 1947).

    NaN where one of the classes is absent, or a score is no number.

    >>> auroc(Scores(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1])))
    0.875
    """
    _, group, size = np.unique(scores.probability, return_inverse=True, return_counts=True)
    rank = (np.cumsum(size) - (size - 1) / 2)[group]  # tied scores share their mean rank
    positives = int(scores.label.sum())
    negatives = len(scores) - positives
    if not positives or not negatives or np.isnan(scores.probability).any():
        return float("nan")
    return float((rank[scores.label == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def accuracy(scores: Scores) -> float:
    """Share of patients on the right side of 0.5; NaN where a score is no number.

    >>> accuracy(Scores(np.array([0.1, 0.6, 0.4, 0.8]), np.array([0, 0, 1, 1])))
    0.5
    """
    if not len(scores) or np.isnan(scores.probability).any():
        return float("nan")
    return float(np.mean((scores.probability >= 0.5) == scores.label))


def log_loss(scores: Scores) -> float:
    """Mean negative log-likelihood, in nats."""
    p = np.clip(scores.probability, 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(scores.label == 1, np.log(p), np.log1p(-p)))) if len(scores) else float("nan")


METRICS: dict[str, Callable[[Scores], float]] = {"auroc": auroc, "accuracy": accuracy, "log_loss": log_loss}


def interval(metric: Callable[[Scores], float], scores: Scores, *, seed: int, draws: int = 400) -> tuple[float, float] | None:
    """A 95 % percentile bootstrap interval over patients (Efron & Tibshirani 1993); None where it is undefined."""
    if not len(scores):
        return None
    picks = np.random.default_rng(seed).integers(len(scores), size=(draws, len(scores)))
    values = [metric(Scores(scores.probability[pick], scores.label[pick])) for pick in picks]
    finite = [value for value in values if np.isfinite(value)]
    if len(finite) < draws / 2:
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)
