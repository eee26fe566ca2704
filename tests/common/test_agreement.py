"""What is approved is what is run: a signed study holds for exactly this text, these people, today."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rosters import NOW, PLAN, Consortium, a_stranger, a_study
from wardround.common.agreement import LARGEST_SIGNED_STUDY, Approval, SignedStudy
from wardround.common.errors import ConfigError, SignatureRefused
from wardround.common.explain import facts, sentences
from wardround.common.plan import SignedText
from wardround.common.trust.signing import Signer

STUDY = a_study()


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("trust") / "public")


def yes(signer: Signer, study: SignedText = STUDY, until: date | None = None) -> Approval:
    return Approval.sign(study, signer, NOW, until)


def signed(consortium: Consortium, *approvals: Approval) -> SignedStudy:
    return SignedStudy.sign(STUDY, consortium.signers["coordinator"], approvals)


def refused(consortium: Consortium, study: SignedStudy, said: str, need: int | None = None) -> None:
    with pytest.raises(SignatureRefused, match=said) as error:
        study.check(consortium.roster, need=need, now=NOW)
    assert str(error.value).startswith("study heart is not to be trained:\n  ")


def test_a_study_with_enough_approvals_holds_and_says_whose(consortium: Consortium):
    approvals = [yes(consortium.signers[site]) for site in ("va", "cleveland")]
    assert signed(consortium, *approvals).check(consortium.roster, now=NOW) == ["va", "cleveland"]
    assert signed(consortium).check(consortium.roster, need=0, now=NOW) == []


def test_a_signed_study_is_the_same_after_its_file(consortium: Consortium, tmp_path: Path):
    study = signed(consortium, yes(consortium.signers["va"], until=date(2099, 12, 31)))
    study.save(tmp_path / "heart.signed")
    read = SignedStudy.load(tmp_path / "heart.signed")
    assert read == study
    assert (read.text, read.digest) == (PLAN, STUDY.digest)
    assert read.to_text() == study.to_text()


def test_an_unsigned_study_is_refused(consortium: Consortium):
    refused(consortium, SignedStudy(STUDY), "the coordinator did not sign it", need=0)
    one = signed(consortium)
    refused(consortium, replace(one, signatures=one.signatures * 2), "signed more than once", need=0)


def test_an_altered_text_is_refused(consortium: Consortium):
    other = a_study(PLAN.replace("rounds = 10", "rounds = 11"))
    study = SignedStudy(other, signed(consortium, yes(consortium.signers["va"])).signatures)
    refused(consortium, study, r"another text\n  the approval of va is of another study", need=0)


@pytest.mark.parametrize(
    ("name", "said"), [("coordinator", "not signed by coordinator"), ("va", "not the role"), ("x", "role")]
)
def test_only_the_coordinators_key_signs_a_study(consortium: Consortium, name: str, said: str):
    signer = consortium.signers["va"] if name == "va" else a_stranger(name)
    refused(consortium, SignedStudy.sign(STUDY, signer), said, need=0)


def test_a_revoked_coordinator_signs_nothing(tmp_path: Path):
    consortium = Consortium(tmp_path / "public")
    study = signed(consortium)
    study.check(consortium.roster, need=0, now=NOW)
    consortium.revoke("coordinator")
    refused(consortium, study, "coordinator's sign certificate was revoked", need=0)


def test_too_few_approvals_are_refused_with_the_reason_of_each(consortium: Consortium):
    refused(consortium, signed(consortium), "0 of the 2 approvals it needs hold")
    study = signed(consortium, yes(consortium.signers["va"]), yes(a_stranger("cleveland")))
    refused(consortium, study, r"1 of the 2 approvals it needs hold\n  the approval is not signed by cleveland")
    assert study.check(consortium.roster, need=1, now=NOW) == ["va"]


def test_an_approval_of_another_study_refuses_the_file(consortium: Consortium):
    other = a_study(PLAN.replace("rounds = 10", "rounds = 11"))
    approvals = [
        yes(consortium.signers["va"]),
        yes(consortium.signers["cleveland"]),
        yes(consortium.signers["hungarian"], other),
    ]
    refused(consortium, signed(consortium, *approvals), "the approval of hungarian is of another study")


def test_a_site_that_the_plan_does_not_name_approves_nothing(consortium: Consortium):
    signer = consortium.enrol("st-olav")
    refused(consortium, signed(consortium, yes(signer)), "the plan does not name st-olav, which approves it", need=0)


def test_no_site_counts_twice(consortium: Consortium):
    va = consortium.signers["va"]
    refused(consortium, signed(consortium, yes(va), yes(va, until=date(2099, 1, 1))), "va approves it twice")


def test_the_coordinator_cannot_approve_for_a_site(consortium: Consortium):
    body = yes(consortium.signers["va"]).signed.body
    forged = consortium.signers["coordinator"].sign("approval", body)
    study = signed(consortium)
    refused(consortium, replace(study, signatures=(*study.signatures, forged)), "not of the site that signed it", need=0)


def test_an_approval_counts_up_to_its_last_day(consortium: Consortium):
    study = signed(consortium, *(yes(consortium.signers[site], until=NOW.date()) for site in ("va", "cleveland")))
    assert len(study.check(consortium.roster, now=NOW)) == 2
    with pytest.raises(SignatureRefused, match=rf"the approval of va ended on {NOW.date()}"):
        study.check(consortium.roster, now=NOW + timedelta(days=1))
    assert study.check(consortium.roster, need=0, now=NOW + timedelta(days=1)) == []


def test_a_revoked_site_no_longer_counts_and_stops_nobody_else(tmp_path: Path):
    consortium = Consortium(tmp_path / "public")
    study = signed(consortium, *(yes(consortium.signers[site]) for site in ("va", "cleveland", "hungarian")))
    consortium.revoke("va")
    assert study.check(consortium.roster, now=NOW) == ["cleveland", "hungarian"]
    refused(consortium, study, r"2 of the 3 .*\n  va's sign certificate was revoked", need=3)


def test_signatures_of_other_kinds_have_no_place_in_it(consortium: Consortium):
    study = signed(consortium)
    other = consortium.signers["va"].sign("revocation", {"study": STUDY.digest})
    refused(consortium, replace(study, signatures=(*study.signatures, other)), "signatures that are no approvals", need=0)


@pytest.mark.parametrize("change", [
    {"until": "tomorrow"}, {"time": "now"}, {"time": "2026-01-01T00:00:00"}, {"until": 7}, {"site": "cleveland"}, {"more": ""},
    {"study": None},
], ids=str)  # fmt: skip
def test_an_approval_that_is_none_is_refused(consortium: Consortium, change: dict[str, object]):
    body = yes(consortium.signers["va"]).signed.body | change
    with pytest.raises(SignatureRefused):
        Approval.of(consortium.signers["va"].sign("approval", body))


# ---- files


@pytest.mark.parametrize("text", [
    "", "null", "[]", "{}", "[" * 100_000, '{"format": 1}', PLAN, "x" * (LARGEST_SIGNED_STUDY + 1),
    json.dumps({"format": "wardround signed study 2", "plan": PLAN, "study": "", "approvals": []}),
    json.dumps({"format": "wardround signed study 1", "plan": PLAN, "study": "{}", "approvals": []}),
    json.dumps({"format": "wardround signed study 1", "plan": PLAN, "study": "", "approvals": [1]}),
    json.dumps({"format": "wardround signed study 1", "plan": PLAN, "study": "", "approvals": [""] * 1001}),
    json.dumps({"format": "wardround signed study 1", "plan": "\ud800", "study": "", "approvals": []}),
    json.dumps({"format": "wardround signed study 1", "plan": PLAN, "study": "", "approvals": []}),
], ids=lambda text: text[:60])  # fmt: skip
def test_a_text_that_is_no_signed_study_is_refused(text: str):
    with pytest.raises(SignatureRefused):
        SignedStudy.parse(text)


def test_a_file_that_is_no_signed_study_is_named(tmp_path: Path):
    (tmp_path / "plan.signed").write_text(PLAN)
    with pytest.raises(ConfigError, match=r"plan\.signed: the text is not a signed study"):
        SignedStudy.load(tmp_path / "plan.signed")
    with pytest.raises(ConfigError, match=r"none\.signed cannot be read"):
        SignedStudy.load(tmp_path / "none.signed")


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_changed_character_of_a_signed_study_passes(consortium: Consortium, data: st.DataObject):
    whole = signed(consortium, yes(consortium.signers["va"]), yes(consortium.signers["cleveland"])).to_text()
    at = data.draw(st.integers(0, len(whole) - 1))
    put = data.draw(st.text(max_size=2).filter(lambda text: text != whole[at]))
    try:
        study = SignedStudy.parse(whole[:at] + put + whole[at + 1 :])
    except (SignatureRefused, ConfigError):
        return
    with pytest.raises(SignatureRefused):
        study.check(consortium.roster, now=NOW)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_text_raises_anything_but_a_refusal(text: str):
    with pytest.raises((SignatureRefused, ConfigError)):
        SignedStudy.parse(text)
    with pytest.raises(SignatureRefused):
        Approval.parse(text)


# ---- the plan's key


def test_a_plan_says_how_many_approvals_it_needs():
    assert facts(STUDY)["min_approvals"] == 2
    assert "Nothing is trained before 2 of these 3 hospitals have signed an approval of it." in sentences(STUDY)
    without = a_study(PLAN.replace("min_approvals = 2", ""))
    assert without.plan.min_approvals == 0
    assert not any("approval" in line for line in sentences(without))


@pytest.mark.parametrize(("count", "said"), [
    (4, "min_approvals: 4 sites are to approve, but the plan names 3"), (-1, "greater than or equal to 0"), ("true", "integer"),
])  # fmt: skip
def test_a_plan_cannot_ask_for_approvals_that_nobody_can_give(count: object, said: str):
    with pytest.raises(ConfigError, match=said):
        a_study(PLAN.replace("min_approvals = 2", f"min_approvals = {count}"))
