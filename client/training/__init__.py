"""How a site learns: one file a kind of learner; a task names the one it wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from wardround.client.dp import Coins
from wardround.client.training import adversarial, supervised
from wardround.common.plan import LocalPlan, PrivacyPlan
from wardround.common.registry import registry
from wardround.common.tasks import Records, Task
from wardround.common.weights import Weights


@dataclass(frozen=True)
class Learner:
    """The two updates of a kind of learning: `private_update` and `plain_update` below say what of."""

    name: str
    private: Callable[..., Weights]
    plain: Callable[..., Weights]


LEARNERS = registry(
    Learner("supervised", supervised.private_update, supervised.round_without_privacy),
    Learner("adversarial", adversarial.private_update, adversarial.round_without_privacy),
)


def private_update(
    task: Task,
    model: nn.Module,
    weights: Weights,
    records: Records,
    *,
    local: LocalPlan,
    privacy: PrivacyPlan,
    noise_multiplier: float,
    declared_patients: int,
    coins: Coins,
) -> Weights:
    """The update of one round under patient-level differential privacy, as the task's learner makes it."""
    return LEARNERS[task.learner].private(
        task, model, weights, records, local=local, privacy=privacy, noise_multiplier=noise_multiplier,
        declared_patients=declared_patients, coins=coins,
    )  # fmt: skip


def plain_update(
    task: Task, model: nn.Module, weights: Weights, records: Records, *, local: LocalPlan, seed: int, site: str, round: int
) -> Weights:
    """The update of one round without privacy; the same for the same plan, site and round."""
    return LEARNERS[task.learner].plain(task, model, weights, records, local=local, seed=seed, site=site, round=round)


__all__ = ["LEARNERS", "Learner", "plain_update", "private_update"]
