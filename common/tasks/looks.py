"""A look at validation patients: which figure, and the sums that a site sends for it.

On the wire a tally is one vector of float64, little-endian, of a length that follows from the task alone. In a study with
[privacy] it is two noised sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from wardround.common.errors import ConfigError, UpdateRefused
from wardround.common.metrics import METRICS, Judged, Metric, Scores, Tally
from wardround.common.metrics.plausible import contradiction
from wardround.common.metrics.scores import Floats
from wardround.common.plan import StudyPlan
from wardround.common.tasks.base import Task

_NUMBER = np.dtype("<f8")
_OF_ONE = 0.5  # how much the count weighs beside the loss: it is known as well as it must be, and leaves the loss more room
_LENGTH = 1.001 * math.hypot(1.0, _OF_ONE)  # a thousandth is left for the rounding of losses computed in other batches
_BARELY = 2.0  # deviations of the noise; fewer patients than that are drowned in it


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
    def name(self) -> str:
        """What the figure is called in report.json."""
        return self.metric.name

    @property
    def label(self) -> str:
        """What people call it."""
        return self.metric.label

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


@dataclass(frozen=True)
class NoisedLook:
    """What is looked at in a study with [privacy]: one noised sum of a vector of each patient, never longer than 1.

    Attributes:
        cap: the most that one patient's mean loss counts.
        noise_multiplier: standard deviation of the noise that each site adds to each of the two sums.
    """

    cap: float
    noise_multiplier: float
    name: str = "clipped_loss"
    label: str = "clipped loss"

    @property
    def nbytes(self) -> int:
        """Bytes of one tally on the wire."""
        return 2 * _NUMBER.itemsize

    def vectors(self, loss: Floats) -> Floats:
        """What each patient adds: mean loss of each (patients,) -> (patients, 2), each row of L2 length at most 1."""
        held = np.nan_to_num(loss, nan=math.inf, posinf=math.inf).clip(0.0, self.cap) / self.cap
        return np.stack([held, np.full(len(loss), _OF_ONE)], axis=1) / _LENGTH

    def unpack(self, sums: bytes) -> Floats:
        """The sums that a site sent, and a third number, 1, that counts the site.

        Raises:
            UpdateRefused: it has another length, or holds what is no finite number.
        """
        if len(sums) != self.nbytes:
            raise UpdateRefused(f"the tally should be {self.nbytes} bytes long")
        found = np.frombuffer(sums, _NUMBER).astype(np.float64)
        if not np.isfinite(found).all():
            raise UpdateRefused("the tally holds numbers that are not finite")
        return np.append(found, 1.0)

    def figure(self, total: Floats) -> float | None:
        """The mean clipped loss; None where the patients cannot be told from the noise."""
        loss, count, sites = total.tolist()
        if count <= _BARELY * self.noise_multiplier * math.sqrt(sites):
            return None
        value = self.cap * _OF_ONE * loss / count
        return value if math.isfinite(value) else None

    def better(self, value: float, than: float) -> bool:
        """Whether `value` is strictly better."""
        return value < than

    def deviation(self, patients: float, sites: int) -> float:
        """About the standard deviation of the figure over `patients` set aside at `sites`, for a small mean loss."""
        return self.cap * _LENGTH * self.noise_multiplier * math.sqrt(sites) / patients


def look_of(task: Task, plan: StudyPlan) -> Look | NoisedLook:
    """What the plan's [validation] looks at.

    Raises:
        ConfigError: there is no such section, or the task has no such figure.
    """
    if plan.validation is None:
        raise ConfigError(f"study {plan.name} has no [validation] section")
    if (noised := plan.looks_query()) is not None:
        if task.makes is not None:
            raise ConfigError(f"validation: with [privacy] a look is a loss of answers, and task {task.name} makes pictures")
        return NoisedLook(plan.validation.cap, noised.noise_multiplier)
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
