"""What a tally writes down of each kind of predictions, and how figures are read off it.

A book says which sums there are and of which shape; both follow from the kind and the number of classes, so they are public.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from wardround.common.metrics import classes, masks, ranking
from wardround.common.metrics.boxes import BoxScores
from wardround.common.metrics.masks import MaskScores
from wardround.common.metrics.scores import Floats, Scores

RANKED = 64  # classes; with more there are no histograms, whose bins would be too few or too many
_BINS = 1 << 14
_ALL_BINS = 1 << 16  # of all classes together: with two counts in each, histograms are a megabyte at most

Shapes = dict[str, tuple[int, ...]]
Sums = Mapping[str, Floats]


@dataclass(frozen=True)
class Book:
    """One kind of predictions.

    Attributes:
        kind: the predictions.
        shapes: name and shape of each sum, for a number of classes.
        sums: the sums of sound predictions.
        figures: sums -> figures by name, NaN where undefined.
        supports: sums -> for each figure, how many the smallest group is that it is about.
    """

    kind: type[Any]
    shapes: Callable[[int], Shapes]
    sums: Callable[[Any], dict[str, Floats]]
    figures: Callable[[Sums], dict[str, Floats]]
    supports: Callable[[Sums], dict[str, float]]


_OF_COUNTS = {
    "accuracy": classes.accuracy,
    "balanced_accuracy": classes.balanced_accuracy,
    "precision": classes.precision,
    "recall": classes.recall,
    "f1": classes.f1,
    "specificity": classes.specificity,
}
_OF_LOSSES = {"log_loss": classes.log_loss, "brier": classes.brier, "perplexity": classes.perplexity}
_OF_HISTOGRAM = {"auroc": ranking.auroc, "auprc": ranking.average_precision}
_OF_EVERYONE = ("accuracy", "log_loss", "brier", "perplexity", "calibration_error")  # the rest looks at classes apart
_OF_CALLED = ("precision", "f1")


def _class_shapes(count: int) -> Shapes:
    found: Shapes = {"counts": (3, count), "losses": (3,), "calibration": (classes.CALIBRATION_BINS, 3)}
    if count > RANKED:
        return found
    looked_at = len(classes.ranked(count))
    return found | {"histogram": (looked_at, 2, min(_BINS, _ALL_BINS // looked_at))}


def _class_sums(scores: Scores) -> dict[str, Floats]:
    found = {
        "counts": classes.counts(scores).sum(axis=0),
        "losses": classes.losses(scores).sum(axis=0),
        "calibration": classes.calibration(scores).sum(axis=0),
    }
    if scores.classes <= RANKED:
        bins = _class_shapes(scores.classes)["histogram"][-1]
        of = [(scores.probability[:, number], scores.label == number) for number in classes.ranked(scores.classes)]
        found["histogram"] = np.stack([ranking.histogram(score, positive, bins) for score, positive in of])
    return found


def _class_figures(sums: Sums) -> dict[str, Floats]:
    found = {name: figure(sums["counts"]) for name, figure in _OF_COUNTS.items()}
    found |= {name: figure(sums["losses"]) for name, figure in _OF_LOSSES.items()}
    found["calibration_error"] = classes.calibration_error(sums["calibration"])
    if "histogram" in sums:
        positive, negative = sums["histogram"][:, 0], sums["histogram"][:, 1]
        found |= {name: ranking.mean_known(figure(positive, negative)) for name, figure in _OF_HISTOGRAM.items()}
    return found


def _class_supports(sums: Sums) -> dict[str, float]:
    _, called, true = sums["counts"]
    everyone, rarest = float(true.sum()), float(true.min())
    # nobody called positive is no group; a few are, and precision would tell their outcome
    fewest = min(rarest, float(called[called > 0].min(initial=np.inf)))
    names = (*_OF_COUNTS, *_OF_LOSSES, "calibration_error", *(_OF_HISTOGRAM if "histogram" in sums else ()))
    support = dict.fromkeys(names, rarest)
    return support | dict.fromkeys(_OF_EVERYONE, everyone) | dict.fromkeys(_OF_CALLED, fewest)


def _mask_supports(sums: Sums) -> dict[str, float]:
    return dict.fromkeys(("dice", "iou"), float(sums["overlaps"][2]))


def _box_sums(scores: BoxScores) -> dict[str, Floats]:
    found = np.array([scores.true.sum(), (scores.true > 0).sum()], dtype=np.float64)
    return {"true": found, "histogram": ranking.histogram(scores.score, scores.hit, _BINS)}


def _box_figures(sums: Sums) -> dict[str, Floats]:
    hits, misses = sums["histogram"][0], sums["histogram"][1]
    return {"ap50": ranking.interpolated_precision(hits, misses, sums["true"][0])}


BOOKS = {
    "classes": Book(Scores, _class_shapes, _class_sums, _class_figures, _class_supports),
    "masks": Book(
        MaskScores,
        shapes=lambda count: {"overlaps": (3,)},
        sums=lambda scores: {"overlaps": masks.overlaps(scores).sum(axis=0)},
        figures=lambda sums: {"dice": masks.dice(sums["overlaps"]), "iou": masks.iou(sums["overlaps"])},
        supports=_mask_supports,
    ),
    "boxes": Book(
        BoxScores,
        shapes=lambda count: {"true": (2,), "histogram": (2, _BINS)},  # true boxes, records that have one
        sums=_box_sums,
        figures=_box_figures,
        supports=lambda sums: {"ap50": float(sums["true"][1])},
    ),
}
