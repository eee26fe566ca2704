"""From a study file to a report: what is claimed is what was done."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tomli_w
from dp_accounting.pld import privacy_loss_distribution as pld

from tests.conftest import repeatable_coins
from wardround.client.data import load, open_records
from wardround.client.policy import DataSource, SiteConfig
from wardround.common.cli import main
from wardround.common.errors import ConfigError, StudyStopped
from wardround.common.metrics import METRICS
from wardround.common.tasks import Task
from wardround.server.report import Report
from wardround.simulations.command import Request, run
from wardround.simulations.held_out import HeldOut
from wardround.simulations.run import simulate
from wardround.simulations.scenario import Changes, Scenario

Prepare = Callable[..., Scenario]


def independent_epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    one = pld.from_gaussian_mechanism(sigma, sampling_prob=rate, value_discretization_interval=1e-4)
    return float(one.self_compose(steps).get_epsilon_for_delta(delta))


def test_a_report_holds_what_it_promises(scenario: Prepare):
    study = scenario(rounds=4)
    report = simulate(study)
    written = json.loads((study.folder / "report.json").read_text())
    assert Report.model_validate(written) == report
    assert set(written) == set(
        "schema study outcome headline results privacy rounds sites seeds seconds versions notes sheet validation class_counts".split()  # noqa: SIM905, E501
    )
    assert written["study"]["plan"] == study.study.text == (study.folder / "plan.toml").read_text()
    assert written["outcome"] == {"status": "completed", "reason": "", "rounds_done": 4}
    sites = list(study.sites)
    for part in (written["privacy"], written["results"]["local"], written["results"]["by_site"], written["sites"]):
        assert list(part) == sites
    assert [record["round"] for record in written["rounds"]] == [1, 2, 3, 4]
    assert all(record["sites"] == sites for record in written["rounds"])
    assert sum(facts["test_patients"] for facts in written["sites"].values()) == 309
    for figures in (written["results"]["federated"], written["results"]["pooled"]):
        assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures.values())
    for word in ("NaN", "Infinity"):
        assert word not in (study.folder / "report.json").read_text()
    assert (study.folder / "report.html").stat().st_size > 10_000


def test_the_figures_are_those_of_the_released_model(scenario: Prepare):
    study = scenario(rounds=4)
    report = simulate(study, baselines=False)
    weights = safetensors.torch.load_file(study.folder / "model.safetensors")
    tests = HeldOut.open(study)
    found = tests.task.scores(tests.model, weights, tests.together)
    assert set(report.results.federated) == set(tests.task.metrics)
    for name, figure in report.results.federated.items():
        assert figure.value == METRICS[name](found)
    for site, records in tests.of_site.items():
        alone = tests.task.scores(tests.model, weights, records)
        for name, figure in report.results.by_site[site].federated.items():
            assert figure.value == pytest.approx(METRICS[name](alone), abs=1e-6)


def test_the_epsilon_printed_is_the_one_that_holds(scenario: Prepare):
    study = scenario(rounds=5, epsilon=2.0)
    for site in simulate(study, baselines=False).privacy.values():
        exact = independent_epsilon(site.noise_multiplier, site.sampling_rate, 5, site.delta)
        assert site.steps == site.steps_planned == 5
        assert site.epsilon == pytest.approx(exact, rel=5e-3)
        assert exact <= site.epsilon <= site.planned <= 2.0
        assert site.epsilon > 1.9
        assert site.epsilon_replace_one > 1.5 * site.epsilon
        assert site.lifetime_charged >= site.epsilon  # the filter is the stricter one


def test_without_privacy_nothing_is_promised_and_nothing_is_random(scenario: Prepare):
    one, two = (scenario(name, rounds=4, without_privacy=True) for name in ("one", "two"))
    assert simulate(one, baselines=False).privacy == {}
    simulate(two, baselines=False)
    assert (one.folder / "model.safetensors").read_bytes() == (two.folder / "model.safetensors").read_bytes()
    assert not list(one.folder.glob("sites/*/state/*"))  # no ledger is needed


def test_with_privacy_the_same_seed_never_gives_the_same_model(scenario: Prepare):
    one, two = (scenario(name, rounds=2) for name in ("one", "two"))
    for study in (one, two):
        simulate(study, baselines=False)
    assert (one.folder / "model.safetensors").read_bytes() != (two.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.3", "size:1.0"])
def test_patients_can_be_shared_out_over_other_sites(scenario: Prepare, partition: str):
    study = scenario(rounds=2, sites=7, partition=partition)
    report = simulate(study, baselines=False)
    assert list(report.sites) == [f"site-{number}" for number in range(1, 8)]
    assert sum(len(load(study.source(site), study.task).records) for site in study.sites) == 920
    assert report.rounds[-1].sites == tuple(report.sites)
    for site, config in ((site, SiteConfig.load(path)) for site, path in study.sites.items()):
        assert config.data["heart-disease"].declared_patients == study.study.plan.sites[site]


def test_every_patient_is_in_one_place_with_training_and_test_apart(scenario: Prepare):
    study = scenario(sites=5, partition="dirichlet:0.5", rounds=1)
    dealt = [row for site in study.sites for row in rows(study.source(site), study.task)]
    original = [
        row for site in ("cleveland", "hungarian", "switzerland", "va")
        for row in rows(SiteConfig.load(study_site(site)).data["heart-disease"], study.task)
    ]  # fmt: skip
    assert len(dealt) == 920
    assert sorted(dealt) == sorted(original)
    for site in study.sites:
        training, held_out = (
            set(map(tuple, part.fields["table"].tolist())) for part in open_records(study.source(site), study.task)
        )
        assert not training & held_out


def rows(source: DataSource, task: Task) -> list[tuple[float, ...]]:
    records = load(source, task).records
    return [(*row, label) for row, label in zip(records.fields["table"].tolist(), records.label.tolist(), strict=True)]


def study_site(site: str) -> Path:
    from wardround.simulations import SITES

    return SITES / f"{site}.toml"


def test_several_seeds_are_several_runs_and_one_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(Request("heart-disease", rounds=2, without_privacy=True, seeds=3, baselines=False, out=tmp_path, json=True))
    table = json.loads(capsys.readouterr().out)
    assert table["seeds"]["values"] == [7, 8, 9]
    spread = table["seeds"]["federated"]["auroc"]
    alone = [
        json.loads(path.read_text())["results"]["federated"]["auroc"]["value"]
        for path in sorted(tmp_path.glob("heart-disease/seeds/*/report.json"))
    ]
    assert spread["values"][1:] == alone
    assert len(set(spread["values"])) == 3
    assert spread["mean"] == pytest.approx(np.mean(spread["values"]))
    assert spread["sd"] == pytest.approx(np.std(spread["values"], ddof=1))


def test_hospitals_that_refuse_end_the_study_with_every_reason_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["simulate", "heart-disease", "--epsilon", "20", "--rounds", "3", "--out", str(tmp_path), "-q"]
    monkeypatch.setattr(sys, "argv", ["wardround", *words])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 1
    err = capsys.readouterr().err
    report = json.loads((tmp_path / "heart-disease" / "report.json").read_text())
    assert report["outcome"]["status"] == "stopped"
    assert report["outcome"]["rounds_done"] == 0
    for site in ("cleveland", "hungarian", "switzerland", "va"):
        said = f"{site} does not take part: epsilon 20 is more than the"
        assert said in err
        assert said in report["outcome"]["reason"]
    assert all(site["steps"] == 0 and site["epsilon"] == 0 for site in report["privacy"].values())
    assert not (tmp_path / "heart-disease" / "model.safetensors").exists()


def test_a_study_that_stops_half_way_reports_what_was_done_and_spent(scenario: Prepare, monkeypatch: pytest.MonkeyPatch):
    from wardround.client.hospital import Hospital

    study, train = scenario(rounds=10), Hospital.train

    def failing(self: Hospital, signed: object, order: object, weights: object) -> object:
        found = train(self, signed, order, weights)  # type: ignore[arg-type]
        if order.round > 2 and self.config.site != "va":  # type: ignore[attr-defined]
            raise OSError("the answer is lost after the round was paid for")
        return found

    monkeypatch.setattr(Hospital, "train", failing)
    with pytest.raises(StudyStopped, match="3 rounds in a row had fewer than 3 sites"):
        simulate(study, coins_for=repeatable_coins)
    report = Report.model_validate_json((study.folder / "report.json").read_text())
    assert report.outcome.status == "stopped"
    assert report.outcome.rounds_done == 5
    assert "internal error, see the site's log, ref" in report.outcome.reason
    assert "paid for" not in report.outcome.reason  # another library's words stay at the site
    assert [record.lost for record in report.rounds] == [False, False, True, True, True]
    assert {site: facts.steps for site, facts in report.privacy.items()} == dict.fromkeys(study.sites, 5)
    assert all(0 < facts.epsilon < facts.planned for facts in report.privacy.values())


def test_nothing_is_left_behind_when_a_study_does_not_hold(tmp_path: Path, study_file: Path):
    table = study_file.read_text().replace("va = 130", "nowhere = 130")
    (tmp_path / "study.toml").write_text(table)
    with pytest.raises(ConfigError, match=r"no file nowhere\.toml for site nowhere"):
        Scenario.prepare(tmp_path / "study.toml", tmp_path / "run", Changes())
    assert not (tmp_path / "run").exists()


def test_a_site_file_of_another_site_is_refused(tmp_path: Path, study_file: Path):
    (tmp_path / "study.toml").write_text(study_file.read_text())
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "va.toml").write_text(tomli_w.dumps({"site": "cork"}))
    with pytest.raises(ConfigError, match="site is 'cork', wanted 'va'"):
        Scenario.prepare(tmp_path / "study.toml", tmp_path / "run", Changes())


def test_the_plan_of_an_unchanged_study_keeps_its_bytes(scenario: Prepare, study_file: Path):
    assert (scenario().folder / "plan.toml").read_bytes() == study_file.read_bytes()
    assert Scenario.reopen(scenario("again").folder).study.digest == scenario("third").study.digest


# ---- is it any use

WANTED = {None: (0.885, 0.80), 8.0: (0.88, 0.80), 3.0: (0.875, 0.795), 1.0: (0.855, 0.775)}


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", WANTED)
def test_the_shipped_study_learns_at_every_budget(tmp_path: Path, study_file: Path, epsilon: float | None):
    found, pooled = [], []
    for seed in range(7, 12):
        changes = Changes(epsilon=epsilon, without_privacy=epsilon is None, seed=seed)
        report = simulate(Scenario.prepare(study_file, tmp_path / str(seed), changes), baselines=epsilon is None)
        found.append([report.results.federated[name].value for name in ("auroc", "accuracy")])
        if epsilon is None:
            pooled.append(report.results.pooled["auroc"].value)
    auroc, accuracy = np.mean(found, axis=0)
    assert (auroc, accuracy) >= WANTED[epsilon]
    assert accuracy >= WANTED[epsilon][1]
    if pooled:
        assert abs(auroc - np.mean(pooled)) < 0.01
