"""Whether certificates and revocation lists hold: by whom, for whom, for what, and now."""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ObjectIdentifier

from wardround.common.errors import TrustRefused
from wardround.common.trust.certificates import KEY_KINDS, ROLE_OID, USE_OID, Subject, key_kind, name_of, utf8_string


def check_authority(certificate: x509.Certificate, now: datetime) -> None:
    """Return if it may issue certificates now; whose it is, only its fingerprint can tell.

    Raises:
        TrustRefused: it is not self-signed, no authority, or not in its time.
    """
    try:
        certificate.verify_directly_issued_by(certificate)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension):
        raise TrustRefused("the authority's certificate is not one") from None
    if not (constraints.ca and constraints.path_length == 0 and usage.key_cert_sign and usage.crl_sign):
        raise TrustRefused("the authority's certificate is not one")
    check_time(certificate, "the authority's certificate", now)


def check_list(revoked: x509.CertificateRevocationList, authority: x509.Certificate, now: datetime) -> None:
    """Return if the revocation list is the authority's and not past its time.

    Raises:
        TrustRefused: signed by another, or stale: then nobody can be told from those who were taken back.
    """
    key = authority.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not revoked.is_signature_valid(key):
        raise TrustRefused("the revocation list is not signed by this consortium's authority")
    check_list_time(revoked, now)


def check_list_time(revoked: x509.CertificateRevocationList, now: datetime) -> None:
    """Return if the list still holds; raises `TrustRefused` if it is stale."""
    until = revoked.next_update_utc
    if until is None or until < now:
        raise TrustRefused(f"the revocation list held until {_day(until)}; nobody is admitted before there is a newer one")


def check_certificate(certificate: x509.Certificate, authority: x509.Certificate, subject: Subject, now: datetime) -> None:
    """Return if the authority issued `certificate` for this name, role and use, and it is in its time.

    Raises:
        TrustRefused: saying which does not hold.
    """
    who = str(subject)
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        raise TrustRefused(f"{who} is not issued by this consortium's authority") from None
    if name_of(certificate) != subject.name:
        raise TrustRefused(f"{who} is in another's name")
    if _private(certificate, ROLE_OID) != subject.role or _private(certificate, USE_OID) != subject.use:
        raise TrustRefused(f"{who} is for another role or use")
    if key_kind(certificate.public_key()) != KEY_KINDS[subject.use]:
        raise TrustRefused(f"{who} holds a key of the wrong kind")
    check_time(certificate, who, now)


def check_time(certificate: x509.Certificate, who: str, now: datetime) -> None:
    """Return if `certificate` is in its time; raises `TrustRefused` if it has expired, or not begun. `who` names it."""
    if now < certificate.not_valid_before_utc:
        raise TrustRefused(f"{who} is not valid before {_day(certificate.not_valid_before_utc)}; is the clock right?")
    if now > certificate.not_valid_after_utc:
        raise TrustRefused(f"{who} expired on {_day(certificate.not_valid_after_utc)}")


def is_revoked(certificate: x509.Certificate, revoked: x509.CertificateRevocationList) -> bool:
    """Whether the list takes it back."""
    return revoked.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None


def list_number(revoked: x509.CertificateRevocationList) -> int:
    """Grows with every list; -1 for a list without a number."""
    try:
        return revoked.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return -1


def _day(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC" if at else "no day at all"


def _private(certificate: x509.Certificate, oid: ObjectIdentifier) -> str:
    try:
        value = certificate.extensions.get_extension_for_oid(oid).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return ""
    raw = value.value if isinstance(value, x509.UnrecognizedExtension) else b""
    text = raw[2:].decode(errors="replace")
    return text if raw == utf8_string(text[:127]) else ""
