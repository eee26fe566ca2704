"""What an administrator of the consortium does: found it, invite, approve, revoke, renew.

    ca/{ca.key,ca.crt}   registry.json   public/ (the trust folder)   coordinator/{tls,sign}.key

The registry is written before anything that follows from it is handed out, so a certificate that exists can always be revoked,
and whatever was cut short is done by saying it again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from wardround.common.errors import ConfigError, TrustRefused
from wardround.common.files import write_atomically
from wardround.common.trust import certificates as rules
from wardround.common.trust.addresses import address, written
from wardround.common.trust.bundle import Bundle
from wardround.common.trust.certificates import COORDINATOR, LIST_DAYS, USES, Authority, PublicKey, Subject, Use
from wardround.common.trust.enrolment import Request, Token, key_digest, key_text, new_key, read_key
from wardround.common.trust.private_files import make_private_folder, read_private, write_private
from wardround.common.trust.roster import Roster
from wardround.server.consortium.registry import Invitation, Registry, locked

MOST_HOURS = 720  # of an invitation


@dataclass(frozen=True)
class Founding:
    """What a new consortium is told at the start; addresses are HOST or HOST:PORT."""

    name: str
    coordinator: str
    also_hosts: tuple[str, ...] = ()
    list_days: float = LIST_DAYS


class Consortium:
    """An opened consortium folder. `passphrase` opens the authority's key, where it has one."""

    def __init__(self, folder: Path, passphrase: bytes | None = None) -> None:
        if not (folder / "registry.json").exists():
            raise ConfigError(f"{folder} is no consortium folder; `wardround init-consortium` makes one")
        self.folder = folder
        self.public = folder / "public"
        self._passphrase = passphrase

    @classmethod
    def found(cls, folder: Path, founding: Founding, now: datetime, passphrase: bytes | None = None) -> Consortium:
        """A new consortium at `folder`, whole or not at all.

        Raises:
            ConfigError: the folder is there and not empty, or a name or address is none.
        """
        if not rules.is_name(founding.name):
            raise ConfigError(f"--name {founding.name[:100]!a}: wanted small letters, digits and hyphens")
        folder = folder.resolve()
        host, port = address(founding.coordinator)
        hosts = tuple(dict.fromkeys([host, *(address(also)[0] for also in founding.also_hosts)]))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is there and not empty; a consortium is founded once")
        draft = folder.with_name(f".{folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)  # left by a crash
        make_private_folder(draft)
        for part in ("ca", "coordinator"):
            make_private_folder(draft / part)
        (draft / "public" / "roster").mkdir(parents=True)
        authority = Authority.found(founding.name, now)
        write_private(draft / "ca" / "ca.key", _key_text(authority.key, passphrase))
        for place in ("ca", "public"):
            write_atomically(draft / place / "ca.crt", rules.pem(authority.certificate))
        registry = Registry(
            consortium=founding.name, coordinator=written(host, port), hosts=hosts, list_days=founding.list_days
        )
        registry.write(draft / "registry.json")
        cls(draft, passphrase).renew_coordinator(now)
        draft.replace(folder)
        return cls(folder, passphrase)

    @property
    def fingerprint(self) -> str:
        """Of the authority: what hospitals are given out of band."""
        return rules.fingerprint(x509.load_pem_x509_certificate((self.folder / "ca" / "ca.crt").read_bytes()))

    def registry(self) -> Registry:
        """As it is now."""
        return Registry.read(self.folder / "registry.json")

    def invite(self, site: str, hours: float, now: datetime) -> Token:
        """A token for `site`, kept nowhere; it voids an earlier one that nobody used.

        Raises:
            ConfigError: no name of a site, or hours below 1 or above 720.
        """
        if not rules.is_name(site) or site == COORDINATOR:
            raise ConfigError(f"{site[:100]!a} is no name of a site; wanted small letters, digits and hyphens")
        if not 1 <= hours <= MOST_HOURS:
            raise ConfigError(f"--hours {hours:g}: wanted 1 to {MOST_HOURS}")
        token = Token.new()
        with locked(self.folder):
            invitation = Invitation(id=token.id, mac_key=token.mac_key, site=site, expires=now + timedelta(hours=hours))
            self._write(self.registry().invite(invitation, now))
        return token

    def approve(self, request: Request, now: datetime) -> Bundle:
        """Issue what a vouched-for request asks for, and return the welcome. The same request again gets a welcome again.

        Only public keys are taken from the request: names, roles and uses are the registry's.

        Raises:
            TrustRefused: an unknown, used or expired token, another site's, a renewal that does not hold, a key without proof
                of possession, of another site, or taken back.
        """
        with locked(self.folder):
            registry = self.registry()
            keys = request.public_keys()
            _check_keys(registry, request.site, keys)
            if request.token_id is None:
                self._check_renewal(request, keys, now)
            else:
                registry = registry.use(_invitation(registry, request, now), request.fingerprint)
            mine = frozenset(map(key_digest, keys.values()))
            registry = registry.revoke(request.site, now, "new keys", but=mine)  # one site never has two sets of keys
            self._issue(registry, {Subject(request.site, use): key for use, key in keys.items()}, now)
            return Bundle.of(self.public, (COORDINATOR, request.site))

    def revoke(self, name: str, reason: str, now: datetime) -> int:
        """Take back every certificate of `name`; returns how many. What it signed before can still be read.

        Raises:
            ConfigError: nothing was ever issued to that name.
        """
        with locked(self.folder):
            before = self.registry()
            if name not in {issued.name for issued in before.issued}:
                raise ConfigError(f"nothing was ever issued to {name[:100]!a}")
            after = before.revoke(name, now, reason)
            self._publish(after, self._authority(), now)
            return len(after.revoked()) - len(before.revoked())

    def renew_list(self, now: datetime) -> datetime:
        """A fresh revocation list without taking anything back; returns until when it holds."""
        with locked(self.folder):
            registry = self.registry()
            self._publish(registry, self._authority(), now)
            return now + timedelta(days=registry.list_days)

    def renew_coordinator(self, now: datetime) -> list[Path]:
        """New certificates for the coordinator, and new keys where its old ones were moved away; returns those.

        Raises:
            TrustRefused: its keys were taken back; move them away first.
        """
        with locked(self.folder):
            made: list[Path] = []
            keys: dict[Use, PublicKey] = {}
            for use in USES["coordinator"]:
                path = self.folder / "coordinator" / f"{use}.key"
                if not path.exists():
                    write_private(path, key_text(new_key(use), use))
                    made.append(path)
                keys[use] = read_key(path, use).public_key()
            registry = self.registry()
            _check_keys(registry, COORDINATOR, keys)
            registry = registry.revoke(COORDINATOR, now, "new keys", but=frozenset(map(key_digest, keys.values())))
            hosts: dict[Use, tuple[str, ...]] = {"tls": registry.hosts}
            self._issue(registry, {Subject(COORDINATOR, use, hosts.get(use, ())): key for use, key in keys.items()}, now)
            return made

    # ---- below: one step of these

    def _check_renewal(self, request: Request, keys: dict[Use, PublicKey], now: datetime) -> None:
        roster = Roster(self.public, now=lambda: now)
        roster.check(request.as_signed(), role="site")
        current = {use: Bundle.of(self.public, (request.site,)).certificates[request.site, use].public_key() for use in keys}
        if current != keys:
            raise TrustRefused("a renewal keeps the keys that are enrolled; new keys want a new invitation")

    def _issue(self, registry: Registry, keys: dict[Subject, PublicKey], now: datetime) -> None:
        authority = self._authority()
        made = {subject: authority.issue(key, subject, now) for subject, key in keys.items()}
        self._publish(registry.issue(made), authority, now)
        for subject, certificate in made.items():
            write_atomically(self.public / "roster" / f"{subject.name}.{subject.use}.crt", rules.pem(certificate))

    def _publish(self, registry: Registry, authority: Authority, now: datetime) -> None:
        registry = registry.model_copy(update={"list_number": registry.list_number + 1})
        revoked = authority.revocation_list(registry.revoked(), registry.list_number, now, registry.list_days)
        self._write(registry)
        write_atomically(self.public / "crl.pem", rules.pem(revoked))

    def _write(self, registry: Registry) -> None:
        registry.write(self.folder / "registry.json")

    def _authority(self) -> Authority:
        path = self.folder / "ca" / "ca.key"
        try:
            key = serialization.load_pem_private_key(read_private(path), self._passphrase)
        except TypeError:
            locked_up = self._passphrase is None
            raise ConfigError(f"{path} {'wants its --passphrase-file' if locked_up else 'has no passphrase'}") from None
        except ValueError:
            raise ConfigError(f"{path} does not open with this passphrase, or is damaged") from None
        certificate = x509.load_pem_x509_certificate((self.folder / "ca" / "ca.crt").read_bytes())
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(f"{path} is not the key of ca.crt")
        return Authority(key, certificate)


def _invitation(registry: Registry, request: Request, now: datetime) -> Invitation:
    invitation = registry.invitation(request.token_id)
    if invitation is None:
        raise TrustRefused("the request's token is unknown here, or was replaced by a later one")
    if not request.is_vouched_by(invitation.mac_key):
        raise TrustRefused("the request was changed, or written without the token")
    if invitation.site != request.site:
        raise TrustRefused("the request's token was given to another site")
    if invitation.used_by not in (None, request.fingerprint):
        raise TrustRefused("the request's token was used already, by another request")
    if invitation.used_by is None and invitation.expires < now:
        raise TrustRefused(f"the request's token expired at {invitation.expires:%Y-%m-%d %H:%M} UTC; invite the site again")
    return invitation


def _check_keys(registry: Registry, name: str, keys: dict[Use, PublicKey]) -> None:
    for use, key in keys.items():
        for issued in registry.issued:
            if issued.key == key_digest(key) and (issued.revoked or (issued.name, issued.use) != (name, use)):
                said = (
                    "was revoked" if issued.name == name and issued.use == use else "belongs to another, or is for another use"
                )
                raise TrustRefused(f"the {use} key of {name} {said}; new keys are wanted")


def _key_text(key: ec.EllipticCurvePrivateKey, passphrase: bytes | None) -> bytes:
    closed = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, closed)
