"""Figures of classes. Each is a function of sums over records, which a weight per record, a site or a batch can make.

A figure of one class (precision, recall, F1, specificity) is that of class 1 where there are two classes, and the mean over
the classes where there are more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from wardround.common.metrics import ranking
from wardround.common.metrics.ranking import mean_known, ratio
from wardround.common.metrics.scores import Floats, Scores

CALIBRATION_BINS = 15
_LEAST = 1e-7  # a probability is taken for no smaller one: a single sure mistake has a finite surprise


def ranked(count: int) -> list[int]:
    """Of so many classes, those whose ranking is looked at, each against the rest: class 1 of two, or all."""
    return [1] if count == 2 else list(range(count))


def of_ranking(figure: Callable[[Floats, Floats], Floats]) -> Callable[[Scores, Floats], Floats]:
    """(scores, weight (draws, records)) -> (draws,): `figure` of each class against the rest, the mean over those present."""

    def over(scores: Scores, weight: Floats) -> Floats:
        found = [
            figure(*ranking.grouped(scores.probability[:, number], scores.label == number, weight))
            for number in ranked(scores.classes)
        ]
        return mean_known(np.stack(found, axis=-1))

    return over


def of_sums(entries: Callable[[Scores], Floats], figure: Callable[[Floats], Floats]) -> Callable[[Scores, Floats], Floats]:
    """(scores, weight (draws, records)) -> (draws,): `figure` of the weighted sums of a record's entries."""

    def over(scores: Scores, weight: Floats) -> Floats:
        each = entries(scores)
        return figure((weight @ each.reshape(len(scores), -1)).reshape(len(weight), *each.shape[1:]))

    return over


def counts(scores: Scores) -> Floats:
    """(records, 3, classes): is it one of the class and called so, is it called so, is it one."""
    one = np.eye(scores.classes)
    called, true = one[scores.chosen], one[scores.label]
    return np.stack([called * true, called, true], axis=1)


def losses(scores: Scores) -> Floats:
    """(records, 3): log loss in nats, Brier score, and 1.

    The Brier score of two classes is (probability - truth)^2, as most texts on medicine have it; of more, the sum of that
    over the classes, as in Brier (1950).
    """
    truth = np.eye(scores.classes)[scores.label]
    likelihood = np.clip(scores.probability[np.arange(len(scores)), scores.label], _LEAST, 1 - _LEAST)
    square = (scores.probability - truth) ** 2
    brier = square[:, 1] if scores.classes == 2 else square.sum(axis=1)
    return np.stack([-np.log(likelihood), brier, np.ones(len(scores))], axis=1)


def calibration(scores: Scores) -> Floats:
    """(records, 15, 3): in the bin of its confidence, a record's confidence, whether it came true, and 1.

    With two classes the confidence is the probability of class 1, which comes true where class 1 does; with more it is that
    of the likeliest class.
    """
    if scores.classes == 2:
        sure, true = scores.probability[:, 1], scores.label == 1
    else:
        sure, true = scores.probability.max(axis=1), scores.chosen == scores.label
    place = np.clip(sure * CALIBRATION_BINS, 0, CALIBRATION_BINS - 1).astype(np.int64)
    entry = np.stack([sure, true, np.ones(len(scores))], axis=1)
    found = np.zeros((len(scores), CALIBRATION_BINS, 3))
    found[np.arange(len(scores)), place] = entry
    return found


def accuracy(sums: Floats) -> Floats:
    """Share of records called what they are; from `counts`, (..., 3, classes) -> (...)."""
    hit, _, true = _columns(sums)
    return ratio(hit.sum(axis=-1), true.sum(axis=-1))


def balanced_accuracy(sums: Floats) -> Floats:
    """Mean recall of the classes present; with two classes, NaN where one is absent. From `counts`."""
    hit, _, true = _columns(sums)
    each = ratio(hit, true)
    return each.mean(axis=-1) if each.shape[-1] == 2 else mean_known(each)


def precision(sums: Floats) -> Floats:
    """Share of the records called so that are; from `counts`."""
    return _one_or_mean(_precisions(sums), sums)


def recall(sums: Floats) -> Floats:
    """Share of the records of the class that are called so; from `counts`."""
    return _one_or_mean(_recalls(sums), sums)


def f1(sums: Floats) -> Floats:
    """Harmonic mean of precision and recall; from `counts`."""
    return _one_or_mean(_f1s(sums), sums)


def specificity(sums: Floats) -> Floats:
    """Share of the records of other classes that are not called so; from `counts`."""
    hit, called, true = _columns(sums)
    others = true.sum(axis=-1, keepdims=True) - true
    each = ratio(others - called + hit, others)
    return each[..., 1] if each.shape[-1] == 2 else mean_known(np.where(called + true > 0, each, np.nan))


def log_loss(sums: Floats) -> Floats:
    """Mean negative log-likelihood, in nats; from `losses`, (..., 3) -> (...)."""
    return ratio(sums[..., 0], sums[..., 2])


def brier(sums: Floats) -> Floats:
    """Mean squared distance from the truth; from `losses`."""
    return ratio(sums[..., 1], sums[..., 2])


def perplexity(sums: Floats) -> Floats:
    """Exponential of the log loss; from `losses`."""
    return np.exp(log_loss(sums))


def calibration_error(sums: Floats) -> Floats:
    """Expected calibration error over 15 bins of equal width (Naeini, Cooper & Hauskrecht 2015); from `calibration`."""
    gap = np.abs(sums[..., 0] - sums[..., 1]).sum(axis=-1)
    return ratio(gap, sums[..., 2].sum(axis=-1))


def per_class(scores: Scores) -> dict[int, dict[str, float]]:
    """Precision, recall, F1 and support (records) of every class, each against the rest; NaN where undefined."""
    known = len(scores) and scores.sound
    sums = counts(scores).sum(axis=0) if known else np.zeros((3, scores.classes))
    support = np.bincount(scores.label, minlength=scores.classes)
    columns = zip(_precisions(sums), _recalls(sums), _f1s(sums), support, strict=True)
    names = ("precision", "recall", "f1", "support")
    return {number: {k: float(v) for k, v in zip(names, each, strict=True)} for number, each in enumerate(columns)}


def _columns(sums: Floats) -> tuple[Floats, Floats, Floats]:
    return sums[..., 0, :], sums[..., 1, :], sums[..., 2, :]


def _precisions(sums: Floats) -> Floats:
    hit, called, _ = _columns(sums)
    return ratio(hit, called)


def _recalls(sums: Floats) -> Floats:
    hit, _, true = _columns(sums)
    return ratio(hit, true)


def _f1s(sums: Floats) -> Floats:
    hit, called, true = _columns(sums)
    return ratio(2 * hit, called + true)


def _one_or_mean(each: Floats, sums: Floats) -> Floats:
    # the mean is over classes that occur in the truth or among the answers, and what is undefined for one of these counts
    # 0: else a model would gain by never naming a class. scikit-learn and torchmetrics agree
    if each.shape[-1] == 2:
        return each[..., 1]
    _, called, true = _columns(sums)
    occurs = called + true > 0
    return ratio(np.where(occurs, np.nan_to_num(each), 0).sum(axis=-1), occurs.sum(axis=-1))
