"""The simulation benchmark compares like with like: the loop it measures against does the same maths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.plain_private import PlainDPSGD
from benchmarks.simulation import AGREEMENT_NOISED, TARGETS, Row, difference, misses
from benchmarks.workloads import WORKLOADS, prepare
from wardround.client.dp import OsCoins, clipped_sum
from wardround.client.dp.engine import headroom
from wardround.client.policy import SiteConfig
from wardround.client.training.supervised import private_update
from wardround.common.plan import SignedText
from wardround.common.privacy import filtered, spent
from wardround.common.tasks import TASKS, Records
from wardround.common.weights import Weights, trainable

TASK = TASKS["chest-xray"]
SLACK = 1 - headroom(torch.float32)  # the part of the clip norm that wardround uses


def films(count: int) -> Records:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(count, 1, 28, 28, generator=generator)
    return Records({"image": image}, torch.randint(2, (count,), generator=generator), torch.arange(count))


def flat(tensors: Weights) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.mark.parametrize("count", [1, 29])
@pytest.mark.parametrize("clip_norm", [0.1, 2.0, 100.0])
def test_the_loop_by_hand_and_wardround_find_the_same_clipped_sum(count: int, clip_norm: float):
    batch, model = films(count), TASK.model({}, 7)
    ours = flat(clipped_sum(model, TASK.loss, trainable(model), batch, clip_norm=clip_norm, records_per_patient=1))
    by_hand = PlainDPSGD(TASK.model({}, 7), TASK.loss).clipped_sum(batch.fields["image"], batch.label, SLACK * clip_norm)
    assert (ours - by_hand).norm() < 1e-4 * by_hand.norm()
    assert (ours - by_hand).abs().max() < 1e-4


def test_without_noise_both_loops_end_with_the_same_model():
    work = WORKLOADS["W3"]
    plan = SignedText.received(work.plan({"one": 20, "two": 20})).plan
    privacy = plan.private().model_copy(update={"sampling_rate": 1.0})
    records, model = films(20), TASK.model({}, 7)
    update = private_update(
        TASK, model, trainable(model), records, local=plan.local, privacy=privacy, noise_multiplier=0.0,
        declared_patients=20, coins=OsCoins(),
    )  # fmt: skip
    sgd = PlainDPSGD(TASK.model({}, 7), TASK.loss)
    start = sgd.parameters.clone()
    for _ in range(plan.local.steps):
        sgd.clipped_sum(records.fields["image"], records.label, SLACK * privacy.clip_norm)
        sgd.step(deviation=0.0, rate=plan.local.learning_rate / 20)
    assert (flat(update) - (sgd.parameters - start)).abs().max() < 1e-5


def test_the_noise_of_the_loop_by_hand_has_the_deviation_that_is_asked_for():
    sgd = PlainDPSGD(TASK.model({}, 7), TASK.loss)
    start = sgd.parameters.clone()
    sgd.clipped_sum(films(0).fields["image"], films(0).label, 1.0)
    sgd.step(deviation=2.0, rate=0.5)
    assert (sgd.parameters - start).square().mean().sqrt() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_site_admits_the_study_it_is_timed_with(name: str, tmp_path: Path):
    prepare(replace(WORKLOADS[name], sites=3), tmp_path)
    plan = SignedText.load(tmp_path / "plan.toml").plan
    for site in plan.sites:
        config = SiteConfig.load(tmp_path / "sites" / site / "site.toml")
        config.allow.admit(plan, site, config.data[plan.task].declared_patients)
        if plan.privacy is not None:
            steps = [plan.noised_steps(plan.noise_multiplier())]
            assert spent(steps, plan.privacy.delta) <= plan.privacy.epsilon
            assert filtered(steps, config.allow.delta) <= (config.allow.epsilon_lifetime or 0)


def test_a_model_that_went_too_far_is_told_apart_although_no_two_noises_are_equal():
    start = trainable(TASK.model({}, 7))
    one, other, louder = ({n: w + scale * torch.randn_like(w) for n, w in start.items()} for scale in (0.1, 0.1, 0.105))
    assert difference(WORKLOADS["W3"], one, other) < AGREEMENT_NOISED
    assert difference(WORKLOADS["W3"], louder, other) > AGREEMENT_NOISED
    assert difference(WORKLOADS["W1"], one, other) > 0.1


def test_every_target_that_is_missed_is_said():
    ratio, _, memory = TARGETS["W3"]
    plain = Row("W3", "plain", 0.4, 1.0, 1.0, 1.0, 1.0, 0, 0.0, 0.0, 0.9, None)
    good = replace(plain, who="1", ratio=ratio, target=ratio, peak=int(1e9 * memory))
    assert misses([plain, good]) == []
    for worse in ({"ratio": 2.0}, {"first": 9.0}, {"peak": 2 * good.peak}, {"difference": 0.1}, {"auc": 0.8}):
        (line,) = misses([plain, replace(good, **worse)])
        assert line.startswith("W3, wardround, 1 process: ")
