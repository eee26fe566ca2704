"""Who may take part right now: a trust folder read again whenever a file in it changes.

    ca.crt   crl.pem   roster/NAME.USE.crt, a file for every use of a key

Nothing in the folder is secret, and nothing in it is believed: every certificate must chain to ca.crt, and without a revocation
list in its time nobody is admitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Generic, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from wardround.common.errors import SignatureRefused, TrustRefused
from wardround.common.trust import certificates as rules
from wardround.common.trust import checks
from wardround.common.trust.certificates import COORDINATOR, USES, Role, Subject, Use
from wardround.common.trust.signing import Signed, verify

T = TypeVar("T")
_LARGEST = 1 << 20  # bytes of a file here
_MOST_ADMITTED = 1000  # certificates of connections that are remembered as checked


class Roster:
    """The people of a trust folder; `now` is the clock."""

    def __init__(self, folder: Path, *, now: Callable[[], datetime] = rules.utc_now) -> None:
        self.folder = folder
        self._now = now
        self._authority = _Watched(folder / "ca.crt", x509.load_pem_x509_certificate)
        self._list = _Watched(folder / "crl.pem", x509.load_pem_x509_crl)
        self._entries: dict[tuple[str, Use], _Watched[x509.Certificate]] = {}
        self._checked_issuer: object = None  # the stamps of what was checked last, here and below
        self._checked: dict[tuple[str, Use], object] = {}
        self._admitted: dict[bytes, tuple[object, str, x509.Certificate]] = {}

    def authority(self) -> x509.Certificate:
        """The authority's certificate, whose fingerprint is pinned elsewhere; raises `TrustRefused` if it is none."""
        return self._issuer().authority

    def signer(self, name: str) -> x509.Certificate:
        """The certificate that verifies what `name` signs.

        Raises:
            TrustRefused: unknown, revoked, expired, for another role, or the revocation list is stale.
        """
        return self._valid(name, "sign")

    def tls(self, name: str) -> x509.Certificate:
        """The TLS certificate of `name`; refused as `signer` does."""
        return self._valid(name, "tls")

    def node_key(self, name: str) -> bytes:
        """The public key by which Flower knows a site, as Flower keeps it (PEM); refused as `signer` does."""
        key = self._valid(name, "node").public_key()
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def admits(self, der: bytes) -> str:
        """The site that a client's TLS certificate (DER) belongs to.

        A site that renews has two certificates for one key for a while; both are good.

        Raises:
            TrustRefused: unknown, revoked, expired, no site's, another key than the roster's, or the list is stale.
        """
        issuer = self._issuer()
        known = self._admitted.get(der)
        name, certificate = known[1:] if known else self._read_client(der)
        entry, entry_stamp = self._entry(name, "tls")
        stamps = (issuer.stamps, entry_stamp)
        if known is None or known[0] != stamps:
            issuer.check(certificate, Subject(name, "tls"), self._now())
            if entry.public_key() != certificate.public_key():
                raise TrustRefused(f"{name}'s certificate is not for the key in the roster")
            if len(self._admitted) >= _MOST_ADMITTED:
                self._admitted.clear()
            self._admitted[der] = (stamps, name, certificate)
        checks.check_time(certificate, str(Subject(name, "tls")), self._now())  # while files stay, only the clock changes
        return name

    def sites(self) -> list[str]:
        """The sites all of whose certificates hold now, in order of their names."""
        return [name for name in self.names() if name != COORDINATOR and self._whole(name)]

    def names(self) -> list[str]:
        """Everybody in the folder, whether their certificates hold or not."""
        found = {path.name.removesuffix(".tls.crt") for path in (self.folder / "roster").glob("*.tls.crt")}
        return sorted(name for name in found if rules.is_name(name))

    def check(self, signed: Signed, *, role: Role) -> None:
        """Return if a statement is signed by who it says, with the role that is wanted.

        Raises:
            SignatureRefused: the signature is not theirs, or theirs is another role.
            TrustRefused: the signer's certificate does not hold, as in `signer`.
        """
        if rules.role_of(signed.signer) != role:
            raise SignatureRefused(f"the {signed.kind} is signed by {signed.signer}, who has not the role of a {role}")
        verify(signed, self.signer(signed.signer))

    # ---- below: one certificate

    def _valid(self, name: str, use: Use) -> x509.Certificate:
        issuer, subject = self._issuer(), Subject(name, use)
        certificate, stamp = self._entry(name, use)
        stamps = (issuer.stamps, stamp)
        if self._checked.get((name, use)) != stamps:
            issuer.check(certificate, subject, self._now())
            self._checked[name, use] = stamps
        checks.check_time(certificate, str(subject), self._now())
        return certificate

    def _read_client(self, der: bytes) -> tuple[str, x509.Certificate]:
        try:
            certificate = x509.load_der_x509_certificate(der)
            name = rules.name_of(certificate)
        except rules.UNREADABLE:
            raise TrustRefused("the client's certificate cannot be read") from None
        if not rules.is_name(name) or name == COORDINATOR:
            raise TrustRefused("the client's certificate is no site's")
        return name, certificate

    def _whole(self, name: str) -> bool:
        try:
            for use in USES["site"]:
                self._valid(name, use)
        except TrustRefused:
            return False
        return True

    def _entry(self, name: str, use: Use) -> tuple[x509.Certificate, object]:
        if not rules.is_name(name) or use not in USES[rules.role_of(name)]:
            raise TrustRefused("nobody of that name can be in the roster", detail=f"asked for {name[:100]!r}, {use}")
        path = self.folder / "roster" / f"{name}.{use}.crt"
        watched = self._entries.get((name, use)) or _Watched(
            path, x509.load_pem_x509_certificate, f"{name} is not in the roster"
        )
        found = watched.read()
        self._entries[name, use] = watched  # only now: strangers may make up any number of names
        return found

    def _issuer(self) -> _Issuer:
        now = self._now()
        (authority, one), (revoked, other) = self._authority.read(), self._list.read()
        if self._checked_issuer != (one, other):
            checks.check_authority(authority, now)
            checks.check_list(revoked, authority, now)
            self._checked_issuer = (one, other)
        checks.check_time(authority, "the authority's certificate", now)
        checks.check_list_time(revoked, now)
        return _Issuer(authority, revoked, (one, other))


