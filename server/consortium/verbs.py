"""`wardround init-consortium`, `invite`, `approve`, `revoke`, `certificates`: for its administrators."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from wardround.server.consortium.office import Consortium

Folder = Annotated[Path, typer.Option("--consortium", metavar="FOLDER", help="The consortium's folder.")]
Passphrase = Annotated[
    Path | None,
    typer.Option("--passphrase-file", metavar="FILE", help="A file of mode 600 with the passphrase of the authority's key."),
]


def init_consortium(
    folder: Annotated[Path, typer.Argument(help="A new folder, on a machine that needs no network.")],
    name: Annotated[str, typer.Option(help="The consortium's name: small letters, digits, hyphens.")],
    coordinator: Annotated[str, typer.Option(metavar="HOST[:PORT]", help="Where hospitals reach the coordinator.")],
    also_host: Annotated[list[str] | None, typer.Option(metavar="HOST", help="Another name or address of it.")] = None,
    passphrase_file: Passphrase = None,
    list_days: Annotated[float, typer.Option(min=1, max=90, help="How long a revocation list holds.")] = 7,
) -> None:
    """Found a consortium: its authority, and the coordinator's keys and certificates.

    Without a revocation list in its time nobody is admitted: renew it (wardround certificates --renew-list) before it ends.
    """
    from wardround.common.trust.certificates import utc_now
    from wardround.server.consortium.office import Consortium, Founding

    founding = Founding(name, coordinator, tuple(also_host or ()), list_days)
    made = Consortium.found(folder, founding, utc_now(), _passphrase(passphrase_file))
    print(
        f"Consortium {name}, in {folder}. Keep this folder offline: whoever has {folder}/ca can be anybody.\n\n"
        f"The authority's fingerprint, which hospitals compare by telephone:\n  {made.fingerprint}\n\n"
        f"Next:\n  copy {folder}/coordinator and {folder}/public to the coordinator; {folder}/public again when it changes\n"
        f"  wardround invite SITE --consortium {folder}       once for each hospital\n"
        f"  wardround certificates --consortium {folder} --renew-list   every few days: the list holds {list_days:g} days"
    )


def invite(
    site: Annotated[str, typer.Argument(help="The hospital's name, as study plans have it.")],
    consortium: Folder,
    hours: Annotated[float, typer.Option(help="How long the token can be used, 1 to 720.")] = 72,
) -> None:
    """Make a one-time token with which a hospital may ask to be enrolled. It is printed once and kept nowhere."""
    from wardround.common.trust.certificates import utc_now

    office = _open(consortium)
    token = office.invite(site, hours, utc_now())
    print(
        f"For {site}, to be given to its IT in person or through a channel you trust; good for {hours:g} hours, once.\n"
        f"An earlier token of {site} that nobody used is void. There they type:\n\n"
        f"wardround enroll SITE.toml --token {token.text()} \\\n"
        f"  --ca-fingerprint {office.fingerprint} \\\n"
        f"  --coordinator {office.registry().coordinator}"
    )


def approve(
    request: Annotated[Path, typer.Argument(help="What the hospital sent: SITE.request.")],
    consortium: Folder,
    fingerprint: Annotated[
        str | None, typer.Option(help="The request's fingerprint as the hospital reads it; without it, you are asked.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the welcome goes; default: SITE.welcome here.")
    ] = None,
    passphrase_file: Passphrase = None,
) -> None:
    """Enrol a hospital, or renew it: issue its three certificates and write SITE.welcome, which is sent back to it.

    The welcome is not secret. Approving the same request again writes it again.
    """
    from wardround.common.config import read_text
    from wardround.common.errors import TrustRefused
    from wardround.common.files import write_atomically
    from wardround.common.trust.certificates import CERTIFICATE_DAYS, same_fingerprint, utc_now
    from wardround.common.trust.enrolment import Request

    office = _open(consortium, passphrase_file)
    asked = Request.parse(read_text(request))
    kind = "renewal" if asked.token_id is None else "request"
    print(f"The {kind} of {asked.site} has the fingerprint\n  {asked.fingerprint}")
    if fingerprint is None:
        typer.confirm("Does the hospital read the same, by telephone?", abort=True)
    elif not same_fingerprint(fingerprint, asked.fingerprint):
        raise TrustRefused("the request is not the one whose fingerprint was given; nothing was issued")
    welcome = office.approve(asked, utc_now())
    path = out or Path(f"{asked.site}.welcome")
    write_atomically(path, welcome.text().encode())
    print(
        f"{asked.site} is enrolled for {CERTIFICATE_DAYS} days.\nNext:\n"
        f"  send {path} to the hospital; there they type: wardround enroll SITE.toml --welcome {path.name}\n"
        f"  copy {office.public} to the coordinator"
    )


def revoke(
    site: Annotated[str, typer.Argument(help="The hospital (or coordinator).")],
    consortium: Folder,
    reason: Annotated[str, typer.Option(help="For the registry; it is not published.")] = "",
    passphrase_file: Passphrase = None,
) -> None:
    """Take back everything issued to a hospital. It is refused as soon as the coordinator has the new list."""
    from wardround.common.trust.certificates import utc_now

    office = _open(consortium, passphrase_file)
    taken = office.revoke(site, reason, utc_now())
    print(
        f"{site}: {taken} certificates revoked{'' if taken else ' (they were before); the list is renewed'}.\n"
        f"Next:\n  copy {office.public} to the coordinator now: until then {site} is admitted\n"
        f"  to take it back in: new keys there, and wardround invite {site}"
    )


def certificates(
    consortium: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Of a consortium's folder.")] = None,
    site: Annotated[Path | None, typer.Option(metavar="SITE.toml", help="Of a hospital.")] = None,
    trust: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Of a trust folder, as the coordinator has.")] = None,
    renew_list: Annotated[bool, typer.Option("--renew-list", help="With --consortium: a fresh revocation list first.")] = False,
    renew_coordinator: Annotated[
        bool, typer.Option("--renew-coordinator", help="With --consortium: new certificates for the coordinator first.")
    ] = False,
    passphrase_file: Passphrase = None,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Show certificates and how long they hold.

    A warning from 30 days before the end on, an error from 7 (revocation list: 2 and 0). Exit code 1 if anything is an error.
    """
    import json as json_module

    from wardround.common.errors import ConfigError
    from wardround.common.trust.certificates import utc_now
    from wardround.common.trust.expiry import statuses, table, worst
    from wardround.common.trust.site_folder import SiteFolder

    if sum(option is not None for option in (consortium, site, trust)) != 1:
        raise ConfigError("wanted one of --consortium, --site, --trust")
    if consortium is None and (renew_list or renew_coordinator):
        raise ConfigError("only --consortium can renew")
    if consortium is not None:
        office = _open(consortium, passphrase_file)
        if renew_coordinator:
            for path in office.renew_coordinator(utc_now()):
                print(f"{path} is new: copy it to the coordinator", file=sys.stderr)
        elif renew_list:
            office.renew_list(utc_now())
        trust = office.public
    elif site is not None:
        trust = SiteFolder.load(site).roster().folder
    assert trust is not None
    rows = statuses(trust, utc_now())
    print(json_module.dumps([row.facts() for row in rows], indent=2) if json else table(rows))
    if worst(rows) == "error":
        raise typer.Exit(1)


def _open(folder: Path, passphrase_file: Path | None = None) -> Consortium:
    from wardround.server.consortium.office import Consortium

    return Consortium(folder, _passphrase(passphrase_file))


def _passphrase(path: Path | None) -> bytes | None:
    from wardround.common.errors import ConfigError
    from wardround.common.trust.private_files import read_private

    if path is None:
        return None
    passphrase = read_private(path).rstrip(b"\r\n")
    if len(passphrase) < 8:
        raise ConfigError(f"{path}: a passphrase has at least 8 characters")
    return passphrase
