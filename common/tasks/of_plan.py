"""The task of a plan, with what the plan says about its loss."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from wardround.common.errors import ConfigError
from wardround.common.plan import LossPlan, StudyPlan
from wardround.common.tasks.base import Loss, Task, cross_entropy
from wardround.common.tasks.looks import look_of


def with_options(task: Task, plan: StudyPlan) -> Task:
    """`task` with its loss as `plan` wants it.

    Raises:
        ConfigError: an option of [loss], [local] or [validation] that the task has no use for.
    """
    if plan.validation is not None:
        look_of(task, plan)
    if plan.local.views is not None and task.augment is None:
        raise ConfigError(f"local.views: task {task.name} knows no change that leaves a record's meaning; leave it out")
    if plan.loss == LossPlan():
        return task
    if task.loss is not cross_entropy:
        raise ConfigError(f"loss: task {task.name} has a loss of its own; leave the section out")
    for key in ("class_weights", "class_shares"):
        given = getattr(plan.loss, key)
        if given is not None and len(given) != task.schema.classes:
            raise ConfigError(f"loss.{key}: {len(given)} numbers for the {task.schema.classes} classes of task {task.name}")
    return replace(task, loss=_loss(plan.loss))


@lru_cache(maxsize=32)  # one function for one text: private engines are kept by it
def _loss(plan: LossPlan) -> Loss:
    def loss(logits: Tensor, label: Tensor) -> Tensor:
        """(records, classes) and (records,) -> (records,)."""
        if plan.class_shares is not None:  # Menon et al. 2021, https://arxiv.org/abs/2007.07314
            logits = logits + logits.new_tensor(plan.class_shares).log()
        found = F.cross_entropy(logits, label, reduction="none")
        if plan.focal:  # Lin et al. 2017, https://arxiv.org/abs/1708.02002
            found = (-torch.expm1(-found)).clamp_min(1e-12).pow(plan.focal) * found
        if plan.class_weights is not None:
            found = logits.new_tensor(plan.class_weights)[label] * found
        return found

    return loss
