"""`wardround enroll`: a hospital's keys are made at the hospital and stay there; only public ones leave."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from datetime import datetime

    from wardround.common.trust.bundle import Bundle
    from wardround.common.trust.certificates import Use
    from wardround.common.trust.enrolment import PrivateKey, Request, Token
    from wardround.common.trust.site_folder import Enrolment, SiteFolder


def enroll(
    site: Annotated[Path, typer.Argument(help="The hospital's site file (site.toml).")],
    token: Annotated[str | None, typer.Option(help="From the consortium; - reads it from the keyboard, unseen.")] = None,
    ca_fingerprint: Annotated[str | None, typer.Option(help="The authority's, as told by telephone or on paper.")] = None,
    coordinator: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where the coordinator is.")] = None,
    welcome: Annotated[Path | None, typer.Option(metavar="FILE", help="What the consortium sent back: SITE.welcome.")] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Ask for new certificates for the keys that are enrolled.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the request goes; default: SITE.request here.")
    ] = None,
) -> None:
    """Ask to take part in a consortium, and install its answer. Nothing is sent by this command.

    wardround enroll site.toml --token T --ca-fingerprint F --coordinator HOST:PORT

    wardround enroll site.toml --welcome SITE.welcome

    The first makes three keys in the site's state folder, which never leave it, and writes SITE.request for the consortium's
    administrator. Saying it again before the welcome came is harmless.
    """
    from wardround.common.config import read_text
    from wardround.common.errors import ConfigError
    from wardround.common.trust.bundle import Bundle
    from wardround.common.trust.certificates import utc_now
    from wardround.common.trust.enrolment import Token
    from wardround.common.trust.site_folder import Enrolment, SiteFolder

    if sum((token is not None, welcome is not None, renew)) != 1:
        raise ConfigError("wanted one of --token, --welcome, --renew")
    folder = SiteFolder.load(site)
    if welcome is not None:
        until = install(folder, Bundle.parse(read_text(welcome)), utc_now())
        print(f"{folder.name} is enrolled until {until:%Y-%m-%d}. Next: wardround join {site}")
        return
    if token is None:
        asked = renewal(folder)
    elif ca_fingerprint is None or coordinator is None:
        raise ConfigError("with --token, --ca-fingerprint and --coordinator are wanted too, as the consortium told them")
    else:
        secret = typer.prompt("Token", hide_input=True) if token == "-" else token
        asked = first_request(folder, Token.parse(secret), Enrolment(ca_fingerprint, coordinator))
    _hand_over(asked, out or Path(f"{folder.name}.request"))


def first_request(folder: SiteFolder, token: Token, told: Enrolment) -> Request:
    """Make the keys that are not there yet, note what was told, and ask.

    Raises:
        ConfigError: the site is enrolled already, or what was told is no fingerprint or no address.
    """
    from wardround.common.errors import ConfigError
    from wardround.common.trust.addresses import address, written
    from wardround.common.trust.certificates import is_fingerprint
    from wardround.common.trust.enrolment import Request
    from wardround.common.trust.private_files import make_private_folder
    from wardround.common.trust.site_folder import Enrolment

    if folder.is_enrolled:
        raise ConfigError(
            f"{folder.name} is enrolled already, and its keys are not replaced. `wardround enroll --renew` renews its "
            f"certificates; if they expired or were revoked, move {folder.keys} and {folder.trust} away and use a new token"
        )
    if not is_fingerprint(told.authority):
        raise ConfigError(f"--ca-fingerprint {told.authority[:100]!a}: wanted all 64 hex digits, as they were told")
    coordinator = written(*address(told.coordinator))
    folder.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    make_private_folder(folder.keys)
    keys = _keys(folder, make=True)
    folder.note(Enrolment(told.authority, coordinator))
    return Request.by_token(folder.name, keys, token)


def renewal(folder: SiteFolder) -> Request:
    """Ask for new certificates, vouched for by the signing key that is enrolled.

    Raises:
        ConfigError: the site is not enrolled, or a key is missing.
        TrustRefused: its own certificate does not hold any more: then a new token is wanted.
    """
    from wardround.common.trust.enrolment import Request

    folder.roster().signer(folder.name)
    return Request.by_signer(_keys(folder, make=False), folder.signer())


def install(folder: SiteFolder, welcome: Bundle, now: datetime) -> datetime:
    """Check a welcome and put it into the site's trust folder; returns until when this site's certificates hold.

    Raises:
        ConfigError: the site asked for nothing, or a key is missing.
        TrustRefused: another authority than the one that was told, another site's welcome, certificates for other keys, or one
            that does not hold.
    """
    from wardround.common.errors import TrustRefused
    from wardround.common.trust.certificates import COORDINATOR, USES

    noted = folder.enrolment()
    keys = _keys(folder, make=False)
    welcome.check(noted.authority, now)
    wanted = {(folder.name, use) for use in USES["site"]} | {(COORDINATOR, use) for use in USES["coordinator"]}
    if welcome.certificates.keys() != wanted:
        raise TrustRefused(f"this welcome is not for {folder.name}")
    own = {use: welcome.certificates[folder.name, use] for use in USES["site"]}
    for use, certificate in own.items():
        if certificate.public_key() != keys[use].public_key():
            raise TrustRefused(f"the welcome's {use} certificate is for another key than this site's")
    welcome.install(folder.trust)
    return min(certificate.not_valid_after_utc for certificate in own.values())


def _keys(folder: SiteFolder, *, make: bool) -> dict[Use, PrivateKey]:
    from wardround.common.trust.certificates import USES
    from wardround.common.trust.enrolment import key_text, new_key, read_key
    from wardround.common.trust.private_files import write_private

    for use in USES["site"]:
        if make and not folder.key(use).exists():
            write_private(folder.key(use), key_text(new_key(use), use))
    return {use: read_key(folder.key(use), use) for use in USES["site"]}


def _hand_over(asked: Request, path: Path) -> None:
    from wardround.common.files import write_atomically

    write_atomically(path, asked.text().encode())
    print(
        f"Send {path} to the consortium's administrator; nothing in it is secret.\n"
        f"Read this fingerprint to them by telephone:\n\n"
        f"  {asked.fingerprint}\n\n"
        f"What they send back is installed by: wardround enroll SITE.toml --welcome {asked.site}.welcome"
    )
