"""What is signed can be read in one way only, and by its signer only written."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.errors import ConfigError, SignatureRefused
from wardround.common.trust.certificates import Authority, Subject
from wardround.common.trust.enrolment import key_text, new_key
from wardround.common.trust.private_files import write_private
from wardround.common.trust.signing import LARGEST_SIGNED, Signed, Signer, canonical, verify

NOW = datetime.now(UTC)
AUTHORITY = Authority.found("heart", NOW)
KEY = Ed25519PrivateKey.generate()
VA = Signer("va", KEY)
VA_CERTIFICATE = AUTHORITY.issue(KEY.public_key(), Subject("va", "sign"), NOW)
REPLY = VA.sign("reply", {"study": "ab" * 32, "round": 3, "share": 0.25, "late": None, "sites": ["va"]})

quick = settings(derandomize=True, deadline=None, max_examples=100)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=6,
)


@quick
@given(plain)
def test_canonical_json_says_the_same_whatever_it_came_from(value: object):
    written = canonical(value)
    assert written.isascii()
    assert canonical(json.loads(written)) == written
    assert canonical(json.loads(json.dumps(value, indent=2))) == written


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert canonical({"b": 1, "a": (1, "é")}) == canonical({"a": [1, "é"], "b": 1}) == b'{"a":[1,"\\u00e9"],"b":1}'


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, b"bytes", {1: "a"}, {None: 1}, {"a": {2.0: 1}}, {1, 2}, object(), Path("x"), 1j,
     "\ud800", {"\udfff": 1}, [[math.nan]], {"a": NOW}, 10**5000],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_json_cannot_say_is_not_signed(value: object):
    with pytest.raises(ConfigError, match="a text to be signed"):
        canonical(value)


def test_what_is_nested_without_end_is_not_signed():
    deep: list[object] = []
    deep.append(deep)
    with pytest.raises(ConfigError, match="nested too deeply"):
        canonical(deep)


@quick
@given(st.dictionaries(texts, plain, max_size=4))
def test_a_signed_text_survives_the_way(body: dict[str, object]):
    signed = VA.sign("reply", body)
    read = Signed.parse(signed.text(), kind="reply")
    assert (read, read.digest) == (signed, signed.digest)
    assert "\n" not in signed.text()
    verify(read, VA_CERTIFICATE)


def test_what_was_signed_does_not_change_with_the_callers_copy():
    body = {"sites": ["va"]}
    signed = VA.sign("reply", body)
    body["sites"].append("hungarian")
    verify(signed, VA_CERTIFICATE)
    assert signed.body == {"sites": ["va"]}


def test_the_digest_is_of_what_is_said_not_of_how_it_was_signed():
    other = Signed(REPLY.kind, REPLY.signer, REPLY.body, "00" * 64)
    assert other.digest == REPLY.digest
    assert len({VA.sign(kind, {"round": n}).digest for kind in ("reply", "order") for n in range(3)}) == 6


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.text(max_size=60) | plain.map(lambda value: json.dumps(value)) | st.binary(max_size=40).map(lambda b: b.decode("latin1"))
)
def test_no_text_brings_the_reader_down(text: str):
    with pytest.raises(SignatureRefused):
        Signed.parse(text, kind="reply")


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", "[" * 100_000, '{"a":' * 50_000, "NaN", "1e999", "9" * 5000, "x" * (LARGEST_SIGNED + 1),
     REPLY.text() + " ", REPLY.text() + "\n", REPLY.text()[:-1], REPLY.text().replace(",", ", "),
     REPLY.text().replace('"kind":', '"kind":"order","kind":'), REPLY.text().replace("}", ',"extra":1}'),
     REPLY.text().replace(REPLY.signature, REPLY.signature.upper()), REPLY.text().replace(REPLY.signature, "00"),
     REPLY.text().replace('"signer":"va"', '"signer":"../va"'), REPLY.text().replace('"signer":"va"', '"signer":["va"]'),
     REPLY.text().replace("0.25", "0.250"), REPLY.text().replace("null", "NaN")],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_another_way_to_write_it_is_refused(text: str):
    assert text != REPLY.text()
    with pytest.raises(SignatureRefused) as refused:
        Signed.parse(text, kind="reply")
    assert len(str(refused.value)) < 200


def test_every_flipped_byte_is_refused():
    text = REPLY.text().encode()
    for place in range(len(text)):
        for bit in (0, 5):
            flipped = bytearray(text)
            flipped[place] ^= 1 << bit
            with pytest.raises(SignatureRefused):
                verify(Signed.parse(flipped.decode("latin1"), kind="reply"), VA_CERTIFICATE)


def test_a_signature_for_one_purpose_is_worth_nothing_for_another():
    with pytest.raises(SignatureRefused, match="a signed approval was wanted, this text is another"):
        Signed.parse(REPLY.text(), kind="approval")
    relabelled = Signed("approval", REPLY.signer, REPLY.body, REPLY.signature)
    with pytest.raises(SignatureRefused, match="the approval is not signed by va"):
        verify(relabelled, VA_CERTIFICATE)


def test_a_signature_in_anothers_name_is_refused():
    stranger = Signer("va", Ed25519PrivateKey.generate())
    with pytest.raises(SignatureRefused, match="the reply is not signed by va"):
        verify(stranger.sign("reply", {"round": 3}), VA_CERTIFICATE)
    hungarian = AUTHORITY.issue(KEY.public_key(), Subject("hungarian", "sign"), NOW)
    with pytest.raises(SignatureRefused, match="the reply is not signed by va"):
        verify(REPLY, hungarian)  # the right key in another's certificate
    no_signer = AUTHORITY.issue(ec.generate_private_key(ec.SECP256R1()).public_key(), Subject("va", "tls"), NOW)
    with pytest.raises(SignatureRefused, match="the reply is not signed by va"):
        verify(REPLY, no_signer)


def test_what_could_not_be_read_back_is_not_signed():
    with pytest.raises(ConfigError, match="too long to be signed"):
        VA.sign("reply", {"text": "x" * LARGEST_SIGNED})


def test_a_signer_is_read_from_its_file_and_from_no_other_key(tmp_path: Path):
    for use in ("sign", "tls", "node"):
        write_private(tmp_path / f"{use}.key", key_text(new_key(use), use))
    write_private(tmp_path / "noise.key", b"noise")
    signer = Signer.load("va", tmp_path / "sign.key")
    assert Signed.parse(signer.sign("reply", {}).text(), kind="reply").signer == "va"
    for name, said in (
        ("tls", "is no Ed25519 key"),
        ("node", "no unencrypted private key|no Ed25519 key"),
        ("noise", "no unencrypted"),
    ):
        with pytest.raises(ConfigError, match=said):
            Signer.load("va", tmp_path / f"{name}.key")
    (tmp_path / "sign.key").chmod(0o644)
    with pytest.raises(ConfigError, match="mode 644"):
        Signer.load("va", tmp_path / "sign.key")


def test_a_certificate_of_any_age_still_tells_whose_an_old_signature_is():
    old = AUTHORITY.issue(KEY.public_key(), Subject("va", "sign"), NOW - timedelta(days=365), days=90)
    verify(REPLY, old)
