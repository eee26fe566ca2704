"""The table of metrics: every figure a task may name."""

from __future__ import annotations

from wardround.common.metrics import boxes, classes, masks, ranking
from wardround.common.metrics.boxes import BoxScores
from wardround.common.metrics.classes import calibration, counts, losses, of_ranking, of_sums
from wardround.common.metrics.masks import MaskScores, of_overlaps
from wardround.common.metrics.metric import Metric
from wardround.common.metrics.scores import Scores

_MEAN = "the mean over the classes where there are more than two"

_TABLE = (
    Metric(
        "auroc",
        "AUROC",
        f"the chance that a patient with the finding is scored above one without it, {_MEAN}; 0.5 is guessing, 1 is perfect",
        "higher",
        Scores,
        of_ranking(ranking.auroc),
        guess=0.5,
    ),
    Metric(
        "auprc",
        "AUPRC",
        "the share of true findings among the patients scored highest, averaged over how many of the findings are to be found "
        f"(average precision), {_MEAN}; guessing reaches the share of patients with the finding, 1 is perfect",
        "higher",
        Scores,
        of_ranking(ranking.average_precision),
    ),
    Metric(
        "accuracy",
        "accuracy",
        "the share of patients whose likeliest class is the true one; with two classes, of those on the right side of a score "
        "of 0.5",
        "higher",
        Scores,
        of_sums(counts, classes.accuracy),
    ),
    Metric(
        "balanced_accuracy",
        "balanced accuracy",
        "the share of patients called what they are, looked at in each class alone and then averaged, so that a rare class "
        "counts as much as a common one",
        "higher",
        Scores,
        of_sums(counts, classes.balanced_accuracy),
    ),
    Metric(
        "precision",
        "precision",
        f"the share of patients called positive who are (positive predictive value), {_MEAN}",
        "higher",
        Scores,
        of_sums(counts, classes.precision),
    ),
    Metric(
        "recall",
        "recall",
        f"the share of patients with the finding who are called positive (sensitivity), {_MEAN}",
        "higher",
        Scores,
        of_sums(counts, classes.recall),
    ),
    Metric(
        "f1",
        "F1",
        f"the harmonic mean of precision and recall, {_MEAN}; 1 is perfect",
        "higher",
        Scores,
        of_sums(counts, classes.f1),
    ),
    Metric(
        "specificity",
        "specificity",
        f"the share of patients without the finding who are called negative, {_MEAN}",
        "higher",
        Scores,
        of_sums(counts, classes.specificity),
    ),
    Metric(
        "log_loss",
        "log loss",
        "the mean surprise about the truth, in nats; smaller is better",
        "lower",
        Scores,
        of_sums(losses, classes.log_loss),
    ),
    Metric(
        "brier",
        "Brier score",
        "the mean squared distance between the predicted probability and the truth; smaller is better",
        "lower",
        Scores,
        of_sums(losses, classes.brier),
    ),
    Metric(
        "calibration_error",
        "calibration error",
        "how far predicted probabilities are from what came true, averaged over 15 groups of patients with similar "
        "predictions; 0 is perfect",
        "lower",
        Scores,
        of_sums(calibration, classes.calibration_error),
    ),
    Metric(
        "perplexity",
        "perplexity",
        "among how many equally likely answers the model might as well have chosen; 1 is perfect",
        "lower",
        Scores,
        of_sums(losses, classes.perplexity),
    ),
    Metric(
        "dice",
        "Dice",
        "twice the overlap of predicted and true area over the sum of both, the mean over patients; 1 is perfect",
        "higher",
        MaskScores,
        of_overlaps(masks.dice),
    ),
    Metric(
        "iou",
        "IoU",
        "the overlap of predicted and true area over the area of either, the mean over patients; 1 is perfect",
        "higher",
        MaskScores,
        of_overlaps(masks.iou),
    ),
    Metric(
        "ap50",
        "AP50",
        "the share of true finds among the boxes scored highest, averaged over how many of the findings are to be found; a box "
        "counts as a find from an overlap (IoU) of 0.5; 1 is perfect",
        "higher",
        BoxScores,
        boxes.ap50,
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}
