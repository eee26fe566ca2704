"""Whom the coordinator and the hospitals believe, and all those whom they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.errors import SignatureRefused, TrustRefused
from wardround.common.trust import checks
from wardround.common.trust.certificates import (
    USES,
    Authority,
    Subject,
    Use,
    pem,
    role_of,
)
from wardround.common.trust.checks import check_certificate
from wardround.common.trust.enrolment import PrivateKey, new_key
from wardround.common.trust.roster import Roster
from wardround.common.trust.signing import Signed, Signer

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
AUTHORITY = Authority.found("heart", NOW)
ROGUE = Authority.found("heart", NOW)  # the same name, another key
KEYS: dict[tuple[str, Use], PrivateKey] = {
    (name, use): new_key(use) for name in ("coordinator", "va", "hungarian") for use in USES[role_of(name)]
}


@dataclass
class Trust:
    """A trust folder and a clock that can be set."""

    folder: Path
    now: datetime = NOW
    number: int = 0
    certificates: dict[tuple[str, Use], x509.Certificate] = field(default_factory=dict)

    def put(self, name: str, use: Use, key: PrivateKey | None = None, by: Authority = AUTHORITY, at: datetime = NOW) -> bytes:
        """Issue a certificate into the roster; returns it as DER."""
        key = key or KEYS[name, use]
        certificate = by.issue(key.public_key(), Subject(name, use), at)
        (self.folder / "roster" / f"{name}.{use}.crt").write_bytes(pem(certificate))
        self.certificates[name, use] = certificate
        return certificate.public_bytes(Encoding.DER)

    def listed(self, *revoked: x509.Certificate, by: Authority = AUTHORITY, days: float = 7) -> None:
        """Write a revocation list."""
        self.number += 1
        made = by.revocation_list({c.serial_number: NOW for c in revoked}, self.number, NOW, days)
        (self.folder / "crl.pem").write_bytes(pem(made))

    def der(self, name: str, use: Use = "tls") -> bytes:
        return self.certificates[name, use].public_bytes(Encoding.DER)

    def signer(self, name: str) -> Signer:
        return Signer(name, KEYS[name, "sign"])  # type: ignore[arg-type]


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    made = Trust(tmp_path)
    (tmp_path / "roster").mkdir()
    (tmp_path / "ca.crt").write_bytes(pem(AUTHORITY.certificate))
    for name, use in KEYS:
        made.put(name, use)
    made.listed()
    return made


@pytest.fixture
def roster(trust: Trust) -> Roster:
    return Roster(trust.folder, now=lambda: trust.now)


# ---- who is admitted


def test_a_roster_knows_its_people(trust: Trust, roster: Roster):
    assert roster.sites() == ["hungarian", "va"]
    assert roster.names() == ["coordinator", "hungarian", "va"]
    assert roster.admits(trust.der("va")) == "va"
    assert roster.tls("coordinator") == trust.certificates["coordinator", "tls"]
    assert roster.signer("va") == trust.certificates["va", "sign"]
    assert roster.authority() == AUTHORITY.certificate
    wanted = KEYS["va", "node"].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert roster.node_key("va") == wanted


def test_flower_writes_the_key_of_a_site_as_the_roster_does(roster: Roster):
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

    assert public_key_to_bytes(bytes_to_public_key(roster.node_key("va"))) == roster.node_key("va")


def everybody_is_refused(trust: Trust, roster: Roster, said: str) -> None:
    asks: list[Callable[[], object]] = [
        lambda: roster.admits(trust.der("va")),
        lambda: roster.signer("coordinator"),
        lambda: roster.tls("va"),
        lambda: roster.node_key("va"),
        lambda: roster.check(trust.signer("va").sign("reply", {}), role="site"),
    ]
    for ask in asks:
        with pytest.raises(TrustRefused, match=said):
            ask()
    assert roster.sites() == []


def test_another_authoritys_certificate_is_refused(trust: Trust, roster: Roster):
    forged = trust.put("va", "tls", by=ROGUE)
    with pytest.raises(TrustRefused, match="va's tls certificate is not issued by this consortium's authority"):
        roster.admits(forged)
    trust.put("va", "sign", by=ROGUE)
    with pytest.raises(TrustRefused, match="va's sign certificate is not issued by this consortium's authority"):
        roster.signer("va")


def test_a_certificate_issued_by_a_site_is_refused(trust: Trust, roster: Roster):
    site = Authority(KEYS["va", "tls"], trust.certificates["va", "tls"])  # type: ignore[arg-type]
    with pytest.raises(TrustRefused, match="hungarian's tls certificate is not issued by"):
        roster.admits(trust.put("hungarian", "tls", by=site))


def test_a_revoked_certificate_is_refused_without_a_restart(trust: Trust, roster: Roster):
    assert roster.admits(trust.der("va")) == "va"
    assert roster.signer("va")
    trust.listed(trust.certificates["va", "tls"], trust.certificates["va", "sign"])
    with pytest.raises(TrustRefused, match="va's tls certificate was revoked"):
        roster.admits(trust.der("va"))
    with pytest.raises(TrustRefused, match="va's sign certificate was revoked"):
        roster.signer("va")
    assert roster.sites() == ["hungarian"]
    assert roster.admits(trust.der("hungarian")) == "hungarian"


def test_a_revocation_list_of_another_authority_admits_nobody(trust: Trust, roster: Roster):
    trust.listed(by=ROGUE)
    everybody_is_refused(trust, roster, "the revocation list is not signed by this consortium's authority")


def test_a_stale_revocation_list_admits_nobody(trust: Trust, roster: Roster):
    assert roster.sites() == ["hungarian", "va"]
    trust.now = NOW + timedelta(days=7, seconds=1)
    everybody_is_refused(trust, roster, "the revocation list held until 2026-03-08 12:00 UTC; nobody is admitted")


@pytest.mark.parametrize("name", ["crl.pem", "ca.crt"])
def test_without_a_list_or_an_authority_nobody_is_admitted(trust: Trust, roster: Roster, name: str):
    assert roster.sites()
    kept = (trust.folder / name).read_bytes()
    for content in (b"", b"noise", b"x" * (2 << 20)):
        (trust.folder / name).write_bytes(content)
        everybody_is_refused(trust, roster, f"{name} cannot be read")
    (trust.folder / name).unlink()
    everybody_is_refused(trust, roster, f"there is no {name}")
    (trust.folder / name).write_bytes(kept)
    assert roster.sites() == ["hungarian", "va"]


def test_an_expired_certificate_is_refused(trust: Trust, roster: Roster):
    trust.put("va", "tls", at=NOW - timedelta(days=89, hours=23))
    assert roster.admits(trust.der("va")) == "va"
    trust.now = NOW + timedelta(hours=2)
    with pytest.raises(TrustRefused, match="va's tls certificate expired on 2026-03-01"):
        roster.admits(trust.der("va"))
    assert roster.sites() == ["hungarian"]


def test_a_certificate_before_its_time_is_refused(trust: Trust, roster: Roster):
    trust.put("va", "tls", at=NOW + timedelta(days=1))
    with pytest.raises(TrustRefused, match="is not valid before 2026-03-02 11:55 UTC; is the clock right"):
        roster.admits(trust.der("va"))


def test_an_expired_authority_admits_nobody(trust: Trust, roster: Roster):
    trust.listed(days=4000)
    assert roster.sites()
    trust.now = NOW + timedelta(days=3651)
    everybody_is_refused(trust, roster, "the authority's certificate expired")
    everybody_is_refused(trust, Roster(trust.folder, now=lambda: trust.now), "the authority's certificate expired")


def test_a_certificate_for_another_role_is_refused(trust: Trust, roster: Roster):
    coordinators = trust.certificates["coordinator", "tls"]
    with pytest.raises(TrustRefused, match="the client's certificate is no site's"):
        roster.admits(coordinators.public_bytes(Encoding.DER))
    with pytest.raises(TrustRefused, match="for another role or use"):
        check_certificate(with_role("coordinator", "va"), AUTHORITY.certificate, Subject("va", "tls"), NOW)


def with_role(role: str, name: str) -> x509.Certificate:
    """What an authority with a mistake might issue: the role of one and the name of another."""

    class Mistaken(Subject):
        @property
        def role(self) -> str:  # type: ignore[override]
            return role

    return AUTHORITY.issue(KEYS["va", "tls"].public_key(), Mistaken(name, "tls"), NOW)


def test_a_certificate_for_another_use_is_refused(trust: Trust, roster: Roster):
    with pytest.raises(TrustRefused, match="va's tls certificate is for another role or use"):
        roster.admits(trust.der("va", "node"))
    (trust.folder / "roster/va.sign.crt").write_bytes(pem(trust.certificates["va", "tls"]))
    with pytest.raises(TrustRefused, match="va's sign certificate is for another role or use"):
        roster.signer("va")


def test_a_certificate_in_anothers_name_is_refused(trust: Trust, roster: Roster):
    (trust.folder / "roster/va.sign.crt").write_bytes(pem(trust.certificates["hungarian", "sign"]))
    with pytest.raises(TrustRefused, match="va's sign certificate is in another's name"):
        roster.signer("va")


def test_a_key_of_the_wrong_kind_is_refused(trust: Trust, roster: Roster):
    trust.put("va", "sign", KEYS["va", "tls"])
    with pytest.raises(TrustRefused, match="va's sign certificate holds a key of the wrong kind"):
        roster.signer("va")


def test_a_client_that_is_not_in_the_roster_is_refused(trust: Trust, roster: Roster):
    stranger = AUTHORITY.issue(new_key("tls").public_key(), Subject("stranger", "tls"), NOW)
    with pytest.raises(TrustRefused, match="stranger is not in the roster"):
        roster.admits(stranger.public_bytes(Encoding.DER))
    (trust.folder / "roster/va.tls.crt").unlink()
    with pytest.raises(TrustRefused, match="va is not in the roster"):
        roster.admits(trust.der("va"))


def test_after_a_renewal_old_and_new_certificate_hold_but_another_key_does_not(trust: Trust, roster: Roster):
    old = trust.der("va")
    new = trust.put("va", "tls", at=NOW + timedelta(minutes=1))
    assert roster.admits(old) == roster.admits(new) == "va"
    trust.put("va", "tls", new_key("tls"))
    for certificate in (old, new):
        with pytest.raises(TrustRefused, match="va's certificate is not for the key in the roster"):
            roster.admits(certificate)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.binary(max_size=200))
def test_no_bytes_of_a_client_bring_the_roster_down(tmp_path_factory: pytest.TempPathFactory, der: bytes):
    folder = tmp_path_factory.getbasetemp() / "noise"
    if not folder.exists():
        folder.mkdir()
        (folder / "ca.crt").write_bytes(pem(AUTHORITY.certificate))
        (folder / "crl.pem").write_bytes(pem(AUTHORITY.revocation_list({}, 1, NOW)))
    with pytest.raises(TrustRefused, match="cannot be read"):
        Roster(folder, now=lambda: NOW).admits(der)


def test_every_changed_byte_of_a_certificate_is_refused(trust: Trust, roster: Roster):
    der = trust.der("va")
    whole = x509.load_der_x509_certificate(der)
    for place in range(len(der)):
        changed = bytearray(der)
        changed[place] ^= 1
        try:
            roster.admits(bytes(changed))
        except TrustRefused:
            continue
        # DER says how many bits of the last byte count, and some say so in two ways: the same certificate all the same
        read = x509.load_der_x509_certificate(bytes(changed))
        assert (read.tbs_certificate_bytes, read.signature) == (whole.tbs_certificate_bytes, whole.signature)


@pytest.mark.parametrize("name", ["../va", "va/..", "", "Va", "vа", "va.sign", "a" * 65, "va\0", "va\n", "-va"])
def test_a_name_that_is_none_opens_no_file(trust: Trust, roster: Roster, name: str):
    with pytest.raises(TrustRefused, match="nobody of that name can be in the roster"):
        roster.signer(name)
    statement = trust.signer("va").sign("reply", {})
    with pytest.raises(TrustRefused):
        roster.check(Signed(statement.kind, name, statement.body, statement.signature), role="site")


def test_asking_about_strangers_fills_no_memory(roster: Roster):
    for n in range(50):
        with pytest.raises(TrustRefused, match="is not in the roster"):
            roster.signer(f"stranger-{n}")
    assert roster._entries == {}


def test_an_unchanged_folder_is_not_read_again(trust: Trust, roster: Roster, monkeypatch: pytest.MonkeyPatch):
    roster.admits(trust.der("va"))
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read again"))
    monkeypatch.setattr(checks, "check_certificate", lambda *_: pytest.fail("a signature was checked again"))
    for _ in range(3):
        assert roster.admits(trust.der("va")) == "va"


# ---- who signed


def test_a_statement_is_checked_with_the_current_certificate_and_the_role(trust: Trust, roster: Roster):
    reply = trust.signer("va").sign("reply", {"round": 3})
    roster.check(reply, role="site")
    roster.check(trust.signer("coordinator").sign("order", {}), role="coordinator")
    with pytest.raises(SignatureRefused, match="the reply is signed by va, who has not the role of a coordinator"):
        roster.check(reply, role="coordinator")
    with pytest.raises(SignatureRefused, match="the order is signed by coordinator, who has not the role of a site"):
        roster.check(trust.signer("coordinator").sign("order", {}), role="site")
    with pytest.raises(SignatureRefused, match="the reply is not signed by hungarian"):
        roster.check(Signed("reply", "hungarian", reply.body, reply.signature), role="site")
    trust.put("va", "sign", new_key("sign"))
    with pytest.raises(SignatureRefused, match="the reply is not signed by va"):
        roster.check(reply, role="site")
