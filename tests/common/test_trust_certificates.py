"""What an authority issues, and how people name, compare and reach each other."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from wardround.common.errors import ConfigError, TrustRefused
from wardround.common.plan import Name
from wardround.common.trust.addresses import address, written
from wardround.common.trust.certificates import (
    KEY_KINDS,
    USES,
    Authority,
    Subject,
    Use,
    fingerprint,
    is_fingerprint,
    is_name,
    name_of,
    role_of,
    same_fingerprint,
)
from wardround.common.trust.checks import check_authority
from wardround.common.trust.enrolment import PrivateKey, new_key

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
AUTHORITY = Authority.found("heart", NOW)
ROGUE = Authority.found("heart", NOW)
KEYS: dict[tuple[str, Use], PrivateKey] = {
    (name, use): new_key(use) for name in ("coordinator", "va") for use in USES[role_of(name)]
}


def extension(certificate: x509.Certificate, kind: type) -> object:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def test_a_certificate_is_good_for_one_thing_only():
    extended = {
        ("va", "tls"): x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]),
        ("coordinator", "tls"): x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
    }
    for (name, use), key in KEYS.items():
        certificate = AUTHORITY.issue(key.public_key(), Subject(name, use), NOW)
        constraints = extension(certificate, x509.BasicConstraints)
        assert constraints == x509.BasicConstraints(ca=False, path_length=None)
        assert extension(certificate, x509.ExtendedKeyUsage) == extended.get((name, use))
        assert certificate.not_valid_after_utc == NOW + timedelta(days=90)
        with pytest.raises(TrustRefused, match="the authority's certificate is not one"):
            check_authority(certificate, NOW)


def test_no_authority_can_stand_below_the_authority():
    assert extension(AUTHORITY.certificate, x509.BasicConstraints) == x509.BasicConstraints(ca=True, path_length=0)
    assert AUTHORITY.key.curve.name == "secp384r1"
    check_authority(AUTHORITY.certificate, NOW)


def test_a_self_signed_certificate_is_no_authority():
    key = ec.generate_private_key(ec.SECP384R1())
    unmade = Authority(key, AUTHORITY.certificate)
    posing = Subject(name_of(AUTHORITY.certificate), "node")  # so that subject and issuer are the same
    with pytest.raises(TrustRefused, match="the authority's certificate is not one"):
        check_authority(unmade.issue(key.public_key(), posing, NOW), NOW)


def test_the_coordinators_names_are_in_its_certificate():
    subject = Subject("coordinator", "tls", ("fl.example.org", "10.0.0.7", "::1"))
    names = extension(AUTHORITY.issue(KEYS["coordinator", "tls"].public_key(), subject, NOW), x509.SubjectAlternativeName)
    assert isinstance(names, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "::1"]


def test_every_use_has_its_own_kind_of_key():
    assert len(set(KEY_KINDS.values())) == len(KEY_KINDS) == 3


# ---- names, fingerprints, addresses


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(max_size=4) | st.text("az09-.A/а\n", max_size=5) | st.from_regex(r"[a-z0-9-]{62,66}", fullmatch=True))
def test_a_name_here_is_a_name_in_a_plan(text: str):
    try:
        TypeAdapter(Name).validate_python(text)
        good = True
    except ValidationError:
        good = False
    assert is_name(text) == good


def test_a_fingerprint_is_compared_whole_and_however_it_is_spaced():
    whole = fingerprint(AUTHORITY.certificate)
    assert re.fullmatch(r"([0-9A-F]{4}-){15}[0-9A-F]{4}", whole)
    assert same_fingerprint(whole, whole.replace("-", ":").lower())
    assert same_fingerprint(whole, f" {whole.replace('-', ' ')}\n")
    assert not same_fingerprint(whole, fingerprint(ROGUE.certificate))
    for part in ("", whole[:-1], whole[:9], "not one"):
        assert not same_fingerprint(part, part)
        assert not is_fingerprint(part)


def test_addresses_are_read_and_written():
    for text, wanted in {
        "fl.example.org:443": ("fl.example.org", 443), "10.0.0.7": ("10.0.0.7", 9092), "[::1]:8443": ("::1", 8443),
    }.items():  # fmt: skip
        assert address(text) == wanted
        assert address(written(*wanted)) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "https://fl.example.org", "user@fl.example.org", "fl.example.org/x", "fl.example.org:0", "fl.example.org:65536",
     "fl.example.org:", ":443", "fl..org", "fl.example.org:４43", "еxample.org", "10.0.0.300", "::1", "[fe80::1%eth0]:1",
     "a" * 300, "-a.org", "a b", "a\n", "[a]]:1"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str):
    with pytest.raises(ConfigError, match="is no address; wanted HOST or HOST:PORT"):
        address(text)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(max_size=30))
def test_no_text_brings_the_reader_of_addresses_down(text: str):
    try:
        host, port = address(text)
    except ConfigError:
        return
    assert address(written(host, port)) == (host, port)
