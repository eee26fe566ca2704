"""The report of a coordinator: what it did and what that cost, and plainly nothing about how good the model is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rosters import a_stranger
from tests.server.conftest import MeddledGrid, coordinate
from wardround.common.agreement import SignedStudy
from wardround.common.cli import application
from wardround.common.errors import CheckpointBroken, ConfigError
from wardround.common.key_sources import new_key_file
from wardround.common.trust.certificates import COORDINATOR
from wardround.common.vault import Vault
from wardround.server.checkpoint import Progress
from wardround.server.network.report import leave_report, report_run, study_report
from wardround.server.network.shelf import FINISHED, RUNNING, STOPPED, Shelf, Status, StudyFolder
from wardround.simulations.scenario import Scenario


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "coordinator.toml"
    path.write_text('state = "state"\n')
    return path


@pytest.fixture
def shelved(tmp_path: Path, config: Path, small: Callable[..., Scenario]) -> Callable[..., StudyFolder]:
    """A study on a coordinator's shelf, trained as far as its status says."""

    def put(state: str = FINISHED, why: str = "", silent: bool = False, **keys: object) -> StudyFolder:
        scenario = small(privacy=True, **keys)
        signed = SignedStudy.sign(scenario.study, a_stranger(COORDINATOR))
        folder = Shelf(tmp_path / "state").put(scenario.study.plan.name, scenario.study.digest, signed.to_text())
        grid = MeddledGrid(scenario)
        if silent:
            grid.silent = set(scenario.sites)
        coordinate(replace(scenario, folder=folder.path), grid)
        status = folder.status
        assert status is not None
        folder.write(replace(status, state=state, why=why))
        return folder

    return put


def test_a_finished_study_is_reported_without_any_figure_of_the_model(shelved: Callable[..., StudyFolder], config: Path):
    folder = shelved()
    target = report_run(config, folder.name)
    facts, page = json.loads((target / "report.json").read_text()), (target / "report.html").read_text()
    assert target == folder.path
    assert facts["outcome"] == {"status": "completed", "reason": "", "rounds_done": 3}
    assert facts["results"] == {"federated": {}, "pooled": {}, "local": {}, "by_site": {}}
    assert all(site["test_patients"] is None for site in facts["sites"].values())
    assert len(facts["privacy"]) == 4
    assert all(site["steps"] == 3 for site in facts["privacy"].values())
    assert "This report holds no figures on how good the model is" in page
    assert "It has no patients to test the model on" in page
    assert "How good the model is</h2>" not in page
    assert "models for comparison" not in page


def test_a_stopped_study_says_why(shelved: Callable[..., StudyFolder]):
    folder = shelved(state=STOPPED, why="the operator stopped it")
    report = study_report(folder)
    assert (report.outcome.status, report.outcome.reason) == ("stopped", "the operator stopped it")
    assert study_report(folder, stopped="too few").outcome.reason == "too few"


def test_a_study_under_way_is_not_called_finished(shelved: Callable[..., StudyFolder]):
    report = study_report(shelved(state=RUNNING, silent=True, lost_rounds=2, deadline_seconds=0.3))
    assert report.outcome.status == "stopped"
    assert "still under way" in report.outcome.reason
    assert report.outcome.rounds_done == 2


def test_a_run_is_found_by_the_beginning_of_its_number(shelved: Callable[..., StudyFolder], config: Path, tmp_path: Path):
    folder = shelved()
    run = json.loads((report_run(config, folder.name, tmp_path / "a") / "report.json").read_text())["study"]["run"]
    done = CliRunner().invoke(application(), ["report", run[:8], "--config", str(config), "--out", str(tmp_path / "b")])
    assert done.exit_code == 0
    assert done.output.strip() == str(tmp_path / "b" / "report.html")
    assert (tmp_path / "a" / "report.json").read_bytes() == (tmp_path / "b" / "report.json").read_bytes()


def test_an_unknown_study_is_refused_with_those_there_are(shelved: Callable[..., StudyFolder], config: Path):
    name = shelved().name
    with pytest.raises(ConfigError, match=f"is no study here.*{name}"):
        report_run(config, "zzzz")


def test_a_study_without_a_checkpoint_has_no_report(tmp_path: Path, config: Path, small: Callable[..., Scenario]):
    study = small(privacy=True).study
    signed = SignedStudy.sign(study, a_stranger(COORDINATOR))
    folder = Shelf(tmp_path / "state").put(study.plan.name, study.digest, signed.to_text())
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        report_run(config, folder.name)


def test_a_report_that_cannot_be_written_does_not_end_a_study(
    tmp_path: Path, small: Callable[..., Scenario], caplog: pytest.LogCaptureFixture
):
    study = small(privacy=True).study
    signed = SignedStudy.sign(study, a_stranger(COORDINATOR))
    folder = Shelf(tmp_path / "state").put(study.plan.name, study.digest, signed.to_text())
    leave_report(folder)
    assert "could not be written" in caplog.text
    assert not (folder.path / "report.html").exists()


def test_sealed_checkpoints_are_reported_with_their_key_alone(
    shelved: Callable[..., StudyFolder], config: Path, tmp_path: Path
):
    folder = shelved()
    found = Progress.latest(folder.path / "checkpoints", study=SignedStudy.load(folder.signed).digest)
    assert found is not None
    new_key_file(tmp_path / "checkpoint.key")
    for path in (folder.path / "checkpoints").iterdir():
        path.unlink()
    found.save(folder.path / "checkpoints", Vault.open(str(tmp_path / "checkpoint.key")))
    with pytest.raises(CheckpointBroken, match="sealed"):
        report_run(config, folder.name)
    config.write_text('state = "state"\nvault = "file:checkpoint.key"\n')
    assert (report_run(config, folder.name) / "report.html").exists()


def test_a_status_is_not_needed_to_report(shelved: Callable[..., StudyFolder]):
    folder = shelved()
    (folder.path / "status.json").unlink()
    assert study_report(folder).outcome.status == "completed"
    assert Status(folder.name, "x").state == "waiting"
