"""Supervised learning of one round: the round's model and the site's records -> an update.

An update says how the model should move. With one local step it is minus the learning rate times the mean gradient
(FedSGD); with more it is the distance the local model went (FedAvg, McMahan et al. 2017).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wardround.client.dp import Coins, add_noise, clipped_sum, draw, secret_chance
from wardround.common.plan import LocalPlan, PrivacyPlan
from wardround.common.start import sent
from wardround.common.tasks import TASKS, Records, Task
from wardround.common.weights import Shapes, Weights


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
    beside: Callable[[Weights], Weights] | None = None,
) -> Weights:
    """The update of one round under patient-level differential privacy (DP-SGD, Abadi et al. 2016, over patients).

    Each local step: draw patients, sum their clipped mean gradients, add the whole noise, divide by the public expected
    number of patients. FedProx' pull and weight decay only look at the noised model, so they come after the noise and
    cost nothing; and so does `beside`, a step's change that follows from the model as it stands and from nobody's records.
    """
    current = dict(weights)
    patient = records.patient.cpu()  # the coins are the operating system's, so they fall on the CPU
    expected = privacy.sampling_rate * declared_patients
    for _ in range(local.steps):
        index = draw(patient, rate=privacy.sampling_rate, at_most=privacy.records_per_patient, coins=coins)
        batch = task.views(records.take(index.to(records.patient.device)), local.views, coins.uniform)
        with secret_chance(model, coins, records.patient.device):
            total = clipped_sum(
                model, task.loss, current, batch,
                clip_norm=privacy.clip_norm, records_per_patient=privacy.records_per_patient * (local.views or 1),
            )  # fmt: skip
        # all tensors lie behind each other, so the noise is drawn at once
        noised = add_noise(
            torch.cat([clipped.flatten() for clipped in total.values()]),
            deviation=noise_multiplier * privacy.clip_norm, coins=coins,
        ).mul_(-local.learning_rate / expected)  # fmt: skip
        moved = {}
        others = beside(current) if beside else {}
        parts = torch.split(noised, [clipped.numel() for clipped in total.values()])
        for (name, clipped), part in zip(total.items(), parts, strict=True):
            change = part.view(clipped.shape)
            if name in others:
                change.add_(others[name])
            if local.proximal:
                change.sub_(current[name] - weights[name], alpha=local.learning_rate * local.proximal)
            if local.weight_decay:
                change.sub_(current[name], alpha=local.learning_rate * local.weight_decay)
            if local.l1:
                change.sub_(current[name].sign(), alpha=local.learning_rate * local.l1)
            moved[name] = current[name] + change if local.steps > 1 else change
        if local.steps == 1:
            return moved
        current = moved
    return {name: current[name] - weights[name] for name in weights}


def plain_update(task: Task, model: nn.Module, weights: Weights, *, local: LocalPlan, batches: Iterator[Records]) -> Weights:
    """The update of one round without privacy; `batches` yields the records of each step.

    `model` is used as working memory: its parameters are overwritten.
    """
    named: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    start = [weights[name] for name in named]
    if local.steps == 1:  # nothing moves locally, so the round's tensors serve as parameters without a copy
        for p, tensor in zip(parameters, start, strict=True):
            p.data = tensor
        gradients = _gradients(task, model, parameters, next(batches))
        if local.weight_decay:
            torch._foreach_add_(gradients, start, alpha=local.weight_decay)
        if local.l1:
            torch._foreach_add_(gradients, torch._foreach_sign(start), alpha=local.l1)
        torch._foreach_mul_(gradients, -local.learning_rate)
        return dict(zip(named, gradients, strict=True))
    with torch.no_grad():
        for p, tensor in zip(parameters, start, strict=True):
            p.data = tensor.clone()
    for _ in range(local.steps):
        gradients = _gradients(task, model, parameters, next(batches))
        with torch.no_grad():
            if local.weight_decay:
                torch._foreach_add_(gradients, parameters, alpha=local.weight_decay)
            if local.l1:
                torch._foreach_add_(gradients, torch._foreach_sign(parameters), alpha=local.l1)
            if local.proximal:
                torch._foreach_add_(gradients, torch._foreach_sub(parameters, start), alpha=local.proximal)
            torch._foreach_add_(parameters, gradients, alpha=-local.learning_rate)
    with torch.no_grad():
        moved = torch._foreach_sub(parameters, start)
    return dict(zip(named, moved, strict=True))


def round_without_privacy(
    task: Task, model: nn.Module, weights: Weights, records: Records, *, local: LocalPlan, seed: int, site: str, round: int
) -> Weights:
    """`plain_update` on the records that the plan's seed draws."""
    drawn = drawn_records(task, records, local, seed=seed, site=site, round=round)
    return plain_update(task, model, weights, local=local, batches=drawn)


def drawn_records(task: Task, records: Records, local: LocalPlan, *, seed: int, site: str, round: int) -> Iterator[Records]:
    """The records of each local step without privacy, as `batches` draws them, or their views."""
    chance = torch.Generator().manual_seed(entropy(seed, site, round) >> 65)
    for index in batches(records, local, seed=seed, site=site, round=round):
        batch = records
        if len(index) < len(records):
            fields = {name: t[index] for name, t in records.fields.items()}
            batch = Records(fields, records.label[index], records.patient[index])
        yield task.views(batch, local.views, lambda count: torch.rand(count, generator=chance, dtype=torch.float64))


def batches(records: Records, local: LocalPlan, *, seed: int, site: str, round: int) -> Iterator[Tensor]:
    """Record indices of each local step without privacy: the same for the same plan, site and round.

    `uniform` walks through shuffled records, again and again; `balanced` draws each class equally often.
    """
    count = len(records)
    size = count if local.batch_size == "all" else min(local.batch_size, count)
    random = np.random.default_rng(entropy(seed, site, round))
    if local.sampler == "balanced":
        _, label, of_class = np.unique(records.label.cpu().numpy(), return_inverse=True, return_counts=True)
        chance = 1 / of_class[label]
        while True:
            yield torch.from_numpy(random.choice(count, size, p=chance / chance.sum()))
    if size == count:
        everything = torch.arange(count)
        while True:
            yield everything
    while True:
        order = torch.from_numpy(random.permutation(count))
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def entropy(seed: int, site: str, round: int) -> int:
    """128 bits for what a site draws in a round without privacy; the same for the same plan."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{site}/{round}".encode()).digest()[:16], "big")


def _gradients(task: Task, model: nn.Module, parameters: list[Tensor], batch: Records) -> list[Tensor]:
    loss = task.loss(model(**batch.fields), batch.label).mean()
    return list(torch.autograd.grad(loss, parameters))


@lru_cache(maxsize=8)
def _working_model(task_name: str, options: str, device: str) -> nn.Module:
    model = TASKS[task_name].model(json.loads(options), seed=0)
    return model.to(device)


@lru_cache(maxsize=8)
def _working_shapes(task_name: str, options: str, device: str) -> Shapes:
    return Shapes.like(sent(_working_model(task_name, options, device), json.loads(options)))


def working_model(task: Task, options: Mapping[str, Any], device: torch.device) -> nn.Module:
    """One network per process to compute with, however many sites it serves; its parameters hold nothing of value."""
    return _working_model(task.name, json.dumps(dict(options), sort_keys=True), str(device))


def working_shapes(task: Task, options: Mapping[str, Any], device: torch.device) -> Shapes:
    """The shapes of what a round's model brings for `working_model`."""
    return _working_shapes(task.name, json.dumps(dict(options), sort_keys=True), str(device))
