"""What would have happened without the federation: each hospital alone, and all records in one place.

Both follow the study's own plan, with one site and without noise. Alone, nothing leaves the hospital, so it would add none;
pooled is the ceiling that a federation is measured against.
"""

from __future__ import annotations

from pathlib import Path

from wardround.client.queries import class_vectors
from wardround.client.training import plain_update
from wardround.common.plan import LocalPlan, StudyPlan
from wardround.common.start import start, taken_in
from wardround.common.tasks import Records, task_of
from wardround.common.tasks.of_plan import shares_of
from wardround.common.weights import Weights
from wardround.server.step import State, released, step


def train_alone(plan: StudyPlan, records: Records, *, name: str, weights: Path | None = None) -> Weights:
    """The model one holder of `records` gets from `plan`, without noise; `name` picks its batches.

    `weights` is the file of public weights that the plan names, if it does.
    """
    task, first = task_of(plan, _shares(plan, records)), start(plan, weights)
    working = task.model(plan.model, plan.seed)
    current = taken_in(working, plan.model, first.weights | first.frozen)
    local = LocalPlan.model_validate({**plan.local.model_dump(), "proximal": 0.0})  # there is nobody to stay close to
    state: State = {}
    for round in range(1, plan.rounds + 1):
        update = plain_update(task, working, current, records, local=local, seed=plan.seed, site=name, round=round)
        current, state = step(current, update, state, plan, round)
    return released(current, state) | first.frozen


def _shares(plan: StudyPlan, records: Records) -> tuple[float, ...] | None:
    """Of the classes among the holder's own patients, where the plan has them counted."""
    if not plan.loss.counts:
        return None
    return shares_of(tuple(class_vectors(records, task_of(plan).schema.classes).sum(axis=0).tolist()))
