"""Where a hospital keeps its keys and whom it trusts, as its site file says. Reads two lines of it, imports no policy.

state/keys/USE.key     secret, made here, never sent; one for every use
state/trust/           the roster of the coordinator and of this site
state/enrolment.json   the fingerprint that was given out of band, and where the coordinator is
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from wardround.common.config import read_text
from wardround.common.errors import ConfigError, TrustRefused
from wardround.common.trust.addresses import address
from wardround.common.trust.bundle import Bundle
from wardround.common.trust.certificates import (
    COORDINATOR,
    Use,
    fingerprint,
    is_fingerprint,
    is_name,
    same_fingerprint,
    utc_now,
)
from wardround.common.trust.private_files import read_private, replace_private
from wardround.common.trust.roster import Roster
from wardround.common.trust.signing import Signer


@dataclass(frozen=True)
class Enrolment:
    """What a hospital was told, by telephone or on paper, before anything came over a network."""

    authority: str  # fingerprint of the consortium's authority
    coordinator: str  # HOST:PORT


@dataclass(frozen=True)
class SiteFolder:
    """A site's name, and the folder of its state."""

    name: str
    state: Path

    @classmethod
    def load(cls, site_file: Path) -> Self:
        """Of a site file; raises `ConfigError` if it names no site. The rest of the file is not looked at."""
        try:
            table = tomllib.loads(read_text(site_file))
        except (ValueError, RecursionError):
            raise ConfigError(f"{site_file} is not valid TOML; `wardround ledger {site_file}` says where") from None
        name, state = table.get("site"), table.get("state", "state")
        if not isinstance(name, str) or not is_name(name) or name == COORDINATOR:
            raise ConfigError(
                f"{site_file}: site: wanted a name of small letters, digits and hyphens (got {str(name)[:100]!a})"
            )
        if not isinstance(state, str):
            raise ConfigError(f"{site_file}: state: wanted the path of a folder")
        return cls(name, site_file.resolve().parent / state)

    @property
    def keys(self) -> Path:
        """The folder of secrets."""
        return self.state / "keys"

    @property
    def trust(self) -> Path:
        """The folder that a `Roster` reads."""
        return self.state / "trust"

    def key(self, use: Use) -> Path:
        """The file of one secret key."""
        return self.keys / f"{use}.key"

    @property
    def is_enrolled(self) -> bool:
        """Whether a welcome was installed."""
        return self.trust.exists()

    def signer(self) -> Signer:
        """Who signs for this site; raises `ConfigError` if the key is missing or open to others."""
        return Signer.load(self.name, self.key("sign"))

    def enrolment(self) -> Enrolment:
        """What was noted at enrolment; raises `ConfigError` if nothing was, or it is damaged."""
        path = self.state / "enrolment.json"
        if not path.exists():
            raise ConfigError(f"{self.name} is not enrolled: there is no {path}; run `wardround enroll` with the token first")
        try:
            found: Any = json.loads(read_private(path))
            noted = Enrolment(**found)
            address(noted.coordinator)
            if not is_fingerprint(noted.authority):
                raise ValueError
        except (ValueError, TypeError, RecursionError, ConfigError) as error:
            why = f": {error}" if isinstance(error, ConfigError) else ""
            raise ConfigError(f"{path} is damaged{why}") from None
        return noted

    def take_news(self, text: str, now: datetime) -> list[str]:
        """Put a newer revocation list, and newer certificates, into the trust folder.

        `text` is a `Bundle` from anywhere: what is in it proves itself. Returns the files that changed.

        Raises:
            ConfigError: the site is not enrolled.
            TrustRefused: it is of another authority, stale, or something in it does not hold; nothing was changed.
        """
        noted = self._enrolled()
        news = Bundle.parse(text).only((COORDINATOR, self.name))
        news.check(noted.authority, now)
        return news.install(self.trust)

    def note(self, enrolment: Enrolment) -> None:
        """Write down what was told."""
        text = json.dumps({"authority": enrolment.authority, "coordinator": enrolment.coordinator}, indent=2)
        replace_private(self.state / "enrolment.json", text.encode())

    def roster(self, *, now: Callable[[], datetime] = utc_now) -> Roster:
        """The site's roster.

        Raises:
            ConfigError: the site is not enrolled.
            TrustRefused: the folder is not of the authority whose fingerprint was noted.
        """
        noted = self._enrolled()
        roster = Roster(self.trust, now=now)
        if not same_fingerprint(fingerprint(roster.authority()), noted.authority):
            raise TrustRefused("the trust folder is of another authority than the one whose fingerprint was given at enrolment")
        return roster

    def _enrolled(self) -> Enrolment:
        noted = self.enrolment()
        if not self.is_enrolled:
            raise ConfigError(f"{self.name} is not enrolled: the welcome is not installed yet (wardround enroll --welcome)")
        return noted
