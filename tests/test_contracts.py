"""What every registered thing must keep, tested the moment it is listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord

from wardround.client.dp import SeededCoins, clipped_sum, draw, proof, refuse_coupled
from wardround.client.dp.sizes import Sizes
from wardround.common.errors import ConfigError
from wardround.common.explain import sentences
from wardround.common.metrics import METRICS, Scores
from wardround.common.plan import SignedText, StudyPlan
from wardround.common.tasks import TASKS, Records, Task
from wardround.common.weights import Shapes, pack, trainable, unpack
from wardround.server.step import RULES, step
from wardround.simulations import SITES, STUDIES
from wardround.simulations.cohorts import COHORTS

TASK_NAMES = sorted(TASKS)


def made_up(task: Task, count: int = 6) -> Records:
    """Records of the task's shape, without meaning; each is a patient."""
    return proof.made_up(task.blank(1), torch.arange(count))


@pytest.fixture(params=TASK_NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


def test_forward_takes_the_fields_and_gives_one_row_of_logits_per_record(task: Task):
    records = made_up(task)
    logits = task.model({}, seed=0)(**records.fields)
    assert len(logits) == 6
    assert task.loss(logits, records.label).shape == (6,)


def test_a_plan_cannot_choose_what_follows_from_the_data(task: Task):
    with pytest.raises(ConfigError, match="classes: follows from the task's data"):
        task.model({"classes": 5}, seed=0)


def test_a_size_is_counted_as_it_would_be_built(task: Task):
    assert task.size({}) == Shapes.like(trainable(task.model({}, seed=0))).count


def test_the_first_model_follows_from_the_seed_alone(task: Task):
    torch.manual_seed(1)
    one = trainable(task.model({}, seed=5))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    two, other = trainable(task.model({}, seed=5)), trainable(task.model({}, seed=6))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_model_survives_the_wire(task: Task):
    weights = trainable(task.model({}, seed=0))
    wired = ArrayRecord()
    for name, array in pack(weights).items():
        wired[name] = type(array).__mro__[1](array.dtype, array.shape, array.stype, array.data)
    found = unpack(wired, Shapes.like(weights))
    assert all(torch.equal(weights[name], found[name]) for name in weights)


def test_nothing_in_a_model_couples_records(task: Task):
    model, records = task.model({}, seed=0), made_up(task)
    refuse_coupled(model)
    alone = torch.cat([model(**{k: v[i : i + 1] for k, v in records.fields.items()}) for i in range(len(records))])
    torch.testing.assert_close(model(**records.fields), alone, rtol=1e-4, atol=1e-5)


def test_one_private_step_without_noise_lowers_the_loss(task: Task, monkeypatch: pytest.MonkeyPatch):
    # which sizes of a piece give the same bits takes long to prove, and is proved where shipped networks go in one pass
    monkeypatch.setattr(Sizes, "of", lambda *_: Sizes((6,), lambda _: True))
    model, records = task.model({}, seed=0), made_up(task)
    weights = trainable(model)
    everyone = draw(records.patient, rate=1.0, at_most=1, coins=SeededCoins(0))
    total = clipped_sum(model, task.loss, weights, records.take(everyone), clip_norm=1.0)
    moved = {name: w - 1e-3 * total[name].float() for name, w in weights.items()}

    def loss(at: dict[str, torch.Tensor]) -> float:
        logits = torch.func.functional_call(model, at, args=(), kwargs=dict(records.fields))
        return float(task.loss(logits, records.label).sum())

    assert loss(moved) < loss(weights)


def test_scores_are_sound_in_record_order_and_of_the_kind_the_metrics_are_of(task: Task):
    model, records = task.model({}, seed=0), made_up(task, 4)
    found = task.scores(model, trainable(model), records)
    assert found.sound
    assert METRICS.keys() >= {task.headline, *task.metrics}
    if isinstance(found, Scores) and task.schema.classes:
        assert found.label.tolist() == records.label.tolist()
    assert all(METRICS[name].kind is type(found) for name in task.metrics)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_step_follows_a_constant_update(rule: str):
    plan = StudyPlan.parse(f'name = "s"\ntask = "heart-disease"\nrounds = 9\nmin_sites = 1\nsites.a = 10\nstep.rule = "{rule}"')
    weights, state = {"w": torch.zeros(3)}, {}
    for number in range(1, 4):
        weights, state = step(weights, {"w": torch.tensor([1.0, -1.0, 0.0])}, state, plan, number)
    assert weights["w"][0] > 0 > weights["w"][1]
    assert weights["w"][2] == 0


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_study_can_be_explained_and_has_all_its_sites(path: Path):
    study = SignedText.load(path)
    assert any("What leaves a hospital" in line for line in sentences(study))
    assert study.plan.task in COHORTS or all((SITES / f"{site}.toml").is_file() for site in study.plan.sites)
