"""What would have happened without the federation: each hospital alone, and all records in one place.

Both follow the study's own plan, with one site and without noise. Alone, nothing leaves the hospital, so it would add none;
pooled is the ceiling that a federation is measured against.
"""

from __future__ import annotations

from wardround.client.training import plain_update
from wardround.common.plan import LocalPlan, StudyPlan
from wardround.common.tasks import Records, task_of
from wardround.common.weights import Weights, trainable
from wardround.server.step import State, released, step


def train_alone(plan: StudyPlan, records: Records, *, name: str) -> Weights:
    """The model one holder of `records` gets from `plan`, without noise; `name` picks its batches."""
    task = task_of(plan)
    weights = trainable(task.model(plan.model, plan.seed))
    working = task.model(plan.model, plan.seed)
    local = LocalPlan.model_validate({**plan.local.model_dump(), "proximal": 0.0})  # there is nobody to stay close to
    state: State = {}
    for round in range(1, plan.rounds + 1):
        update = plain_update(task, working, weights, records, local=local, seed=plan.seed, site=name, round=round)
        weights, state = step(weights, update, state, plan, round)
    return released(weights, state)
