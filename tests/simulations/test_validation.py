"""Looks decide the same over one process, several, and after a kill; and the report says what they decided."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from wardround.client.data import open_parted
from wardround.common.tasks import Records
from wardround.common.vault import Vault
from wardround.server.checkpoint import Progress
from wardround.server.report import Report, promises, story, to_html
from wardround.simulations import run as run_module
from wardround.simulations.run import simulate
from wardround.simulations.scenario import Changes, Scenario

ROUNDS = 12


class Killed(BaseException):
    """What no `except Exception` survives."""


@pytest.fixture
def looked_at(tmp_path: Path, study_file: Path) -> Callable[..., Scenario]:
    """The shipped study with looks, its steps so large that a middle round is the best."""

    def prepare(name: str = "run", **keys: object) -> Scenario:
        table = tomllib.loads(study_file.read_text())
        table |= {"rounds": ROUNDS, "step": {"rule": "sgd", "learning_rate": 2.0}}
        table |= {"validation": {"share": 0.4, "every": 1, "metric": "log_loss", "patience": 3, **keys}}
        table.pop("privacy")
        path = tmp_path / f"{name}.toml"
        path.write_text(tomli_w.dumps(table))
        return Scenario.prepare(path, tmp_path / name, Changes())

    return prepare


def decided(scenario: Scenario) -> tuple[bytes, list[float | None]]:
    found = Progress.latest(scenario.folder / "checkpoints", study=scenario.study.digest)
    assert found is not None
    return (scenario.folder / "model.safetensors").read_bytes(), [record.validation for record in found.history]


def test_several_processes_decide_what_one_decides(looked_at: Callable[..., Scenario]):
    one, three = looked_at("one"), looked_at("three")
    simulate(one, baselines=False)
    simulate(three, baselines=False, processes=3)
    assert decided(one) == decided(three)
    assert None not in decided(one)[1]


@pytest.mark.parametrize("every", [1, 5])
def test_a_kill_at_any_checkpoint_changes_no_decision(
    looked_at: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch, every: int
):
    whole, torn = looked_at("whole"), looked_at("torn")
    outcome = simulate(whole, baselines=False).outcome
    assert (outcome.status, 5 < outcome.rounds_done < ROUNDS) == ("completed early", True)
    save, killed = Progress.save, set()

    def deadly(self: Progress, folder: Path, vault: Vault) -> None:
        if self.round not in killed:  # once before each checkpoint is written
            killed.add(self.round)
            raise Killed
        save(self, folder, vault)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "save", deadly)
        for _ in range(3 * ROUNDS):
            try:
                report = simulate(Scenario.reopen(torn.folder), baselines=False, every=every)
                break
            except Killed:
                continue
    assert len(killed) >= 3
    assert report.outcome == outcome
    assert decided(torn) == decided(whole)
    again = simulate(Scenario.reopen(torn.folder), baselines=False)
    assert again.outcome == outcome
    assert decided(torn) == decided(whole)


def test_the_report_tells_what_was_looked_at_and_decided(looked_at: Callable[..., Scenario]):
    scenario = looked_at(metric="auroc", patience=2)
    report = simulate(scenario, baselines=False)
    assert Report.model_validate_json((scenario.folder / "report.json").read_text()) == report
    assert report.validation is not None
    seen = {r.round: r.validation for r in report.rounds if r.validation is not None}
    assert report.validation.looks == len(seen)
    assert report.validation.best == max(seen.values()) == seen[report.validation.best_round]
    text = " ".join(story.summary(report))
    assert "About 40% of each hospital's training patients were set aside" in text
    assert f"after round {report.validation.best_round}" in text
    page = to_html(report)
    assert "patients set aside for validation" in page
    assert "Never a record or a part of one" in page
    assert "never a count of patients or records" not in page
    assert any("exact and without noise" in line for line in promises.what_left(report))
    if report.outcome.status == "completed early":
        assert f"ended early, as its plan provides, after {report.outcome.rounds_done} of 12 planned rounds" in text


def test_models_for_comparison_leave_out_the_patients_set_aside_too(
    looked_at: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch
):
    scenario, seen = looked_at(), {}
    train = run_module.train_alone

    def watched(plan: object, records: Records, *, name: str, **given: object) -> object:
        seen[name] = len(records)
        return train(plan, records, name=name, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "train_alone", watched)
    report = simulate(scenario)
    kept = {site: len(open_parted(scenario.source(site), scenario.task, 0.4)[0]) for site in scenario.sites}
    assert seen == {**kept, "pooled": sum(kept.values())}
    assert any("leave out the patients set aside" in note for note in report.notes)


def test_a_study_without_looks_reports_none(scenario: Callable[..., Scenario]):
    report = simulate(scenario(rounds=2, without_privacy=True), baselines=False)
    assert report.validation is None
    assert all(r.validation is None and r.not_validated == {} for r in report.rounds)
    assert story.validation(report) == ""
    assert "never a count of patients or records" in to_html(report)
