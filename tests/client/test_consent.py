"""A person reads what a study would do here before anything is signed, and can take it back."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from rosters import ALLOW, PLAN, Consortium, a_stranger, a_study
from wardround.client import consent
from wardround.client.approvals import ApprovalBook
from wardround.client.ledger import Cohort, PrivacyLedger
from wardround.client.policy import SiteConfig
from wardround.common.agreement import Approval, SignedStudy
from wardround.common.cli import main
from wardround.common.errors import PlanRefused

STUDY = a_study()


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path / "public")


@pytest.fixture
def site(tmp_path: Path, consortium: Consortium) -> Path:
    (tmp_path / "plan.toml").write_text(PLAN)
    return consortium.site_file(tmp_path / "va")


@pytest.fixture
def approve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, site: Path):
    """Runs the verb in this process: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["wardround", "approve-plan", *map(str, words), "--site", str(site)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main()
        return int(str(done.value.code or 0)), *capsys.readouterr()

    return run


@pytest.fixture
def book(site: Path, consortium: Consortium) -> ApprovalBook:
    return ApprovalBook(site.parent / "state", consortium.roster, "va")


def test_an_approval_is_shown_signed_kept_and_copied(approve, book: ApprovalBook, tmp_path: Path, consortium: Consortium):
    code, out, err = approve("plan.toml", "--yes")
    assert (code, err) == (0, "")
    for said in (
        "Study heart: ", f"Identity (SHA-256 of the plan's text): {STUDY.digest}", "What it costs each patient: epsilon 3.00",
        "not signed by the coordinator yet", "The rules of va:", "yes  epsilon is at most 4",
        "yes  patients of patients pay at most 8 over all studies; so far 0.00, then ",
        "No plan called heart was approved here before.", "Send va-heart.approval to the coordinator.",
    ):  # fmt: skip
        assert said in out, said
    book.allows(STUDY.digest)
    copy = Approval.parse((tmp_path / "va-heart.approval").read_text())
    assert (copy.study, copy.site) == (STUDY.digest, "va")
    copy.holds(consortium.roster, datetime.now(UTC))


def test_nothing_is_signed_without_a_terminal_or_yes(approve, book: ApprovalBook, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    code, _, err = approve("plan.toml")
    assert (code, "no terminal to ask at" in err) == (2, True)
    assert not list(tmp_path.glob("*.approval"))
    with pytest.raises(PlanRefused):
        book.allows(STUDY.digest)


@pytest.mark.parametrize("answer", [True, False])
def test_the_person_decides(approve, book: ApprovalBook, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: bool):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    asked: list[str] = []
    monkeypatch.setattr(consent.typer, "confirm", lambda text, default: asked.append(text) or answer)
    code, out, _ = approve("plan.toml")
    assert asked == ["\nDoes va approve this plan?"]
    assert (code, "Nothing was signed." in out) == ((0, False) if answer else (1, True))
    assert bool(list(tmp_path.glob("*.approval"))) == answer == bool(book.pages())


def test_a_plan_that_breaks_a_rule_cannot_be_approved(approve, site: Path, tmp_path: Path, book: ApprovalBook):
    (tmp_path / "plan.toml").write_text(PLAN.replace("epsilon = 3.0", "epsilon = 5.0").replace("rounds = 10", "rounds = 2000"))
    code, out, err = approve("plan.toml", "--yes")
    assert code == 2
    assert "NO   epsilon is at most 4: epsilon 5 is more than the 4 allowed for a study" in out
    assert "NO   it has at most 1000 rounds: 2000 rounds are more than the 1000 allowed" in out
    assert "va cannot take part: 2000 rounds are more than the 1000 allowed; epsilon 5 is more" in err
    assert book.pages() == []


@pytest.mark.parametrize(("changes", "said"), [
    ({'task = "heart-disease"': 'task = "chest-xray"'}, "it has no data for task chest-xray"),
    ({"va = 130": "st-olav = 130"}, "the plan does not name this site"),
    ({"va = 130": "va = 10"}, "10 patients are fewer than the 20 this site wants"),
    ({"[privacy]": "[validation]", "epsilon = 3.0": ""}, "the plan has no [privacy], and this site wants it"),
], ids=str)  # fmt: skip
def test_each_rule_can_fail(site: Path, changes: dict[str, str], said: str):
    text = PLAN
    for old, new in changes.items():
        text = text.replace(old, new)
    broken = [rule.refusal for rule in consent.rules_of(a_study(text), SiteConfig.load(site)) if rule.refusal]
    assert said in broken


def test_a_model_or_a_cost_beyond_what_is_left_is_refused(site: Path):
    site.write_text(site.read_text().replace(ALLOW, f"{ALLOW}\nparameters = 10"))
    config = SiteConfig.load(site)
    with PrivacyLedger(config.state / "ledger.sqlite") as ledger:
        steps = STUDY.plan.noised_steps(STUDY.plan.noise_multiplier())
        ledger.reserve(Cohort("patients", 8.0, 1e-5), study="x" * 64, name="x", run="x", steps=steps, steps_per_round=1)
        before = consent.budget(STUDY, config)
        ledger.reserve(Cohort("patients", 8.0, 1e-5), study=STUDY.digest, name="heart", run="y", steps=steps, steps_per_round=1)
    assert 0 < before[0] < before[1]
    after = consent.budget(STUDY, config)
    assert after[0] == after[1] == before[1]  # its cost is reserved already
    site.write_text(site.read_text().replace("epsilon_lifetime = 8.0", "epsilon_lifetime = 3.5"))
    broken = [rule.refusal for rule in consent.rules_of(STUDY, SiteConfig.load(site)) if rule.refusal]
    assert any("numbers is larger than the 10 allowed" in text for text in broken)
    assert any(f"patients of patients would have paid {after[1]:.2f} of 3.5" in text for text in broken)


def test_a_change_since_the_last_approval_is_shown_line_by_line(approve, tmp_path: Path):
    assert approve("plan.toml", "--yes")[0] == 0
    assert "This very plan was approved here before." in approve("plan.toml", "--yes")[1]
    (tmp_path / "plan.toml").write_text(PLAN.replace("rounds = 10", "rounds = 12") + "# \u202e\x9b31m\n")
    out = approve("plan.toml", "--yes")[1]
    assert "\n-rounds = 10\n+rounds = 12\n" in out
    assert f"--- heart {STUDY.digest[:12]}\tapproved here" in out
    assert "+# \\u202e\\x9b31m" in out
    assert "\x9b" not in out


def test_a_signed_plan_says_who_signed_it(approve, consortium: Consortium, tmp_path: Path):
    approvals = [Approval.sign(STUDY, signer, datetime.now(UTC), None) for signer in
                 (consortium.signers["cleveland"], a_stranger("hungarian"))]  # fmt: skip
    SignedStudy.sign(STUDY, consortium.signers["coordinator"], approvals).save(tmp_path / "heart.signed")
    code, out, err = approve("heart.signed", "--yes")
    assert (code, err) == (0, "")
    assert "Signed by the coordinator.\nApproved by cleveland.\n" in out
    assert "Said to be approved by hungarian, which cannot be told here: the approval is not signed by hungarian." in out


def test_a_plan_that_another_signed_is_refused_before_it_is_shown(approve, tmp_path: Path):
    SignedStudy.sign(STUDY, a_stranger("coordinator")).save(tmp_path / "heart.signed")
    code, out, err = approve("heart.signed", "--yes")
    assert (code, out) == (2, "")
    assert "not signed by coordinator" in err


def test_what_was_approved_can_be_taken_back_by_name_or_digest(approve, book: ApprovalBook):
    for what in ("heart", STUDY.digest[:8], STUDY.digest):
        assert approve("plan.toml", "--yes")[0] == 0
        book.allows(STUDY.digest)
        code, out, err = approve("--revoke", what)
        assert (code, err) == (0, "")
        assert out == f"Taken back: study heart, {STUDY.digest}. va trains nothing more of it.\n"
        with pytest.raises(PlanRefused, match="taken back"):
            book.allows(STUDY.digest)


@pytest.mark.parametrize("what", ["lungs", STUDY.digest[:7], "f" * 64, ""])
def test_what_was_never_approved_cannot_be_taken_back(approve, book: ApprovalBook, what: str):
    assert approve("plan.toml", "--yes")[0] == 0
    code, _, err = approve("--revoke", what)
    assert code == 2
    assert f"0 approvals begin so; there are: heart {STUDY.digest[:12]}" in err
    book.allows(STUDY.digest)


def test_an_approval_may_have_a_last_day(approve, book: ApprovalBook):
    last = datetime.now(UTC).date() + timedelta(days=30)
    assert f"Approved until {last}." in approve("plan.toml", "--yes", "--until", last)[1]
    (page,) = book.pages()
    assert page.approval is not None
    assert page.approval.until == last
    for bad, said in (("2020-01-01", "that day is over"), ("soon", "wanted a day such as")):
        code, _, err = approve("plan.toml", "--yes", "--until", bad)
        assert (code, said in err) == (2, True)


def test_it_wants_a_plan_or_a_revocation(approve):
    for words in ((), ("plan.toml", "--revoke", "heart")):
        code, _, err = approve(*words)
        assert (code, "either a plan to approve or --revoke" in err) == (2, True)
