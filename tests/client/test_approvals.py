"""Nothing is trained that this hospital did not sign a yes to; a no is an act of its own and stays."""

from __future__ import annotations

import json
import stat
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosters import NOW, PLAN, Consortium, a_stranger, a_study
from wardround.client.approvals import ApprovalBook, Page, revocation_time
from wardround.client.policy import SitePolicy
from wardround.common.errors import ConfigError, PlanRefused, SignatureRefused

STUDY = a_study()
OTHER = a_study(PLAN.replace("rounds = 10", "rounds = 11"))


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path / "public")


@pytest.fixture
def book(tmp_path: Path, consortium: Consortium) -> ApprovalBook:
    (tmp_path / "state").mkdir(mode=0o700)
    return ApprovalBook(tmp_path / "state", consortium.roster, "va")


def file_of(book: ApprovalBook) -> Path:
    return book.folder / f"{STUDY.digest}.json"


def refused(book: ApprovalBook, said: str, digest: str = STUDY.digest) -> None:
    with pytest.raises(PlanRefused, match=f"^study {digest[:12]} is not approved here{said}$"):
        book.allows(digest)


def test_what_was_approved_is_allowed_and_nothing_else(book: ApprovalBook, consortium: Consortium):
    refused(book, "")
    approval = book.approve(STUDY, consortium.signers["va"], NOW, None)
    assert (approval.study, approval.site, approval.until) == (STUDY.digest, "va", None)
    book.allows(STUDY.digest)
    refused(book, "", OTHER.digest)
    assert stat.S_IMODE(file_of(book).stat().st_mode) == 0o600


def test_an_approval_ends_with_its_last_day(book: ApprovalBook, consortium: Consortium):
    book.approve(STUDY, consortium.signers["va"], NOW, NOW.date())
    book.allows(STUDY.digest, NOW)
    with pytest.raises(PlanRefused, match=f"the approval of va ended on {NOW.date()}"):
        book.allows(STUDY.digest, NOW + timedelta(days=1))


def test_what_was_taken_back_is_refused_until_it_is_approved_anew(book: ApprovalBook, consortium: Consortium):
    va = consortium.signers["va"]
    book.approve(STUDY, va, NOW, None)
    book.revoke(book.pages()[0], va, NOW)
    refused(book, f": it was taken back on {NOW:%Y-%m-%d}")
    assert [act.kind for act in book.pages()[0].acts] == ["approval", "revocation"]
    book.approve(STUDY, va, NOW, None)
    book.allows(STUDY.digest)
    assert [act.kind for act in book.pages()[0].acts] == ["approval", "revocation", "approval"]


def test_a_study_on_the_sites_list_needs_no_approval_but_a_no_stays(book: ApprovalBook, consortium: Consortium):
    with pytest.raises(PlanRefused, match="not approved here"):
        book.admits(STUDY, SitePolicy().studies)
    book.admits(STUDY, ["heart"])
    va = consortium.signers["va"]
    book.approve(STUDY, va, NOW, None)
    book.admits(STUDY, [])
    book.revoke(book.pages()[0], va, NOW)
    with pytest.raises(PlanRefused, match="taken back"):
        book.admits(STUDY, ["heart"])


@pytest.mark.parametrize(("old", "new", "said"), [
    ("rounds = 10", "rounds = 11", ": its plan was edited"),
    ('"format": "wardround approvals 1"', '"format": "2"', ": it cannot be read"),
    ("{", "", ": it cannot be read"),
    ("\\\"site\\\":\\\"va\\\"", "\\\"site\\\":\\\"cleveland\\\"", ": it is not about this study at this site"),
    ("\\\"until\\\":\\\"2", "\\\"until\\\":\\\"3", ": the approval is not signed by va"),
    ("approval\\\"", "revocation\\\"", ": it was taken back"),
    (STUDY.digest, OTHER.digest, ": it is not about this study at this site"),
])  # fmt: skip
def test_an_edited_file_approves_nothing(book: ApprovalBook, consortium: Consortium, old: str, new: str, said: str):
    book.approve(STUDY, consortium.signers["va"], NOW, date(2099, 12, 31))
    text = file_of(book).read_text()
    assert old in text
    file_of(book).write_text(text.replace(old, new, 1))
    refused(book, said)


