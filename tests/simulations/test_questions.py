"""Counted classes and private looks from a plan to its report: what they are good for, and what they cost."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import tomli_w
import torch

from tests.conftest import repeatable_coins
from wardround.client.data import open_parted, open_records
from wardround.client.ledger import PrivacyLedger
from wardround.client.statement import statement
from wardround.common.privacy import filtered
from wardround.common.tasks import Records
from wardround.common.weights import Weights
from wardround.server.checkpoint import Progress
from wardround.server.report import Report, promises, story, to_html
from wardround.simulations.run import simulate
from wardround.simulations.scenario import Changes, Scenario


@pytest.fixture
def asking(tmp_path: Path, study_file: Path) -> Callable[..., Scenario]:
    """The shipped study under privacy; sections by name, None to leave one out."""

    def prepare(name: str = "run", **sections: object) -> Scenario:
        table = tomllib.loads(study_file.read_text()) | {"rounds": 8, "step": {"rule": "sgd"}}
        for key, value in sections.items():
            table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
        table = {key: value for key, value in table.items() if value is not None}
        path = tmp_path / f"{name}.toml"
        path.write_text(tomli_w.dumps(table))
        return Scenario.prepare(path, tmp_path / name, Changes())

    return prepare


def ledger_of(scenario: Scenario, site: str) -> PrivacyLedger:
    return PrivacyLedger(scenario.sites[site].parent / "state" / "ledger.sqlite")


def test_a_private_study_that_counts_and_looks_says_what_each_side_paid(asking: Callable[..., Scenario]):
    scenario = asking(loss={"class_weights": "counted"}, validation={"share": 0.4, "every": 3})
    report = simulate(scenario, baselines=False)
    plan = scenario.study.plan
    assert Report.model_validate_json((scenario.folder / "report.json").read_text()) == report
    va = report.privacy["va"]
    with ledger_of(scenario, "va") as ledger:
        (account,) = ledger.accounts()
    assert account.settled
    assert account.spent == plan.cost()
    assert va.epsilon == account.spent.epsilon(1e-5) == max(va.epsilon_training, va.epsilon_aside)
    assert 2.9 < va.epsilon <= 3.0
    assert va.epsilon_replace_one == account.spent.epsilon(1e-5, "replace-one")
    assert va.lifetime_charged == filtered([account.charged], 1e-5)
    assert (va.looks, va.looks_planned, va.steps) == (3, 3, 8)
    assert report.validation is not None
    assert (report.validation.metric, report.validation.cap, report.validation.looks) == ("clipped_loss", 2.0, 3)
    assert report.rounds[-1].epsilon["va"] == pytest.approx(va.epsilon)
    text = " ".join(story.summary(report))
    assert "each with noise of standard deviation 20." in text
    assert "Each of these figures carries noise" in text
    assert "nobody is both, so the larger of the two is the study's" in text
    left = " ".join(promises.what_left(report))
    assert "how many training patients are of each class, with Gaussian noise of standard deviation 10 in each" in left
    assert "two sums over the patients set aside" in left
    assert "exact and without noise" not in left
    assert "Beyond the sums named here" in to_html(report)
    told = statement(scenario.sites["va"])["studies"][0]
    assert (told["counted_classes"], told["looks"], told["looks_reserved"]) == (True, 3, 3)
    assert told["epsilon"] == va.epsilon


def test_a_study_that_looks_may_end_claims_the_cost_of_the_whole_plan(asking: Callable[..., Scenario]):
    scenario = asking(
        rounds=30, validation={"share": 0.4, "every": 2, "patience": 1}, step={"rule": "sgd", "learning_rate": 1e-9}
    )
    report = simulate(scenario, baselines=False, coins_for=repeatable_coins)
    assert report.outcome.status == "completed early"
    va = report.privacy["va"]
    assert va.steps < 30
    assert va.epsilon == va.planned == scenario.study.plan.cost().epsilon(1e-5)
    assert statement(scenario.sites["va"])["studies"][0]["epsilon"] == va.epsilon
    with ledger_of(scenario, "va") as ledger:  # while the budget gets back what was never released
        (account,) = ledger.accounts()
    assert filtered([account.charged], 1e-5) < filtered([scenario.study.plan.cost()], 1e-5)
    assert va.lifetime_charged == filtered([account.charged], 1e-5)


def test_several_processes_count_and_look_as_one_does(asking: Callable[..., Scenario]):
    found = []
    for name, processes in (("one", 1), ("three", 3)):
        scenario = asking(name, loss={"class_shares": "counted"}, validation={"share": 0.4, "every": 3})
        simulate(scenario, baselines=False, processes=processes, coins_for=repeatable_coins)
        last = Progress.latest(scenario.folder / "checkpoints", study=scenario.study.digest)
        assert last is not None
        found.append((last.counted, [record.validation for record in last.history]))
    assert found[0] == found[1]
    assert found[0][0] is not None


def mean_loss(scenario: Scenario, weights: Weights, records: Records) -> float:
    model = scenario.task.model(scenario.study.plan.model, 0)
    with torch.no_grad():
        logits = torch.func.functional_call(model, dict(weights), args=(), kwargs=dict(records.fields))
        return float(scenario.task.loss(logits, records.label).mean())


def everybody(scenario: Scenario, part: int) -> Records:
    parts = [open_records(scenario.source(site), scenario.task)[part] for site in scenario.sites]
    return parts[0] + parts[1] + parts[2] + parts[3]


def test_a_private_look_finds_a_better_model_than_that_of_the_last_round(asking: Callable[..., Scenario]):
    scenario = asking(
        rounds=20,
        validation={"share": 0.4, "every": 4, "cap": 3.0},
        step={"rule": "momentum", "learning_rate": 25.0},  # the noise adds up, and the model gets worse
    )
    report = simulate(scenario, baselines=False, coins_for=repeatable_coins)
    last = Progress.latest(scenario.folder / "checkpoints", study=scenario.study.digest)
    assert last is not None
    assert report.validation is not None
    assert report.validation.best_round < 20
    handed_out = safetensors.torch.load_file(scenario.folder / "model.safetensors")
    test = everybody(scenario, 1)
    assert mean_loss(scenario, handed_out, test) < mean_loss(scenario, last.weights, test) - 0.5
    # and what a look says is near the truth of the patients set aside, clipped
    values = {record.round: record.validation for record in last.history if record.validation is not None}
    assert values[report.validation.best_round] == min(values.values()) == report.validation.best


def rare(scenario: Scenario) -> None:
    """Give every hospital a file in which few are ill."""
    for site, file in scenario.sites.items():
        source = scenario.source(site)
        lines = source.path.read_text().splitlines()
        ill = [line for line in lines if line.rsplit(",", 1)[1].strip() != "0"]
        well = [line for line in lines if line.rsplit(",", 1)[1].strip() == "0"]
        skewed = file.parent / "skewed.data"
        skewed.write_text("\n".join(well + ill[::8]) + "\n")
        text = file.read_text()
        assert str(source.path) in text
        file.write_text(text.replace(str(source.path), str(skewed)))


def balanced_accuracy(scenario: Scenario) -> float:
    weights = safetensors.torch.load_file(scenario.folder / "model.safetensors")
    model, test = scenario.task.model(scenario.study.plan.model, 0), everybody(scenario, 1)
    with torch.no_grad():
        said = torch.func.functional_call(model, dict(weights), args=(), kwargs=dict(test.fields)).argmax(1)
    return float(torch.stack([(said[test.label == label] == label).float().mean() for label in (0, 1)]).mean())


SGD = {"rule": "sgd", "learning_rate": 4.0, "average_last": 0.5}


@pytest.mark.parametrize(("privacy", "key", "step"), [
    (None, "class_weights", {"rule": "momentum", "learning_rate": 0.3}),
    ({"epsilon": 8.0}, "class_shares", SGD),  # clipping would cut what weights add
], ids=["exact", "noised"])  # fmt: skip
def test_counted_classes_find_the_few_who_are_ill(asking: Callable[..., Scenario], privacy: object, key: str, step: object):
    found = {}
    for name, loss in (("counted", {key: "counted"}), ("plain", {})):
        scenario = asking(name, rounds=40, loss=loss, privacy=privacy, step=step)
        rare(scenario)
        simulate(scenario, baselines=False, coins_for=repeatable_coins)
        found[name] = balanced_accuracy(scenario)
    assert found["counted"] > found["plain"] + 0.05


def test_models_for_comparison_weigh_classes_by_their_own_counts(asking: Callable[..., Scenario]):
    scenario = asking(rounds=2, loss={"class_weights": "counted"}, validation={"share": 0.4, "every": 1})
    report = simulate(scenario)
    assert report.class_counts is not None
    assert set(report.results.local) == set(scenario.sites)
    kept = [open_parted(scenario.source(site), scenario.task, 0.4)[0] for site in scenario.sites]
    assert sum(part.patients for part in kept) < sum(scenario.study.plan.sites.values())
