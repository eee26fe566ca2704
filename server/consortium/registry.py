"""What a consortium remembers: invitations (never their tokens), every certificate issued, and which were taken back."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Self

from cryptography import x509
from pydantic import AwareDatetime, Field, StringConstraints

from wardround.common.config import Config
from wardround.common.errors import ConfigError
from wardround.common.trust.certificates import Subject, Use
from wardround.common.trust.enrolment import key_digest
from wardround.common.trust.private_files import read_private, replace_private

_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$")]
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Moment = Annotated[AwareDatetime, Field(strict=False)]


class Invitation(Config):
    """One token, known by what follows from it."""

    id: _Digest
    mac_key: _Digest
    site: _Name
    expires: _Moment
    used_by: str | None = None  # fingerprint of the request that used it


class Issued(Config):
    """One certificate."""

    serial: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,40}$")]
    name: _Name
    use: Use
    key: _Digest
    until: _Moment
    revoked: _Moment | None = None
    reason: str = ""

    @classmethod
    def of(cls, certificate: x509.Certificate, subject: Subject) -> Self:
        """The note of a certificate just made."""
        return cls(
            serial=f"{certificate.serial_number:x}",
            name=subject.name,
            use=subject.use,
            key=key_digest(certificate.public_key()),  # type: ignore[arg-type]
            until=certificate.not_valid_after_utc,
        )


class Registry(Config):
    """The whole of it, as one file."""

    consortium: _Name
    coordinator: str  # HOST:PORT, as hospitals are told
    hosts: Annotated[tuple[str, ...], Field(strict=False)]  # the coordinator's names
    list_number: Annotated[int, Field(ge=0)] = 0
    list_days: Annotated[float, Field(gt=0, le=365)] = 7.0
    invitations: Annotated[tuple[Invitation, ...], Field(strict=False)] = ()
    issued: Annotated[tuple[Issued, ...], Field(strict=False)] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises `ConfigError` if it is missing, damaged or open to others."""
        try:
            table: Any = json.loads(read_private(path))
        except (ValueError, RecursionError):
            raise ConfigError(f"{path} is damaged") from None
        if not isinstance(table, dict):
            raise ConfigError(f"{path} is damaged")
        return cls.build(table, source=str(path))

    def write(self, path: Path) -> None:
        """All or nothing; raises `OSError` and leaves what was there."""
        replace_private(path, self.model_dump_json(indent=1).encode())

    def invite(self, invitation: Invitation, now: datetime) -> Self:
        """With one more invitation; earlier ones of the site that nobody used are void, and so are expired ones."""
        kept = [old for old in self.invitations if old.used_by or (old.site != invitation.site and old.expires > now)]
        return self.model_copy(update={"invitations": (*kept, invitation)})

    def invitation(self, id: str | None) -> Invitation | None:
        """By what a token's holder sends."""
        return next((invitation for invitation in self.invitations if invitation.id == id), None)

    def use(self, invitation: Invitation, request: str) -> Self:
        """With `invitation` used up by the request of that fingerprint."""
        used = invitation.model_copy(update={"used_by": request})
        return self.model_copy(update={"invitations": tuple(used if i == invitation else i for i in self.invitations)})

    def issue(self, certificates: dict[Subject, x509.Certificate]) -> Self:
        """With the certificates noted, so that they can be taken back."""
        noted = tuple(Issued.of(certificate, subject) for subject, certificate in certificates.items())
        return self.model_copy(update={"issued": (*self.issued, *noted)})

    def revoke(self, name: str, now: datetime, reason: str, *, but: frozenset[str] = frozenset()) -> Self:
        """With every certificate of `name` taken back, but those for the keys with these digests."""

        def taken(issued: Issued) -> Issued:
            if issued.name != name or issued.revoked or issued.key in but:
                return issued
            return issued.model_copy(update={"revoked": now, "reason": reason})

        return self.model_copy(update={"issued": tuple(map(taken, self.issued))})

    def revoked(self) -> dict[int, datetime]:
        """Serials that were taken back, and when."""
        return {int(issued.serial, 16): issued.revoked for issued in self.issued if issued.revoked}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One administrator at a time; the second waits."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
