"""What a site says in a secure sum is read strictly: whatever is in a statement, the refusal is one of ours."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sums import OCCASION, signer
from wardround.common.errors import SignatureRefused
from wardround.common.secure_sum import shamir
from wardround.common.secure_sum.messages import Advert, Agreed, Dealt, Masked, Revealed, cohort_digest
from wardround.common.secure_sum.shares import BOX
from wardround.common.trust.signing import LARGEST_SIGNED, Signed

quick = settings(derandomize=True, deadline=None, max_examples=60)
HASH = "0a" * 32
SHARE = "00" + "0b" * 32
STATEMENTS = [
    Advert(OCCASION, HASH, "0c" * 32, HASH),
    Dealt(OCCASION, "h001", "0d" * BOX, HASH, HASH),
    Masked(OCCASION, HASH, HASH, HASH),
    Agreed(OCCASION, HASH, ("h000", "h001")),
    Revealed(OCCASION, HASH, {"h000": SHARE}, {"h001": SHARE}),
]
EVERY = pytest.mark.parametrize("statement", STATEMENTS, ids=lambda statement: type(statement).__name__)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def signed_as(statement: Any, body: dict[str, Any]) -> Signed:
    return Signed(statement.kind, "h000", body, "00" * 64)


@EVERY
def test_a_statement_reads_back_as_it_was_said(statement: Any):
    signed = Signed.parse(statement.sign(signer("h000")).text(), kind=statement.kind)
    assert type(statement).read(signed) == statement


@EVERY
@quick
@given(st.data())
def test_a_statement_with_anything_else_in_it_is_refused_or_means_just_that(statement: Any, data: st.DataObject):
    body = dict(statement.sign(signer("h000")).body)
    name = data.draw(st.sampled_from(sorted(body)))
    body[name] = data.draw(anything)
    with contextlib.suppress(SignatureRefused):
        found = type(statement).read(signed_as(statement, body))
        assert found.sign(signer("h000")).body == body  # by chance it was good


@EVERY
@quick
@given(body=st.dictionaries(st.text(max_size=10), anything, max_size=8))
def test_a_statement_of_other_fields_is_refused(statement: Any, body: dict[str, Any]):
    with pytest.raises(SignatureRefused, match="cannot be read"):
        type(statement).read(signed_as(statement, body))


@EVERY
def test_a_statement_with_a_field_less_or_more_is_refused(statement: Any):
    body = dict(statement.sign(signer("h000")).body)
    for wrong in ({**body, "more": 1}, *({key: body[key] for key in body if key != name} for name in body)):
        with pytest.raises(SignatureRefused, match="cannot be read"):
            type(statement).read(signed_as(statement, wrong))


@EVERY
def test_a_statement_is_not_taken_for_another(statement: Any):
    for other in STATEMENTS:
        if other is not statement:
            with pytest.raises(SignatureRefused, match="cannot be read"):
                type(other).read(statement.sign(signer("h000")))


@pytest.mark.parametrize("survivors", [[], ["h001", "h000"], ["h000", "h000"], ["../h"], [f"h{n:03}" for n in range(129)]])
def test_survivors_are_named_in_order_and_once(survivors: list[str]):
    body = STATEMENTS[3].sign(signer("h000")).body
    with pytest.raises(SignatureRefused):
        Agreed.read(signed_as(STATEMENTS[3], {**body, "survivors": survivors}))


@pytest.mark.parametrize("share", [f"{shamir.PRIME:066x}", "ff" * 33, "00" * 32, "0g" * 33, SHARE.upper(), 7])
def test_a_share_is_a_number_of_the_field(share: object):
    body = STATEMENTS[4].sign(signer("h000")).body
    with pytest.raises(SignatureRefused):
        Revealed.read(signed_as(STATEMENTS[4], {**body, "seeds": {"h000": share}}))


def test_what_128_sites_say_is_short_enough_to_be_signed():
    many = [f"{n:03}" + "x" * 61 for n in range(128)]
    longest = Revealed(OCCASION, HASH, dict.fromkeys(many, SHARE), dict.fromkeys(many, SHARE))
    assert len(longest.sign(signer("h000")).text()) < LARGEST_SIGNED / 10


def test_a_cohort_is_a_set_of_names():
    assert cohort_digest(frozenset("ab")) == cohort_digest(frozenset("ba")) != cohort_digest(frozenset(["ab"]))