@dataclass(frozen=True)
class _Issuer:
    """The authority and its list, as checked from files with these stamps."""

    authority: x509.Certificate
    revoked: x509.CertificateRevocationList
    stamps: object

    def check(self, certificate: x509.Certificate, subject: Subject, now: datetime) -> None:
        checks.check_certificate(certificate, self.authority, subject, now)
        if checks.is_revoked(certificate, self.revoked):
            raise TrustRefused(f"{subject.name}'s {subject.use} certificate was revoked")


class _Watched(Generic[T]):
    """A file that is parsed again when it changed. What cannot be read or parsed is refused, however good it was before."""

    def __init__(self, path: Path, parse: Callable[[bytes], T], missing: str = "") -> None:
        self._path = path
        self._parse = parse
        self._missing = missing or f"there is no {path.name}"
        self._held: tuple[T, object] | None = None

    def read(self) -> tuple[T, object]:
        """The value, and a stamp that changes with the file."""
        held = self._held  # replaced as a whole, so that threads may share a roster
        try:
            found = self._path.stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if held is None or held[1] != stamp:
                if found.st_size > _LARGEST:
                    raise ValueError
                held = self._held = (self._parse(self._path.read_bytes()), stamp)
        except FileNotFoundError:
            raise TrustRefused(self._missing, detail=str(self._path)) from None
        except (OSError, *rules.UNREADABLE):
            raise TrustRefused(f"{self._path.name} cannot be read", detail=str(self._path)) from None
        return held
