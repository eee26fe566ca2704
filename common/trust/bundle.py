"""The part of a trust folder that travels: a welcome to a hospital, and later news of renewals and revocations.

It needs no protection on its way: each part is signed by the consortium's authority, and that one is pinned.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from cryptography import x509

from wardround.common.errors import TrustRefused
from wardround.common.files import write_atomically
from wardround.common.trust import certificates as rules
from wardround.common.trust import checks
from wardround.common.trust.certificates import USES, Subject, Use
from wardround.common.trust.signing import canonical

LARGEST_BUNDLE = 16 << 20  # characters

Holder = tuple[str, Use]
_Part = x509.Certificate | x509.CertificateRevocationList


@dataclass(frozen=True)
class Bundle:
    """The authority, its revocation list, and certificates by name and use."""

    authority: x509.Certificate
    revoked: x509.CertificateRevocationList
    certificates: Mapping[Holder, x509.Certificate]

    @classmethod
    def of(cls, folder: Path, names: Collection[str], signers: Collection[str] = ()) -> Self:
        """What a trust folder has of `names`, and how `signers` sign; raises `TrustRefused` where something cannot be read."""
        holders: set[Holder] = {(name, use) for name in names for use in USES[rules.role_of(name)]}
        holders |= {(name, "sign") for name in signers}
        paths = {(name, use): folder / "roster" / f"{name}.{use}.crt" for name, use in sorted(holders)}
        try:
            return cls(
                x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()),
                x509.load_pem_x509_crl((folder / "crl.pem").read_bytes()),
                {holder: x509.load_pem_x509_certificate(path.read_bytes()) for holder, path in paths.items()},
            )
        except (OSError, *rules.UNREADABLE) as error:
            raise TrustRefused("the trust folder is not whole", detail=f"{folder}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `text()` wrote; raises `TrustRefused` for anything else. Nothing in it is believed before `check`."""
        refused = TrustRefused("that is no welcome")
        if len(text) > LARGEST_BUNDLE:
            raise refused
        try:
            found: Any = json.loads(text)
            parts = {
                _holder(label): x509.load_pem_x509_certificate(pem.encode()) for label, pem in found["certificates"].items()
            }
            authority = x509.load_pem_x509_certificate(found["authority"].encode())
            revoked = x509.load_pem_x509_crl(found["list"].encode())
        except (*rules.UNREADABLE, RecursionError, TypeError, KeyError, AttributeError):
            raise refused from None
        return cls(authority, revoked, parts)

    def text(self) -> str:
        """One line of JSON; all of it is public."""
        parts = {f"{name}.{use}": rules.pem(part).decode() for (name, use), part in self.certificates.items()}
        fields = {"authority": rules.pem(self.authority).decode(), "list": rules.pem(self.revoked).decode()}
        return canonical(fields | {"certificates": parts}).decode()

    def check(self, pinned: str, now: datetime) -> None:
        """Return if all of it holds now, under the authority with the pinned fingerprint.

        Raises:
            TrustRefused: another authority, a stale list, a certificate that is not its, expired or revoked.
        """
        if not rules.same_fingerprint(rules.fingerprint(self.authority), pinned):
            raise TrustRefused("this is from another authority than the one whose fingerprint was given at enrolment")
        checks.check_authority(self.authority, now)
        checks.check_list(self.revoked, self.authority, now)
        for (name, use), certificate in self.certificates.items():
            checks.check_certificate(certificate, self.authority, Subject(name, use), now)
            if checks.is_revoked(certificate, self.revoked):
                raise TrustRefused(f"{Subject(name, use)} was revoked")

    def only(self, names: Collection[str]) -> Self:
        """The same without other people's certificates, but for those that verify what they sign."""
        kept = {holder: part for holder, part in self.certificates.items() if holder[0] in names or holder[1] == "sign"}
        return type(self)(self.authority, self.revoked, kept)

    def install(self, folder: Path) -> list[str]:
        """Put what was checked into a trust folder; what is newer there stays. Returns the files that changed.

        A folder that is not there yet appears whole. In one that is there, files change one by one: all of them are of one
        authority, so a mixture of old and new holds as well as either.

        Raises:
            TrustRefused: the folder is of another authority.
            OSError: the disk is full or read-only.
        """
        parts = {f"roster/{name}.{use}.crt": part for (name, use), part in self.certificates.items()}
        files: dict[str, _Part] = {"ca.crt": self.authority, "crl.pem": self.revoked, **parts}
        if not folder.exists():
            _appear(folder, {name: rules.pem(part) for name, part in files.items()})
            return sorted(files)
        if Bundle.of(folder, ()).authority != self.authority:
            raise TrustRefused("this is from another authority than the one enrolled with", detail=str(folder))
        changed = [name for name, part in files.items() if _is_newer(part, folder / name)]
        for name in changed:
            write_atomically(folder / name, rules.pem(files[name]))
        return sorted(changed)


def _holder(label: str) -> Holder:
    name, _, use = label.partition(".")
    if not rules.is_name(name) or use not in USES[rules.role_of(name)]:
        raise ValueError
    return name, use


def _is_newer(part: _Part, path: Path) -> bool:
    try:
        there = path.read_bytes()
        if isinstance(part, x509.Certificate):
            return part.not_valid_before_utc > x509.load_pem_x509_certificate(there).not_valid_before_utc
        return checks.list_number(part) > checks.list_number(x509.load_pem_x509_crl(there))
    except (OSError, *rules.UNREADABLE):
        return True  # missing or damaged


def _appear(folder: Path, files: Mapping[str, bytes]) -> None:
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # left by a crash
    (draft / "roster").mkdir(parents=True)
    for name, data in files.items():
        write_atomically(draft / name, data)
    draft.rename(folder)
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
