"""How good is a model: predictions beside the truth, figures of them, their intervals, and sums that add over sites.

`Scores`, `MaskScores` and `BoxScores` are what a holder of test records has. A figure is METRICS[name](scores), NaN where it
is undefined. A `Tally` is what remains of them where only sums may leave a site.
"""

from wardround.common.metrics.boxes import BoxScores
from wardround.common.metrics.classes import per_class
from wardround.common.metrics.interval import interval
from wardround.common.metrics.masks import MaskScores
from wardround.common.metrics.metric import Metric
from wardround.common.metrics.scores import Judged, Scores
from wardround.common.metrics.table import METRICS
from wardround.common.metrics.tally import Tally

auroc, accuracy, log_loss = METRICS["auroc"], METRICS["accuracy"], METRICS["log_loss"]

__all__ = [
    "METRICS",
    "BoxScores",
    "Judged",
    "MaskScores",
    "Metric",
    "Scores",
    "Tally",
    "accuracy",
    "auroc",
    "interval",
    "log_loss",
    "per_class",
]
