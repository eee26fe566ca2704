"""How long the certificates of a trust folder still hold, and which of them want doing something about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from cryptography import x509

from wardround.common.errors import TrustRefused
from wardround.common.trust import certificates as rules
from wardround.common.trust import checks
from wardround.common.trust.certificates import USES, Subject

Level = Literal["ok", "warning", "error", "revoked"]
WARNING, ERROR = timedelta(days=30), timedelta(days=7)  # before a certificate expires
LIST_WARNING, LIST_ERROR = timedelta(days=2), timedelta(0)  # before a revocation list is stale


@dataclass(frozen=True)
class Status:
    """One line of the table: whose, what for, until when (UTC), and how urgent."""

    name: str
    use: str
    until: datetime | None  # None: missing or unreadable
    days_left: float | None
    level: Level
    note: str = ""

    def facts(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return asdict(self) | {"until": self.until and self.until.isoformat()}

    def line(self, width: int) -> str:
        """The same for a terminal, with room for names of `width` letters."""
        until = f"{self.until:%Y-%m-%d %H:%M} UTC" if self.until else "-"
        left = "-" if self.days_left is None else f"{self.days_left:.1f} days"
        return f"{self.name:<{width}}  {self.use:<15}  {until:<20}  {left:>12}  {self.level}{self.note and f': {self.note}'}"


def statuses(folder: Path, now: datetime) -> list[Status]:
    """The authority, the revocation list and everybody in the roster. A revoked certificate is no alarm: somebody meant it."""
    try:
        authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        revoked = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
        checks.check_list(revoked, authority, min(now, revoked.next_update_utc or now))  # by whom; until when is told below
    except (OSError, *rules.UNREADABLE, TrustRefused) as error:
        note = str(error) if isinstance(error, TrustRefused) else "ca.crt or crl.pem is missing or unreadable"
        return [Status("authority", "issue", None, None, "error", note)]
    rows = [
        _status("authority", "issue", authority.not_valid_after_utc, now, WARNING, ERROR),
        _status("authority", "revocation list", revoked.next_update_utc, now, LIST_WARNING, LIST_ERROR),
    ]
    return rows + list(_roster(folder, authority, revoked, now))


def worst(rows: list[Status]) -> Level:
    """The most urgent level of a table."""
    urgent: tuple[Level, ...] = ("error", "warning")
    return next((level for level in urgent if level in {row.level for row in rows}), "ok")


def table(rows: list[Status]) -> str:
    """The same for a terminal: one line each."""
    width = max(len(row.name) for row in rows)
    return "\n".join(row.line(width) for row in rows)


def _roster(
    folder: Path, authority: x509.Certificate, revoked: x509.CertificateRevocationList, now: datetime
) -> Iterator[Status]:
    names = {path.name.split(".")[0] for path in (folder / "roster").glob("*.crt")}
    for name in sorted(filter(rules.is_name, names)):
        signs_only = not (folder / "roster" / f"{name}.tls.crt").exists()  # all that a hospital has of the others
        for use in ("sign",) if signs_only else USES[rules.role_of(name)]:
            try:
                certificate = x509.load_pem_x509_certificate((folder / "roster" / f"{name}.{use}.crt").read_bytes())
                moment = min(max(now, certificate.not_valid_before_utc), certificate.not_valid_after_utc)
                checks.check_certificate(certificate, authority, Subject(name, use), moment)
            except (OSError, *rules.UNREADABLE, TrustRefused) as error:
                note = str(error) if isinstance(error, TrustRefused) else "missing or unreadable"
                yield Status(name, use, None, None, "error", note)
                continue
            if checks.is_revoked(certificate, revoked):
                until = certificate.not_valid_after_utc
                yield Status(name, use, until, _days(until, now), "revoked")
            else:
                yield _status(name, use, certificate.not_valid_after_utc, now, WARNING, ERROR)


def _status(name: str, use: str, until: datetime | None, now: datetime, warning: timedelta, error: timedelta) -> Status:
    if until is None:
        return Status(name, use, None, None, "error", "has no end")
    left = until - now
    level: Level = "error" if left <= error else "warning" if left <= warning else "ok"
    return Status(name, use, until, _days(until, now), level, "expired" if left < timedelta(0) else "")


def _days(until: datetime, now: datetime) -> float:
    return round((until - now) / timedelta(days=1), 1)
