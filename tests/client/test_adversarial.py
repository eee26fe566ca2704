"""Adversaries under privacy: one patient moves the critic by at most the clip norm, and the generator not at all."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from wardround.client.dp import SeededCoins, clipped_sum, preflight
from wardround.client.dp.engine import engine_of, headroom
from wardround.client.training import LEARNERS, plain_update, private_update
from wardround.common.errors import PlanRefused
from wardround.common.plan import LocalPlan, PrivacyPlan, StudyPlan
from wardround.common.synthesis import Adversaries, part
from wardround.common.tasks import TASKS, Records
from wardround.common.weights import Weights, trainable
from wardround.server.step import step

TASK = TASKS["image-synthesis"]
SMALL = {"z": 4, "width": 2, "critic_width": 4}
CLIP, RATE, DECLARED = 0.5, 0.5, 10


def films(count: int, seed: int = 0) -> Records:
    """Films of nobody; some patients have two."""
    random = torch.Generator().manual_seed(seed)
    image = torch.rand(count, 1, 28, 28, generator=random) * 2 - 1
    patient = torch.arange(count) - torch.arange(count).div(4, rounding_mode="floor")
    return Records({"image": image}, torch.randint(2, (count,), generator=random), patient)


@pytest.fixture(scope="module")
def model() -> Adversaries:
    return cast(Adversaries, TASK.model(SMALL, 3))


def update(
    model: Adversaries, records: Records, *, noise: float = 0.0, rate: float = 1.0, steps: int = 1, coins: int = 5
) -> Weights:
    return private_update(
        TASK, model, trainable(model), records,
        local=LocalPlan(steps=steps, learning_rate=0.2),
        privacy=PrivacyPlan(epsilon=8.0, clip_norm=CLIP, sampling_rate=rate, records_per_patient=2),
        noise_multiplier=noise, declared_patients=DECLARED, coins=SeededCoins(coins),
    )  # fmt: skip


def length(weights: Weights) -> float:
    return float(torch.stack([w.double().square().sum() for w in weights.values()]).sum().sqrt())


def apart(one: Weights, other: Weights) -> Weights:
    return {name: one[name].double() - other[name].double() for name in one}


def test_the_part_that_records_go_through_is_the_critic_in_one_pass(model: Adversaries):
    seen = TASK.private_part(model)
    assert seen is model.critic
    preflight(seen, TASK.loss, TASK.blank(1))
    assert engine_of(seen, TASK.loss, TASK.blank(1)).in_one_pass


def test_a_critic_that_mixes_patients_is_refused():
    broken = cast(Adversaries, TASK.model(SMALL, 0))
    broken.critic.layers = nn.Sequential(nn.BatchNorm2d(1), *broken.critic.layers)
    with pytest.raises(PlanRefused, match="BatchNorm2d"):
        preflight(TASK.private_part(broken), TASK.loss, TASK.blank(1))


def test_leaving_a_patient_out_moves_the_critic_by_at_most_the_clip_norm(model: Adversaries):
    """The whole update without its noise, so the made images are in it: their number must not follow the patients'."""
    records = films(9)
    whole = update(model, records)
    unit = DECLARED / (0.2 / 2)  # of an update in clip norms: half the rate, over the expected patients
    reached = 0.0
    for left_out in range(records.patients):
        rest = update(model, records.of_patients(torch.arange(records.patients) != left_out))
        moved = apart(whole, rest)
        by = unit * length(part(moved, "critic"))
        assert by <= CLIP * (1 + 1e-3)  # an update is float32
        assert length(part(moved, "generator")) == 0
        reached = max(reached, by)
    assert reached >= CLIP * (1 - 2 * headroom(torch.float32) - 1e-3), "nobody was clipped, so nothing was tested"


def test_what_the_critic_learns_of_patients_is_their_clipped_sum(model: Adversaries):
    records = films(9)
    critic = trainable(model.critic)
    total = clipped_sum(model.critic, TASK.loss, critic, records, clip_norm=CLIP, records_per_patient=2)
    nobody = films(0)
    found = part(apart(update(model, records), update(model, nobody)), "critic")
    for name, by in total.items():
        torch.testing.assert_close(found[name].float(), by.float() * -(0.2 / 2) / DECLARED, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_generator_moves_the_same_whoever_the_patients_are(model: Adversaries, steps: int):
    one, other, nobody = (
        part(update(model, records, noise=1.0, rate=RATE, steps=steps), "generator")
        for records in (films(9), films(5, seed=1), films(0))
    )
    assert length(one) > 0
    for name in one:
        assert torch.equal(one[name], other[name])
        assert torch.equal(one[name], nobody[name])


def test_no_graph_leads_from_an_update_back_to_a_patient(model: Adversaries):
    records = films(9)
    records.fields["image"].requires_grad_()
    moved = update(model, records, noise=1.0)
    assert moved.keys() == trainable(model).keys()
    assert not any(tensor.requires_grad for tensor in moved.values())


def test_made_images_reach_the_critic_where_no_patient_was_drawn(model: Adversaries):
    assert length(part(update(model, films(0)), "critic")) > 0
    drawn_by_nobody = update(model, films(9), noise=1.0, rate=1e-9)  # an empty Poisson batch
    assert all(tensor.isfinite().all() for tensor in drawn_by_nobody.values())


def test_every_tensor_of_the_critic_is_noised_and_none_of_the_generator(model: Adversaries):
    records = films(9)
    noise = apart(update(model, records, noise=2.0), update(model, records))
    deviation = 2.0 * CLIP * (0.2 / 2) / DECLARED
    for name, tensor in part(noise, "critic").items():
        if tensor.numel() >= 64:
            assert float(tensor.std()) == pytest.approx(deviation, rel=0.35), name
        assert tensor.abs().min() > 0, name
    assert length(part(noise, "generator")) == 0


def test_without_privacy_a_round_follows_from_the_plans_seed(model: Adversaries):
    def of(site: str, round: int) -> Weights:
        return plain_update(TASK, model, weights, films(9), local=LocalPlan(), seed=1, site=site, round=round)

    weights = {name: w.clone() for name, w in trainable(cast(Adversaries, TASK.model(SMALL, 4))).items()}
    one, again = of("north", 1), of("north", 1)
    assert one.keys() == weights.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)
    for other in (of("south", 1), of("north", 2)):
        assert length(part(apart(one, other), "generator")) > 0


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "yogi"])
def test_every_server_rule_moves_critic_and_generator(rule: str, model: Adversaries):
    plan = StudyPlan.parse(
        f'name = "s"\ntask = "image-synthesis"\nrounds = 9\nmin_sites = 1\nsites.a = 10\nstep.rule = "{rule}"'
    )
    before = trainable(model)
    after, _ = step(before, update(model, films(9), noise=1.0), {}, plan, 1)
    for name in ("critic", "generator"):
        moved: list[Tensor] = [(after[key] - before[key]).abs().max() for key in before if key.startswith(name)]
        assert all(m > 0 for m in moved), name


def test_every_task_names_a_learner_there_is():
    assert {task.learner for task in TASKS.values()} <= LEARNERS.keys()
