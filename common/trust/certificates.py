"""Certificates of a consortium: who holds which key, what for, until when, and which were taken back.

X.509 (RFC 5280) with two extensions of our own, each a UTF8String: 1.3.6.1.4.1.99999.1.1 is the role, site or coordinator, and
1.3.6.1.4.1.99999.1.2 the use of the key, one of `Use`. The arc is for private use: nothing outside a consortium reads them.
A site's certificate for TLS is good for a client only, the coordinator's for a server only.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, Self, get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

Role = Literal["site", "coordinator"]
Use = Literal["tls", "sign", "node"]
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

UNREADABLE = (ValueError, x509.InvalidVersion)  # what cryptography raises of bytes that are no certificate
COORDINATOR = "coordinator"  # its name; no site may have it
USES: dict[Role, tuple[Use, ...]] = {"site": get_args(Use), "coordinator": ("tls", "sign")}
KEY_KINDS: dict[Use, str] = {"tls": "secp256r1", "sign": "ed25519", "node": "secp384r1"}
CERTIFICATE_DAYS, AUTHORITY_DAYS, LIST_DAYS = 90, 3650, 7
ROLE_OID, USE_OID = (ObjectIdentifier(f"1.3.6.1.4.1.99999.1.{n}") for n in (1, 2))

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")  # as in a plan, which is heavier to import
_CLOCKS_DIFFER = timedelta(minutes=5)
_EXTENDED = {"site": ExtendedKeyUsageOID.CLIENT_AUTH, "coordinator": ExtendedKeyUsageOID.SERVER_AUTH}


def is_name(text: str) -> bool:
    """Whether `text` can be a site's name: small letters, digits and hyphens, at most 64.

    >>> is_name("st-olav"), is_name("../ca"), is_name("sаint")  # the last with a Cyrillic letter
    (True, False, False)
    """
    return _NAME.fullmatch(text) is not None


def role_of(name: str) -> Role:
    """The role that goes with a name."""
    return "coordinator" if name == COORDINATOR else "site"


@dataclass(frozen=True)
class Subject:
    """Whom and what a certificate is for; `hosts` are the names a TLS server is reached by."""

    name: str
    use: Use
    hosts: tuple[str, ...] = ()

    @property
    def role(self) -> Role:
        """It follows from the name."""
        return role_of(self.name)

    def __str__(self) -> str:
        return f"{self.name}'s {self.use} certificate"


class Authority:
    """Who issues a consortium's certificates. Its key lies on a machine that needs no network."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self.key = key
        self.certificate = certificate

    @classmethod
    def found(cls, consortium: str, now: datetime, days: int = AUTHORITY_DAYS) -> Self:
        """A new one: P-384, and no other authority can stand between it and a certificate."""
        key = ec.generate_private_key(ec.SECP384R1())
        name = _x509_name(f"{consortium} authority")
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = _validity(x509.CertificateBuilder(), now, days).subject_name(name).issuer_name(name)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(usage, critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return cls(key, builder.sign(key, hashes.SHA384()))

    def issue(self, key: PublicKey, subject: Subject, now: datetime, days: int = CERTIFICATE_DAYS) -> x509.Certificate:
        """A certificate for `key`. Nothing else of what somebody asks for is looked at, so nothing else can be had."""
        usage = x509.KeyUsage(True, subject.use == "sign", False, False, False, False, False, False, False)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = _validity(x509.CertificateBuilder(), now, days).subject_name(_x509_name(subject.name))
        builder = builder.issuer_name(self.certificate.subject).public_key(key).serial_number(x509.random_serial_number())
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(usage, critical=True).add_extension(identifier, critical=False)
        builder = builder.add_extension(issuer, critical=False)
        for oid, text in ((ROLE_OID, subject.role), (USE_OID, subject.use)):
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, utf8_string(text)), critical=False)
        if subject.use == "tls":
            builder = builder.add_extension(x509.ExtendedKeyUsage([_EXTENDED[subject.role]]), critical=True)
        if subject.hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in subject.hosts])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA384())

    def revocation_list(
        self, revoked: Mapping[int, datetime], number: int, now: datetime, days: float = LIST_DAYS
    ) -> x509.CertificateRevocationList:
        """The serials taken back and when. `number` grows with every list, so an older one can be told."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        builder = builder.last_update(now - _CLOCKS_DIFFER).next_update(now + timedelta(days=days))
        builder = builder.add_extension(x509.CRLNumber(number), critical=False)
        for serial, at in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA384())


def name_of(certificate: x509.Certificate) -> str:
    """The one common name of the subject; empty where there is none, or several."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def fingerprint(data: x509.Certificate | bytes) -> str:
    """SHA-256 of a certificate (DER) or of bytes, in groups of four hex digits: to read out and compare.

    >>> fingerprint(b"")[:19]
    'E3B0-C442-98FC-1C14'
    """
    content = data if isinstance(data, bytes) else data.public_bytes(serialization.Encoding.DER)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(content)
    digits = digest.finalize().hex().upper()
    return "-".join(digits[i : i + 4] for i in range(0, 64, 4))


def is_fingerprint(text: str) -> bool:
    """Whether `text` is a whole one, however it is spaced."""
    return re.fullmatch(r"[0-9A-F]{64}", _bare(text)) is not None


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two fingerprints say the same, however they are spaced. Parts of one are not enough."""
    return _bare(one) == _bare(other) and is_fingerprint(one)


def key_kind(key: object) -> str:
    """The curve of a public key: secp256r1, secp384r1, ed25519, ...; empty for any other key."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "ed25519"
    return key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else ""


def pem(part: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    """As it lies in a file."""
    return part.public_bytes(serialization.Encoding.PEM)


def utc_now() -> datetime:
    """What the clock of this machine says."""
    return datetime.now(UTC)


def utf8_string(text: str) -> bytes:
    """A DER UTF8String of fewer than 128 letters, as the extensions of our own hold it."""
    return bytes([0x0C, len(text)]) + text.encode()


def _bare(text: str) -> str:
    return re.sub(r"[-:\s]", "", text).upper()


def _x509_name(common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "wardround"), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


def _validity(builder: x509.CertificateBuilder, now: datetime, days: float) -> x509.CertificateBuilder:
    return builder.not_valid_before(now - _CLOCKS_DIFFER).not_valid_after(now + timedelta(days=days))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