def test_only_this_sites_key_approves_here(book: ApprovalBook, consortium: Consortium):
    for signer in (a_stranger("va"), consortium.signers["cleveland"], consortium.signers["coordinator"]):
        book.approve(STUDY, signer, NOW, None)
        with pytest.raises(PlanRefused, match="not approved here: "):
            book.allows(STUDY.digest)
        file_of(book).unlink()


def test_an_approval_of_a_revoked_or_renewed_key_is_over(book: ApprovalBook, consortium: Consortium):
    book.approve(STUDY, consortium.signers["va"], NOW, None)
    consortium.revoke("va")
    refused(book, ": va's sign certificate was revoked")
    consortium.enrol("va")
    refused(book, ": the approval is not signed by va")


def test_an_approval_moved_to_another_study_approves_nothing(book: ApprovalBook, consortium: Consortium):
    book.approve(STUDY, consortium.signers["va"], NOW, None)
    file_of(book).rename(book.folder / f"{OTHER.digest}.json")
    refused(book, ": its plan was edited", OTHER.digest)


def test_a_file_that_others_could_write_approves_nothing(book: ApprovalBook, consortium: Consortium, tmp_path: Path):
    book.approve(STUDY, consortium.signers["va"], NOW, None)
    file_of(book).chmod(0o620)
    refused(book, ": its file is damaged or open to others")
    file_of(book).chmod(0o600)
    file_of(book).rename(tmp_path / "elsewhere")
    file_of(book).symlink_to(tmp_path / "elsewhere")
    refused(book, ": its file is damaged or open to others")


def test_a_damaged_file_is_not_written_over(book: ApprovalBook, consortium: Consortium):
    book.approve(STUDY, consortium.signers["va"], NOW, None)
    file_of(book).write_text("{}")
    with pytest.raises(ConfigError, match="not as it was written"):
        book.approve(STUDY, consortium.signers["va"], NOW, None)
    assert file_of(book).read_text() == "{}"
    assert book.pages() == []


def test_the_plan_approved_last_under_a_name_is_found(book: ApprovalBook, consortium: Consortium):
    va = consortium.signers["va"]
    assert book.approved_before(STUDY) is None
    book.approve(STUDY, va, NOW - timedelta(days=2), None)
    book.approve(OTHER, va, NOW - timedelta(days=1), None)
    found = book.approved_before(a_study(PLAN.replace("rounds = 10", "rounds = 12")))
    assert found == OTHER
    assert book.approved_before(a_study(PLAN.replace('name = "heart"', 'name = "lungs"'))) is None
    book.approve(STUDY, a_stranger("va"), NOW, None)
    assert book.approved_before(STUDY) == OTHER


PAGE = Page(STUDY, (a_stranger("va").sign("approval", {}),)).to_text()


@given(st.one_of(
    st.text(max_size=100),
    st.tuples(st.integers(0, len(PAGE)), st.text(max_size=2)).map(lambda at: PAGE[: at[0]] + at[1] + PAGE[at[0] + 1 :]),
    st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(
        lambda acts: json.dumps({"format": "wardround approvals 1", "plan": acts, "acts": acts})),
))  # fmt: skip
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_file_raises_anything_but_a_refusal(text: str):
    try:
        page = Page.parse(text)
    except (SignatureRefused, ConfigError):
        return
    assert page.acts


def test_a_revocation_that_is_none_has_no_time():
    va = a_stranger("va")
    for kind, body in (("approval", {}), ("revocation", {}), ("revocation", {"study": "", "site": "", "time": "now"})):
        assert revocation_time(va.sign(kind, body)) is None
