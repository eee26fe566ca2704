"""A look at validation patients: which figure, and the sums that a site sends for it.

On the wire a tally is one vector of float64, little-endian, of a length that follows from the task alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from wardround.common.errors import ConfigError, UpdateRefused
from wardround.common.metrics import METRICS, Judged, Metric, Scores, Tally
from wardround.common.metrics.plausible import contradiction
from wardround.common.plan import StudyPlan
from wardround.common.tasks.base import Task

_NUMBER = np.dtype("<f8")


@dataclass(frozen=True)
class Look:
    """What is looked at in a study.

    Attributes:
        metric: decides which model is better.
        classes: of the task.
    """

    metric: Metric
    classes: int

    @property
    def nbytes(self) -> int:
        """Bytes of one tally on the wire."""
        return _NUMBER.itemsize * Tally.length("classes", self.classes)

    def pack(self, found: Judged) -> bytes:
        """The sums of these predictions, as they travel."""
        return Tally.of(found).to_vector().astype(_NUMBER).tobytes()

    def unpack(self, sums: bytes) -> Tally:
        """The tally that a site sent.

        Raises:
            UpdateRefused: it has another length, holds what is no finite number, or no records have such sums.
        """
        if len(sums) != self.nbytes:
            raise UpdateRefused(f"the tally should be {self.nbytes} bytes long")
        try:
            tally = Tally.from_vector(np.frombuffer(sums, _NUMBER).astype(np.float64), "classes", self.classes)
        except ValueError:
            raise UpdateRefused("the tally holds numbers that are not finite") from None
        if wrong := contradiction(tally):
            raise UpdateRefused(f"no records have such a tally: {wrong}")
        return tally

    def figure(self, tally: Tally) -> float | None:
        """The metric of the records in `tally`; None where it is undefined."""
        value = tally.figures()[self.metric.name]
        return value if math.isfinite(value) else None

    def better(self, value: float, than: float) -> bool:
        """Whether `value` is strictly better."""
        return value > than if self.metric.better == "higher" else value < than


def look_of(task: Task, plan: StudyPlan) -> Look:
    """What the plan's [validation] looks at.

    Raises:
        ConfigError: there is no such section, or the task has no such figure.
    """
    if plan.validation is None:
        raise ConfigError(f"study {plan.name} has no [validation] section")
    headline = METRICS.get(task.headline)
    if task.makes is not None or headline is None or headline.kind is not Scores:
        raise ConfigError(f"validation: only classes can be summed up, and the answers of task {task.name} are none")
    name, classes = plan.validation.metric or task.headline, task.schema.classes
    if name not in _figures(classes):
        raise ConfigError(f"validation.metric: {name} is no figure of a tally of the {classes} classes of task {task.name}")
    return Look(METRICS[name], classes)


@lru_cache(maxsize=32)
def _figures(classes: int) -> frozenset[str]:
    nobody = Tally.from_vector(np.zeros(Tally.length("classes", classes)), "classes", classes)
    return frozenset(nobody.figures())
