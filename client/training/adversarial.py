"""Adversarial learning of one round: a critic that is shown patients' images, and a generator that never is.

Only the critic's loss on real images looks at patients, so it alone is clipped by patient and noised. How the critic learns
from made images, and the generator from the critic, follows from public weights and random numbers: it costs no privacy
(Xie et al. 2018, https://arxiv.org/abs/1802.06739). How many images are made is fixed, whoever is drawn: were it the number
of patients in the batch, one patient would move two images.

A round is `local.steps` steps of the critic and one of the generator, all from the round's model; more of the former than of
the latter is what works under noise (Bie et al. 2023, https://arxiv.org/abs/2302.02936).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from wardround.client.dp import Coins, clipped_sum
from wardround.client.training import supervised
from wardround.common.plan import LocalPlan, PrivacyPlan
from wardround.common.synthesis import Adversaries, part
from wardround.common.tasks import Records, Task
from wardround.common.tasks.base import Loss
from wardround.common.weights import Weights

MADE = 64  # images in a step
AT_MOST = 128  # real images in a step without privacy, where the plan says "all": small batches suit adversaries
_VARIETY = 0.2  # what a generator gains by images that differ
_ALIKE = 0.01  # of a value; closer images count as equal


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
    """The update of one round under patient-level differential privacy; see `supervised.private_update`."""
    pair, critic = cast(Adversaries, model), part(weights, "critic")
    seed = int(coins.uniform(1).item() * 2**53)  # before anything is drawn of patients
    maker = _Maker(pair, part(weights, "generator"), seed, records.patient.device)
    # the mean over real and made images is half of either's
    half = local.model_copy(update={"learning_rate": local.learning_rate / 2})

    def beside(critic: Weights) -> Weights:
        # clipped as patients are, or the critic would hear more of the made images
        total = clipped_sum(
            pair.critic, task.loss, critic, maker.records(MADE), clip_norm=privacy.clip_norm, records_per_patient=1
        )
        return {name: t.float().mul_(-half.learning_rate / MADE) for name, t in total.items()}

    moved = supervised.private_update(
        task, pair.critic, critic, records, local=half, privacy=privacy, noise_multiplier=noise_multiplier,
        declared_patients=declared_patients, coins=coins, beside=beside,
    )  # fmt: skip
    return _joined(moved, maker.step(task.loss, critic, local.learning_rate))


def round_without_privacy(
    task: Task, model: nn.Module, weights: Weights, records: Records, *, local: LocalPlan, seed: int, site: str, round: int
) -> Weights:
    """The update of one round without privacy, from as many made images as real ones."""
    pair, critic = cast(Adversaries, model), part(weights, "critic")
    maker = _Maker(pair, part(weights, "generator"), supervised.entropy(seed, site, round) >> 65, records.patient.device)
    few = local.model_copy(update={"batch_size": AT_MOST}) if local.batch_size == "all" else local
    drawn = supervised.drawn_records(task, records, few, seed=seed, site=site, round=round)
    both = (batch + maker.records(len(batch)) for batch in drawn)
    moved = supervised.plain_update(task, pair.critic, critic, local=few, batches=both)
    return _joined(moved, maker.step(task.loss, critic, local.learning_rate))


class _Maker:
    """The round's generator and the random numbers it makes images of. It is given no record, so it cannot look at one."""

    def __init__(self, pair: Adversaries, generator: Weights, seed: int, device: torch.device) -> None:
        self._pair, self._generator, self._device = pair, generator, device
        self._random = torch.Generator().manual_seed(seed)

    def records(self, count: int) -> Records:
        """`count` images as records of nobody, real of no kind."""
        noise, kind = self._chance(count)
        with torch.no_grad():
            image = torch.func.functional_call(self._pair.generator, self._generator, (noise, kind))
        return Records({"image": image}, torch.full_like(kind, -1), torch.arange(count, device=self._device))

    def step(self, loss: Loss, critic: Mapping[str, Tensor], rate: float) -> Weights:
        """How the generator should move for its images to be taken for real ones of their kind, and to differ.

        Two images of a kind should differ by more than nothing, or a generator soon makes one image only ("mode seeking", Mao
        et al. 2019, https://arxiv.org/abs/1903.05628; here by a logarithm, which asks ever less of those that do).
        """
        noise, kind = self._chance(MADE)
        other, _ = self._chance(MADE)
        learning = {name: w.detach().requires_grad_() for name, w in self._generator.items()}
        with torch.enable_grad():
            image, twin = (torch.func.functional_call(self._pair.generator, learning, (z, kind)) for z in (noise, other))
            says = torch.func.functional_call(self._pair.critic, dict(critic), (image,))
            differ = (image - twin).abs().flatten(1).mean(1)
            value = loss(says, kind) - _VARIETY * (differ + _ALIKE).log()
            found = torch.autograd.grad(value.mean(), list(learning.values()))
        return {name: -rate * g for name, g in zip(learning, found, strict=True)}

    def _chance(self, count: int) -> tuple[Tensor, Tensor]:
        noise, kind = self._pair.chance(count, self._random)
        return noise.to(self._device), kind.to(self._device)


def _joined(critic: Weights, generator: Weights) -> Weights:
    return {f"critic.{name}": t for name, t in critic.items()} | {f"generator.{name}": t for name, t in generator.items()}
