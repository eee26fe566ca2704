"""The consortium's folder: only whom it invited gets in, whom it revoked stays out, and a crash costs a second try."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.errors import ConfigError, TrustRefused
from wardround.common.trust.certificates import COORDINATOR, USES, Subject, Use, name_of
from wardround.common.trust.enrolment import PrivateKey, Request, Token, new_key
from wardround.common.trust.roster import Roster
from wardround.common.trust.signing import Signer
from wardround.server.consortium.office import Consortium, Founding
from wardround.server.consortium.registry import Registry

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(days=60)
FOUNDING = Founding("heart", "fl.example.org:443", ("10.0.0.7",))

Keys = dict[Use, PrivateKey]


def new_keys() -> Keys:
    return {use: new_key(use) for use in USES["site"]}


@pytest.fixture
def office(tmp_path: Path) -> Consortium:
    return Consortium.found(tmp_path / "heart", FOUNDING, NOW)


def enrolled(office: Consortium, site: str, at: datetime = NOW) -> Keys:
    keys = new_keys()
    office.approve(Request.by_token(site, keys, office.invite(site, 72, at)), at)
    return keys


def signer(site: str, keys: Keys) -> Signer:
    key = keys["sign"]
    assert isinstance(key, Ed25519PrivateKey)
    return Signer(site, key)


def roster(office: Consortium, at: datetime = NOW) -> Roster:
    return Roster(office.public, now=lambda: at)


def tls_of(office: Consortium, site: str) -> bytes:
    return x509.load_pem_x509_certificate((office.public / f"roster/{site}.tls.crt").read_bytes()).public_bytes(Encoding.DER)


# ---- founding and inviting


def test_a_consortium_is_founded_whole(office: Consortium):
    assert roster(office).names() == [COORDINATOR]
    certificate = roster(office).tls(COORDINATOR)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    secret = {
        str(p.relative_to(office.folder)) for p in office.folder.rglob("*") if p.is_file() and not p.stat().st_mode & 0o077
    }
    assert secret >= {"ca/ca.key", "coordinator/tls.key", "coordinator/sign.key", "registry.json"}
    assert not list(office.public.rglob("*.key"))
    assert office.registry().coordinator == "fl.example.org:443"


def test_a_consortium_is_founded_once_and_a_crash_leaves_none(
    tmp_path: Path, office: Consortium, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match="is there and not empty"):
        Consortium.found(office.folder, FOUNDING, NOW)
    with monkeypatch.context() as crash:
        crash.setattr(Path, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            Consortium.found(tmp_path / "other", FOUNDING, NOW)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match="is no consortium folder"):
        Consortium(tmp_path / "other")
    assert Consortium.found(tmp_path / "other", FOUNDING, NOW).fingerprint != office.fingerprint


@pytest.mark.parametrize(
    ("founding", "said"),
    [(replace(FOUNDING, name="Heart"), "--name 'Heart'"), (replace(FOUNDING, coordinator="https://x"), "is no address"),
     (replace(FOUNDING, also_hosts=("a b",)), "is no address")],
)  # fmt: skip
def test_a_founding_that_makes_no_sense_makes_nothing(tmp_path: Path, founding: Founding, said: str):
    with pytest.raises(ConfigError, match=said):
        Consortium.found(tmp_path / "heart", founding, NOW)
    assert list(tmp_path.iterdir()) == []


def test_an_authority_with_a_passphrase_opens_with_no_other(tmp_path: Path):
    closed = Consortium.found(tmp_path / "heart", FOUNDING, NOW, b"correct horse")
    assert b"ENCRYPTED" in (closed.folder / "ca" / "ca.key").read_bytes()
    closed.renew_list(NOW)
    with pytest.raises(ConfigError, match="wants its --passphrase-file"):
        Consortium(closed.folder).renew_list(NOW)
    with pytest.raises(ConfigError, match="does not open with this passphrase"):
        Consortium(closed.folder, b"wrong horse").renew_list(NOW)


@pytest.mark.parametrize("site", ["coordinator", "../va", "va/..", "", "Va", "vа", "v a", "a" * 65, "va\0", "va.sign"])
def test_a_name_that_no_site_can_have_is_not_invited(office: Consortium, site: str):
    with pytest.raises(ConfigError, match="is no name of a site"):
        office.invite(site, 72, NOW)


@pytest.mark.parametrize("hours", [0, -1, 721, float("nan"), float("inf")])
def test_an_invitation_ends(office: Consortium, hours: float):
    with pytest.raises(ConfigError, match=r"--hours .*: wanted 1 to 720"):
        office.invite("va", hours, NOW)


def test_the_registry_does_not_hold_a_token(office: Consortium):
    token = office.invite("va", 72, NOW)
    everything = b"".join(path.read_bytes() for path in office.folder.rglob("*") if path.is_file())
    assert token.secret not in everything
    assert token.secret.hex().encode() not in everything
    assert len({token.secret.hex(), token.id, token.mac_key}) == 3


# ---- approving


def test_an_approved_site_is_in_the_roster_with_its_own_keys(office: Consortium):
    keys = enrolled(office, "va")
    assert roster(office).sites() == ["va"]
    assert roster(office).admits(tls_of(office, "va")) == "va"
    roster(office).check(signer("va", keys).sign("reply", {}), role="site")


def refused(office: Consortium, request: Request, said: str, at: datetime = NOW) -> None:
    before = office.registry()
    with pytest.raises(TrustRefused, match=said):
        office.approve(request, at)
    assert office.registry() == before


def test_an_unknown_token_is_refused(office: Consortium):
    refused(office, Request.by_token("va", new_keys(), Token.new()), "token is unknown here")


def test_a_token_replaced_by_a_later_one_is_refused(office: Consortium):
    first = office.invite("va", 72, NOW)
    second = office.invite("va", 72, NOW)
    refused(office, Request.by_token("va", new_keys(), first), "unknown here, or was replaced")
    office.approve(Request.by_token("va", new_keys(), second), NOW)


def test_an_expired_token_is_refused(office: Consortium):
    request = Request.by_token("va", new_keys(), office.invite("va", 24, NOW))
    refused(office, request, "token expired at 2026-03-02 12:00 UTC", NOW + timedelta(hours=25))


def test_a_token_for_another_site_is_refused(office: Consortium):
    refused(office, Request.by_token("hungarian", new_keys(), office.invite("va", 72, NOW)), "was given to another site")


def test_a_used_token_is_refused(office: Consortium):
    token = office.invite("va", 72, NOW)
    office.approve(Request.by_token("va", new_keys(), token), NOW)
    refused(office, Request.by_token("va", new_keys(), token), "used already, by another request")


def test_the_same_request_is_welcomed_again(office: Consortium):
    keys, token = new_keys(), office.invite("va", 24, NOW)
    first = office.approve(Request.by_token("va", keys, token), NOW)
    later = NOW + timedelta(days=3)  # the token has expired, and was used for this
    again = office.approve(Request.by_token("va", keys, token), later)
    for use in USES["site"]:
        assert again.certificates["va", use].public_key() == first.certificates["va", use].public_key()
    assert roster(office, later).admits(tls_of(office, "va")) == "va"


def test_a_request_changed_on_its_way_is_refused(office: Consortium):
    token = office.invite("va", 72, NOW)
    request, other = (Request.by_token("va", new_keys(), token) for _ in range(2))
    refused(office, replace(request, body=request.body | {"tls": other.body["tls"]}), "changed, or written without the token")
    refused(office, replace(request, voucher=request.voucher | {"mac": "00" * 32}), "changed, or written without the token")
    office.approve(request, NOW)


def test_a_key_without_proof_of_possession_is_refused(office: Consortium):
    token = office.invite("va", 72, NOW)
    for use in USES["site"]:
        keys = new_keys()
        asked = x509.load_pem_x509_csr(Request.by_token("va", keys, token).body[use].encode())
        der = bytearray(asked.public_bytes(Encoding.DER))
        der[-5] ^= 1
        broken = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM).decode()
        refused(office, vouched("va", keys, token, {use: broken}), f"does not prove possession of its {use} key")


def vouched(site: str, keys: Keys, token: Token, instead: dict[str, str]) -> Request:
    """A request with other parts, vouched for as if it were meant: what a hospital with its own program could send."""
    from wardround.common.trust import enrolment

    body = Request.by_token(site, keys, token).body | instead
    return Request(body, {"token": token.id, "mac": enrolment._mac(token.mac_key, body)})


def test_what_a_signing_request_asks_for_beyond_its_key_is_not_looked_at(office: Consortium):
    keys, token = new_keys(), office.invite("va", 72, NOW)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, COORDINATOR)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("fl.example.org")]), critical=False)
    greedy = builder.sign(keys["tls"], hashes.SHA256()).public_bytes(Encoding.PEM).decode()
    welcome = office.approve(vouched("va", keys, token, {"tls": greedy}), NOW)
    made = welcome.certificates["va", "tls"]
    plain = office.approve(Request.by_token("hungarian", new_keys(), office.invite("hungarian", 72, NOW)), NOW)
    assert name_of(made) == "va"
    assert {e.oid: e.value for e in made.extensions if e.oid.dotted_string[:8] != "2.5.29.1" or e.critical} == {
        e.oid: e.value
        for e in plain.certificates["hungarian", "tls"].extensions
        if e.oid.dotted_string[:8] != "2.5.29.1" or e.critical
    }


def test_keys_of_the_wrong_kind_are_refused(office: Consortium):
    token = office.invite("va", 72, NOW)
    swapped = Request.by_token("va", new_keys(), token).body
    for use, other in (("tls", "sign"), ("sign", "node"), ("node", "tls")):
        refused(office, vouched("va", new_keys(), token, {use: swapped[other]}), f"{use} key is of the wrong kind")
    heavy = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    asked = heavy.sign(rsa.generate_private_key(65537, 2048), hashes.SHA256()).public_bytes(Encoding.PEM).decode()
    refused(office, vouched("va", new_keys(), token, {"tls": asked}), "tls key is of the wrong kind")
    refused(office, vouched("va", new_keys(), token, {"tls": "noise"}), "tls key cannot be read")


def test_another_sites_keys_are_refused(office: Consortium):
    keys = enrolled(office, "va")
    token = office.invite("hungarian", 72, NOW)
    refused(office, Request.by_token("hungarian", keys, token), "key of hungarian belongs to another")


like_a_request = st.recursive(
    st.none() | st.text(max_size=5) | st.integers(),
    lambda inner: st.dictionaries(st.sampled_from(["body", "voucher", "site", *USES["site"], "token", "mac"]), inner),
    max_leaves=12,
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.text(max_size=80) | like_a_request.map(json.dumps))
def test_no_text_brings_the_reader_of_requests_down(text: str):
    with pytest.raises(TrustRefused, match="that is no enrolment request"):
        Request.parse(text)


# ---- renewing and revoking


def test_a_renewal_keeps_the_keys_and_needs_no_token(office: Consortium):
    keys = enrolled(office, "va")
    old = tls_of(office, "va")
    office.renew_list(LATER)
    office.approve(Request.by_signer(keys, signer("va", keys)), LATER)
    later = roster(office, LATER)
    assert later.admits(old) == later.admits(tls_of(office, "va")) == "va"
    assert later.tls("va").not_valid_after_utc == LATER + timedelta(days=90)


def test_a_renewal_by_anybody_else_is_refused(office: Consortium):
    keys, others = enrolled(office, "va"), enrolled(office, "hungarian")
    fresh, forged = new_keys(), signer("va", others)
    refused(office, Request.by_signer(keys, forged), "the renewal is not signed by va")
    refused(office, Request.by_signer(fresh, signer("stranger", fresh)), "stranger is not in the roster")
    changed = new_keys() | {"sign": keys["sign"]}
    refused(office, Request.by_signer(changed, signer("va", keys)), "a renewal keeps the keys")
    refused(office, Request(Request.by_signer(keys, forged).body, {"signature": "xyz"}), "has no signature")


def test_an_expired_or_revoked_site_cannot_renew(office: Consortium):
    keys = enrolled(office, "va")
    renewal = Request.by_signer(keys, signer("va", keys))
    late = NOW + timedelta(days=91)
    office.renew_list(late)
    refused(office, renewal, "va's sign certificate expired", late)
    office.revoke("va", "", NOW)
    refused(office, renewal, "the .* key of va was revoked")


def test_a_revoked_site_is_refused_until_it_comes_with_new_keys(office: Consortium):
    keys = enrolled(office, "va")
    people = roster(office)
    certificate = tls_of(office, "va")
    assert people.admits(certificate) == "va"
    assert office.revoke("va", "laptop lost", NOW) == 3
    assert office.revoke("va", "again", NOW) == 0
    with pytest.raises(TrustRefused, match="was revoked"):
        people.admits(certificate)
    assert (office.public / "roster" / "va.sign.crt").exists()  # for what it signed before
    token = office.invite("va", 72, NOW)
    refused(office, Request.by_token("va", keys, token), "the .* key of va was revoked; new keys are wanted")
    office.approve(Request.by_token("va", new_keys(), token), NOW)
    assert people.admits(tls_of(office, "va")) == "va"
    with pytest.raises(TrustRefused, match="was revoked"):
        people.admits(certificate)


def test_new_keys_take_the_old_ones_back(office: Consortium):
    enrolled(office, "va")
    old = tls_of(office, "va")
    enrolled(office, "va")
    with pytest.raises(TrustRefused, match="was revoked"):
        roster(office).admits(old)


def test_what_was_never_issued_cannot_be_revoked(office: Consortium):
    with pytest.raises(ConfigError, match="nothing was ever issued to 'va'"):
        office.revoke("va", "", NOW)


def test_the_list_is_renewed_without_taking_anything_back(office: Consortium):
    enrolled(office, "va")
    office.revoke("va", "", NOW)
    stale = NOW + timedelta(days=8)
    with pytest.raises(TrustRefused, match="nobody is admitted"):
        roster(office, stale).tls(COORDINATOR)
    assert office.renew_list(stale) == stale + timedelta(days=7)
    assert roster(office, stale).tls(COORDINATOR)
    assert roster(office, stale).sites() == []


def test_the_coordinator_is_renewed_and_rid_of_a_stolen_key(office: Consortium):
    key = roster(office).signer(COORDINATOR).public_key()
    assert office.renew_coordinator(LATER) == []
    renewed = roster(office, LATER).signer(COORDINATOR)
    assert (renewed.public_key(), renewed.not_valid_after_utc) == (key, LATER + timedelta(days=90))
    office.revoke(COORDINATOR, "stolen", LATER)
    with pytest.raises(TrustRefused, match="key of coordinator was revoked"):
        office.renew_coordinator(LATER)
    for use in USES["coordinator"]:
        (office.folder / "coordinator" / f"{use}.key").rename(office.folder / f"stolen.{use}")
    assert len(office.renew_coordinator(LATER)) == 2
    assert roster(office, LATER).signer(COORDINATOR).public_key() != key


# ---- accidents


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", range(6))
def test_an_approval_cut_short_anywhere_is_done_by_saying_it_again(
    office: Consortium, monkeypatch: pytest.MonkeyPatch, step: int
):
    keys = new_keys()
    request = Request.by_token("va", keys, office.invite("va", 72, NOW))
    whole: Callable[..., Path] = Path.replace
    calls = iter(range(100))

    def dies(path: Path, target: Path) -> Path:
        return full_disk() if next(calls) == step else whole(path, target)  # type: ignore[return-value]

    with monkeypatch.context() as crash:
        crash.setattr(Path, "replace", dies)
        if step < 5:  # the registry, the list, three certificates
            with pytest.raises(OSError, match="No space left"):
                office.approve(request, NOW)
        else:
            office.approve(request, NOW)
    registry = office.registry()
    for path in office.public.glob("roster/va.*.crt"):  # nothing is handed out that the registry could not take back
        serial = x509.load_pem_x509_certificate(path.read_bytes()).serial_number
        assert f"{serial:x}" in {issued.serial for issued in registry.issued}
    assert not list(office.folder.rglob(".*.draft"))
    office.approve(request, NOW)
    assert roster(office).admits(tls_of(office, "va")) == "va"
    assert office.revoke("va", "", NOW) == len([i for i in office.registry().issued if i.name == "va"])


def test_a_revocation_that_could_not_be_written_is_not_claimed(office: Consortium, monkeypatch: pytest.MonkeyPatch):
    enrolled(office, "va")
    before = office.registry()
    with monkeypatch.context() as crash:
        crash.setattr(Path, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            office.revoke("va", "", NOW)
    assert office.registry() == before
    assert roster(office).sites() == ["va"]


def test_two_administrators_at_once_lose_nothing(office: Consortium):
    sites = [f"site-{n}" for n in range(12)]
    threads = [threading.Thread(target=office.invite, args=(site, 72, NOW)) for site in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {invitation.site for invitation in office.registry().invitations} == set(sites)


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b'{"consortium": "heart"}', b"\xff", b"[" * 100_000])
def test_a_damaged_registry_is_refused(office: Consortium, content: bytes):
    (office.folder / "registry.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"registry\.json is (damaged|not a valid Registry)"):
        office.registry()


def test_a_registry_that_others_may_read_is_refused(office: Consortium):
    (office.folder / "registry.json").chmod(0o644)
    with pytest.raises(ConfigError, match="has mode 644"):
        office.invite("va", 72, NOW)


def test_a_registry_is_read_as_it_was_written(office: Consortium, tmp_path: Path):
    enrolled(office, "va")
    office.revoke("va", "laptop lost", NOW)
    registry = office.registry()
    registry.write(tmp_path / "copy.json")
    assert Registry.read(tmp_path / "copy.json") == registry
    assert {issued.reason for issued in registry.issued if issued.revoked} == {"laptop lost"}
    assert Subject("va", "tls").role == "site"
