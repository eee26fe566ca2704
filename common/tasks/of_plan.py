"""The task of a plan, with what the plan says about its loss."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wardround.common.errors import ConfigError, OrderRefused
from wardround.common.plan import LossPlan, StudyPlan
from wardround.common.tasks.base import Loss, Task, cross_entropy
from wardround.common.tasks.looks import look_of


def with_options(task: Task, plan: StudyPlan, shares: tuple[float, ...] | None = None) -> Task:
    """`task` with its loss as `plan` wants it.

    Args:
        task: the registered one.
        plan: the study's.
        shares: of each class, where the plan has them counted; None before they are known, when all classes count alike.

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
        if given == "counted" and not task.schema.classes:
            raise ConfigError(f"loss.{key}: task {task.name} has no classes to count")
        if given not in (None, "counted") and len(given) != task.schema.classes:
            raise ConfigError(f"loss.{key}: {len(given)} numbers for the {task.schema.classes} classes of task {task.name}")
    return replace(task, loss=_loss(as_counted(plan.loss, shares, task.schema.classes)))


def as_counted(plan: LossPlan, shares: tuple[float, ...] | None, classes: int) -> LossPlan:
    """`plan` with numbers in place of "counted"; without `shares`, those of classes that are equally common."""
    if not plan.counts:
        return plan
    found = shares or (1 / classes,) * classes
    numbers: dict[str, tuple[float, ...]] = {}
    if plan.class_weights == "counted":
        numbers["class_weights"] = weights_of(found, plan.most_weight)
    if plan.class_shares == "counted":
        numbers["class_shares"] = found
    return plan.model_copy(update=numbers)


def packed(shares: tuple[float, ...] | None) -> bytes:
    """Shares of classes as they travel in an order; nothing where there are none."""
    return b"" if shares is None else np.array(shares, "<f8").tobytes()


def unpacked(data: bytes, task: Task, plan: StudyPlan) -> tuple[float, ...] | None:
    """The shares in an order; None where the plan has no classes counted.

    Raises:
        OrderRefused: they are missing, or there although nobody counted, or no shares of the task's classes.
    """
    if not plan.loss.counts:
        if data:
            raise OrderRefused("the plan has no classes counted, but shares of them came")
        return None
    if len(data) != 8 * task.schema.classes:
        raise OrderRefused("the plan has classes counted, but their shares did not come")
    shares = tuple(np.frombuffer(data, "<f8").tolist())
    if not (all(0 < share <= 1 for share in shares) and abs(math.fsum(shares) - 1) <= 1e-6):
        raise OrderRefused("the shares of the classes are none")
    return shares


def weights_of(shares: tuple[float, ...], most: float) -> tuple[float, ...]:
    """The weight of each class: inverse to its share, 1 on average over patients, and at most `most`.

    >>> weights_of((0.9, 0.1), 10.0)
    (0.5555555555555556, 5.0)
    >>> weights_of((0.999, 0.001), 10.0)[1]
    10.0
    """
    return tuple(min(most, 1 / (len(shares) * share)) for share in shares)


def shares_of(counts: tuple[float, ...], deviation: float = 0.0) -> tuple[float, ...]:
    """The share of each class among `counts` patients.

    A count below the noise's `deviation` says nothing, so it is taken for that much, and no class for less than one patient.

    >>> shares_of((90.0, 10.0)), shares_of((85.0, -3.0), 15.0)
    ((0.9, 0.1), (0.85, 0.15))
    """
    floored = [max(count, deviation, 1.0) for count in counts]
    return tuple(count / math.fsum(floored) for count in floored)


@lru_cache(maxsize=32)  # one function for one text: private engines are kept by it
def _loss(plan: LossPlan) -> Loss:
    weights, shares = plan.class_weights, plan.class_shares
    assert not isinstance(weights, str)  # `as_counted` was here
    assert not isinstance(shares, str)

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        """(records, classes) and (records,) -> (records,)."""
        if shares is not None:  # Menon et al. 2021, https://arxiv.org/abs/2007.07314
            logits = logits + logits.new_tensor(shares).log()
        found = F.cross_entropy(logits, label, reduction="none")
        if plan.focal:  # Lin et al. 2017, https://arxiv.org/abs/1708.02002
            found = (-torch.expm1(-found)).clamp_min(1e-12).pow(plan.focal) * found
        if weights is not None:
            found = logits.new_tensor(weights)[label] * found
        return found

    return loss
