"""Pictures that the released model makes, for the report. They follow from it and a fixed seed, so they cost no privacy."""

from __future__ import annotations

import base64
from typing import Any

from wardround.common.plan import StudyPlan
from wardround.common.tasks import task_of
from wardround.common.weights import Weights


def sheet(plan: StudyPlan, weights: Weights) -> dict[str, Any] | None:
    """The report's part of that name; None for a task whose model makes no pictures."""
    task = task_of(plan)
    if task.makes is None:
        return None
    picture, names = task.makes.sheet(task.model(plan.model, plan.seed), weights)
    values = (picture.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).byte()
    _, side, _, channels = values.shape
    return {
        "names": names,
        "side": side,
        "channels": channels,
        "pixels": base64.b64encode(values.contiguous().numpy().tobytes()).decode(),
    }
