"""The coordinator's shelf: what `start`, `stop` and `status` do with a study's folder."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from rosters import PLAN, Consortium, a_stranger, a_study
from wardround.common.agreement import SignedStudy
from wardround.common.errors import ConfigError, SignatureRefused, StudyStopped
from wardround.server.network import operate
from wardround.server.network.operate import follow_study, print_status, start_study, stop_study
from wardround.server.network.shelf import FINISHED, RUNNING, STOPPED, WAITING, Shelf, Status, StudyFolder

TEXT = PLAN.replace("min_approvals = 2\n", "")
STUDY = a_study(TEXT)


class Office:
    """A coordinator's folder with a signed study."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.consortium = Consortium(folder / "public")
        self.config = folder / "coordinator.toml"
        self.config.write_text('state = "state"\nkeys = "."\ntrust = "public"\n')
        self.shelf = Shelf(folder / "state")

    def sign(self, text: str = TEXT, name: str = "heart") -> Path:
        path = self.folder / f"{name}.signed"
        SignedStudy.sign(a_study(text), self.consortium.signers["coordinator"]).save(path)
        return path

    def start(self, text: str = TEXT, *, resume: bool = False) -> StudyFolder:
        return start_study(self.config, self.sign(text), resume=resume)

    def stands(self, folder: StudyFolder, **changes: object) -> None:
        assert folder.status is not None
        folder.write(replace(folder.status, **changes))  # type: ignore[arg-type]


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


def test_a_study_that_is_started_waits_with_a_wish(office: Office):
    folder = office.start()
    assert folder.status is not None
    assert (folder.status.state, folder.status.digest, folder.wish) == (WAITING, STUDY.digest, "run")
    assert SignedStudy.load(folder.signed).study == STUDY
    assert [found.name for found in office.shelf] == ["heart"]


def test_starting_it_twice_changes_nothing_but_its_signatures(office: Office):
    folder = office.start()
    office.stands(folder, state=RUNNING, round=3)
    again = office.start()
    assert again.status is not None
    assert (again.status.state, again.status.round, again.wish) == (RUNNING, 3, "run")


def test_another_plan_of_the_same_name_is_refused_and_the_first_one_stays(office: Office):
    folder = office.start()
    with pytest.raises(ConfigError, match=r"holds another plan of this name .*give this study a new name"):
        office.start(TEXT.replace("rounds = 10", "rounds = 11"))
    assert SignedStudy.load(folder.signed).study == STUDY


def test_a_finished_study_is_not_started_again(office: Office):
    office.stands(office.start(), state=FINISHED)
    for resume in (False, True):
        with pytest.raises(ConfigError, match="study heart is finished; its model lies in"):
            office.start(resume=resume)


def test_a_stopped_study_goes_on_only_when_told(office: Office):
    folder = office.start()
    office.stands(folder, state=STOPPED, why="too few sites", round=4)
    with pytest.raises(ConfigError, match=r"study heart stopped after round 4 \(too few sites\); --resume goes on"):
        office.start()
    assert folder.status is not None
    assert folder.status.state == STOPPED
    office.start(resume=True)
    assert (folder.status.state, folder.status.why, folder.status.round, folder.wish) == (WAITING, "", 4, "run")


def test_what_the_coordinator_did_not_sign_is_not_queued(office: Office):
    path = office.folder / "heart.signed"
    SignedStudy.sign(STUDY, a_stranger("coordinator")).save(path)
    with pytest.raises(SignatureRefused, match="not signed by coordinator"):
        start_study(office.config, path, resume=False)
    assert list(office.shelf) == []


def test_a_study_without_the_approvals_it_needs_is_not_queued(office: Office):
    path = office.folder / "heart.signed"
    SignedStudy.sign(a_study(), office.consortium.signers["coordinator"]).save(path)
    with pytest.raises(SignatureRefused, match="0 of the 2 approvals it needs hold"):
        start_study(office.config, path, resume=False)
    assert list(office.shelf) == []


def test_stopping_a_study_that_waits_for_its_turn_is_done_at_once(office: Office):
    folder = office.start()
    stop_study(office.config, "heart")
    assert folder.status is not None
    assert (folder.status.state, folder.status.why, folder.wish) == (STOPPED, "the operator stopped it", "stop")


def test_stopping_one_that_runs_is_a_wish(office: Office):
    folder = office.start()
    office.stands(folder, state=RUNNING, connected=["va"])
    stop_study(office.config, "heart")
    assert folder.status is not None
    assert (folder.status.state, folder.wish) == (RUNNING, "stop")


@pytest.mark.parametrize("name", ["lungs", "", "../studies/heart2", "."])
def test_a_study_that_is_not_there_is_named_with_those_that_are(office: Office, name: str):
    office.start()
    with pytest.raises(ConfigError, match=r"there is no study .*; there are: heart"):
        stop_study(office.config, name)


def test_studies_come_in_the_order_they_were_asked_for(office: Office):
    for number, name in enumerate(("c", "a", "b")):
        folder = start_study(office.config, office.sign(TEXT.replace('"heart"', f'"{name}"'), name), resume=False)
        os.utime(folder.path / "wish", (number, number))
    assert [folder.name for folder in office.shelf] == ["c", "a", "b"]


def test_status_as_json_has_every_fact(office: Office, capsys: pytest.CaptureFixture[str]):
    folder = office.start()
    office.stands(folder, state=RUNNING, round=3, rounds=10, sites=["va"], connected=["va"], last={"round": 3})
    capsys.readouterr()
    print_status(office.config, None, as_json=True)
    (said,) = json.loads(capsys.readouterr().out)
    assert Status(**said) == folder.status


def test_status_names_who_is_away_and_why_it_stopped(office: Office, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_status(office.config, None, as_json=False)
    assert "no study yet" in capsys.readouterr().out
    folder = office.start()
    office.stands(folder, rounds=10, sites=["cleveland", "va"], connected=["va"])
    print_status(office.config, "heart", as_json=False)
    said = capsys.readouterr().out
    assert "away: cleveland" in said
    assert "1/2" in said
    office.stands(folder, state=STOPPED, why="the disk is full")
    print_status(office.config, "heart", as_json=False)
    assert "the disk is full" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"study": "heart"}', '{"study": "heart", "digest": "", "other": 1}'])
def test_a_damaged_status_is_said_to_be_one(office: Office, text: str):
    folder = office.start()
    (folder.path / "status.json").write_text(text)
    with pytest.raises(ConfigError, match=r"status\.json cannot be read"):
        _ = folder.status


def test_following_ends_with_the_study(office: Office, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(operate, "_LOOK_SECONDS", 0.0)
    folder = office.start()
    office.stands(
        folder, state=FINISHED, round=2, rounds=2, sites=["va"], last={"sites": ["va"], "update_norm": 0.5, "seconds": 1}
    )
    follow_study(folder)
    said = capsys.readouterr().out
    assert "round 2/2" in said
    assert "finished" in said
    office.stands(folder, state=STOPPED, why="too few sites")
    with pytest.raises(StudyStopped, match="too few sites"):
        follow_study(folder)


def test_only_the_owner_can_look_into_a_study(office: Office):
    assert office.start().path.stat().st_mode & 0o077 == 0
