"""The coordinator signs a plan and gathers approvals; what does not hold never gets into the file."""

from __future__ import annotations

import sys
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from rosters import PLAN, Consortium, a_stranger, a_study
from wardround.common.agreement import Approval, SignedStudy
from wardround.common.cli import main
from wardround.common.trust.enrolment import key_text
from wardround.common.trust.private_files import write_private

STUDY = a_study()


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    found = Consortium(tmp_path / "coordinator" / "public")
    write_private(tmp_path / "coordinator" / "sign.key", key_text(found.keys["coordinator"], "sign"))
    (tmp_path / "heart.toml").write_text(PLAN)
    return found


@pytest.fixture
def sign(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, consortium: Consortium):
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["wardround", "sign", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main()
        return int(str(done.value.code or 0)), *capsys.readouterr()

    return run


def given(folder: Path, approval: Approval) -> Path:
    path = folder / f"{approval.site}-heart.approval"
    path.write_text(approval.signed.text() + "\n")
    return path


def yes(consortium: Consortium, site: str, until: date | None = None) -> Approval:
    return Approval.sign(STUDY, consortium.signers[site], datetime.now(UTC), until)


def test_a_study_is_signed_and_said_in_sentences(sign, consortium: Consortium, tmp_path: Path):
    code, out, err = sign("heart.toml")
    assert (code, err) == (0, "")
    assert "Nothing is trained before 2 of these 3 hospitals have signed" in out
    assert "Signed by coordinator: heart.signed. Approved by nobody; 2 are needed." in out
    assert "2 more must approve it before it can be trained" in out
    study = SignedStudy.load(tmp_path / "heart.signed")
    assert study.text == PLAN
    assert study.check(consortium.roster, need=0) == []


def test_approvals_are_gathered_over_time(sign, consortium: Consortium, tmp_path: Path):
    assert sign("heart.toml", "--approval", given(tmp_path, yes(consortium, "va")))[0] == 0
    code, out, _ = sign("heart.signed", "--approval", given(tmp_path, yes(consortium, "cleveland")))
    assert code == 0
    assert "Approved by cleveland, va; 2 are needed." in out
    assert "more must approve" not in out
    newer = yes(consortium, "va", date(2099, 12, 31))
    assert sign("heart.signed", "--approval", given(tmp_path, newer), "--out", "b.signed")[0] == 0
    study = SignedStudy.load(tmp_path / "b.signed")
    assert study.check(consortium.roster) == ["cleveland", "va"]
    assert [approval.until for approval in study.approvals()] == [None, date(2099, 12, 31)]


def test_an_approval_that_no_longer_holds_is_left_out(sign, consortium: Consortium, tmp_path: Path):
    assert sign("heart.toml", "--approval", given(tmp_path, yes(consortium, "va")))[0] == 0
    consortium.revoke("va")
    code, out, _ = sign("heart.signed")
    assert code == 0
    assert out.startswith("Left out: va's sign certificate was revoked.\n")
    assert SignedStudy.load(tmp_path / "heart.signed").approvals() == []


def test_an_approval_that_does_not_hold_is_refused(sign, consortium: Consortium, tmp_path: Path):
    other = a_study(PLAN.replace("rounds = 10", "rounds = 11"))
    now = datetime.now(UTC)
    for approval, said in (
        (Approval.sign(STUDY, a_stranger("va"), now, None), "the approval is not signed by va"),
        (Approval.sign(other, consortium.signers["va"], now, None), "the approval of va is of another study"),
        (Approval.sign(STUDY, consortium.signers["va"], now, date(2020, 1, 1)), "the approval of va ended on 2020-01-01"),
        (Approval.sign(STUDY, consortium.enrol("st-olav"), now, None), "the plan does not name st-olav"),
    ):
        code, out, err = sign("heart.toml", "--approval", given(tmp_path, approval))
        assert (code, out) == (2, "")
        assert said in err
    assert not (tmp_path / "heart.signed").exists()


def test_only_the_coordinators_folder_signs(sign, consortium: Consortium, tmp_path: Path):
    (tmp_path / "coordinator" / "sign.key").unlink()
    write_private(tmp_path / "coordinator" / "sign.key", key_text(consortium.keys["va"], "sign"))
    code, _, err = sign("heart.toml")
    assert (code, "not signed by coordinator" in err) == (2, True)
    (tmp_path / "coordinator" / "sign.key").chmod(0o644)
    assert sign("heart.toml")[0] == 2
    assert sign("heart.toml", "--coordinator", "nowhere")[0] == 2
    assert not (tmp_path / "heart.signed").exists()


def test_a_plan_is_never_written_over(sign):
    code, _, err = sign("heart.toml", "--out", "heart.toml")
    assert (code, "is no TOML file" in err) == (2, True)
