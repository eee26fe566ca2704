"""A network of which a part learns: the other part has no gradient, adds nothing to a patient's length, and gets no noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wardround.client.dp import SeededCoins, clipped_sum, preflight
from wardround.client.dp.engine import engine_of
from wardround.client.training import private_update
from wardround.common.plan import LocalPlan, PrivacyPlan
from wardround.common.tasks import TASKS, Records
from wardround.common.weights import trainable

TASK = TASKS["chest-xray"]
TRAIN = pytest.mark.parametrize("train", ["head", "last-block"])


def films(count: int = 9) -> Records:
    image = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    return Records({"image": image}, torch.arange(count) % 2, torch.arange(count) // 2)


def options(train: str) -> dict[str, object]:
    return {"network": "ws-cnn", "width": 4, "train": train}


@TRAIN
def test_each_patients_share_is_clipped_over_what_learns_alone(train: str):
    model, records, clip_norm = TASK.model(options(train), seed=3), films(), 0.05
    weights = trainable(model)
    assert engine_of(model, TASK.loss, records).in_one_pass
    found = clipped_sum(model, TASK.loss, weights, records, clip_norm=clip_norm, records_per_patient=2)
    learning: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    wanted = [torch.zeros_like(p) for p in learning]
    for patient in range(records.patients):
        mine = records.take(torch.nonzero(records.patient == patient).squeeze(1))
        loss = TASK.loss(model(**mine.fields), mine.label).mean()
        mean = torch.autograd.grad(loss, learning)
        length = torch.sqrt(sum((g.square().sum() for g in mean), torch.zeros(())))
        assert length > clip_norm  # so that the norm decides
        for total, g in zip(wanted, mean, strict=True):
            total += g * clip_norm / length
    assert found.keys() == weights.keys()
    for tensor, expected in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(tensor.float(), expected, rtol=2e-3, atol=1e-6)


@TRAIN
def test_an_update_holds_what_learns_noised_and_leaves_the_rest_as_it_was(train: str):
    model, records = TASK.model(options(train), seed=3), films()
    preflight(model, TASK.loss, TASK.blank(1))
    weights = trainable(model)
    fixed = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed
    update = private_update(
        TASK, model, weights, records, local=LocalPlan(learning_rate=1.0),
        privacy=PrivacyPlan(epsilon=1.0, sampling_rate=1.0, clip_norm=1.0, records_per_patient=2), noise_multiplier=1000.0,
        declared_patients=5, coins=SeededCoins(1),
    )  # fmt: skip
    assert update.keys() == weights.keys()
    noise = torch.cat([tensor.flatten() for tensor in update.values()])
    assert bool((noise.abs() > 1e-3).all())  # every number: its deviation is 200
    assert 150 < float(noise.std()) < 250
    held = dict(model.named_parameters())
    assert all(torch.equal(held[name], tensor) for name, tensor in fixed.items())


def test_what_is_frozen_counts_for_the_size_that_a_site_allows():
    assert TASK.size(options("head")) == TASK.size(options("all")) > 1000
