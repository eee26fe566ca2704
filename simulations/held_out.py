"""The held-out patients of every hospital, and how good a model is for them. Only a simulation has them in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import nn

from wardround.client.data import open_records
from wardround.common.metrics import METRICS, Judged, Metric, interval
from wardround.common.tasks import Records, Task
from wardround.common.weights import Weights
from wardround.simulations.scenario import Scenario

_MOST_INTERVALS = 50  # sites; beyond, each hospital's own figures come without intervals, which would take minutes


@dataclass(frozen=True)
class HeldOut:
    """The held-out patients of every hospital. Only a simulation has them in one place."""

    task: Task
    scenario: Scenario
    model: nn.Module
    of_site: dict[str, Records]
    together: Records

    @classmethod
    def open(cls, scenario: Scenario) -> Self:
        """Read every hospital's."""
        task = scenario.task
        held_out = {site: open_records(scenario.source(site), task)[1] for site in scenario.sites}
        plan = scenario.study.plan
        together = reduce(add, held_out.values())
        return cls(task, scenario, task.model(plan.model, plan.seed), held_out, together)

    def pooled(self, weights: Weights) -> Judged:
        """What a model says of all of them."""
        return self.task.scores(self.model, weights, self.together)

    def figures(self, found: Judged) -> dict[str, float]:
        """The task's metrics that are defined."""
        values = {name: METRICS[name](found) for name in self.task.metrics}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def compared(self, weights: Weights) -> list[str]:
        """How like a released model's pictures are to its training records, which no noise covers; for the notes."""
        if self.task.makes is None:
            return []
        trained_on = reduce(add, (open_records(self.scenario.source(site), self.task)[0] for site in self.of_site))
        return self.task.makes.compared(self.model, weights, trained_on, self.together)

    def sites(self) -> dict[str, Any]:
        """The report's part of that name."""
        plan = self.scenario.study.plan
        return {
            site: {"declared_patients": plan.sites[site], "test_patients": self.of_site[site].patients} for site in plan.sites
        }

    def results(self, federated: Weights, alone: dict[str, Weights]) -> dict[str, Any]:
        """The report's part of that name; `alone` holds each hospital's model, and the pooled one under ""."""
        federated_says = self.pooled(federated)
        alone_say = {name: self.pooled(weights) for name, weights in alone.items()}
        local = {site: found for site, found in alone_say.items() if site}
        pooled = alone_say.get("")
        return {
            "federated": self._estimates(federated_says, self.together),
            "pooled": self._estimates(pooled, self.together) if pooled is not None else {},
            "local": {site: self._estimates(found, self.together) for site, found in local.items()},
            "by_site": self._by_site(federated_says, local, pooled),
        }

    def _by_site(self, federated: Judged, local: dict[str, Judged], pooled: Judged | None) -> dict[str, Any]:
        """Each site's part of what the models say of all records, which stand behind each other in `together`."""
        intervals = len(self.of_site) <= _MOST_INTERVALS
        found, start = {}, 0
        for site, records in self.of_site.items():
            mine = np.arange(start, start + len(records))
            models = {"federated": federated, "local": local.get(site), "pooled": pooled}
            found[site] = {"test_patients": records.patients} | {
                name: self._estimates(says.take(mine), records, intervals) if says is not None else {}
                for name, says in models.items()
            }
            start += len(records)
        return found

    def _estimates(self, found: Judged, records: Records, intervals: bool = True) -> dict[str, Any]:
        seed = self.scenario.study.plan.seed if intervals else None
        patient = None if len(records) == records.patients else records.patient.numpy()
        return {name: _estimate(METRICS[name], found, seed, patient) for name in self.task.metrics}


def _estimate(metric: Metric, found: Judged, seed: int | None, patient: NDArray[np.int64] | None) -> dict[str, float | None]:
    value = metric(found)
    ends = interval(metric, found, seed=seed, patient=patient) if seed is not None else None
    low, high = ends if ends else (None, None)
    return {"value": value if math.isfinite(value) else None, "low": low, "high": high}
