"""`wardround doctor`: will it work here, and if not, what is to be done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    site: Annotated[Path, typer.Argument(help="The hospital's site file (site.toml).")],
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also look at this plan (or signed study): rules, approval, memory, time."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
    bundle: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one file for support: no paths, no patients, no other machines.")
    ] = None,
) -> None:
    """Check everything this site needs to take part; one line each: ok, or why not and what to do. It changes nothing.

    Run it as the user who runs `wardround join`, which may go on meanwhile. Records are opened as training opens them.
    Exit code 0: everything will work (there may be warnings). 1: something will not. 2: the site file cannot be read.
    """
    from wardround.client.doctor.findings import Case, examine
    from wardround.client.doctor.report import checks, print_json, printer
    from wardround.client.policy import SiteConfig

    case = Case(site, SiteConfig.load(site), plan)
    wanted = list(checks(case))
    begun, done, close = printer([check.name for check in wanted], quiet=json)
    try:
        found = examine(wanted, case, begun=begun, done=done)
    finally:
        close()
    if json:
        print_json(case, found)
    if bundle is not None:
        from wardround.client.doctor.bundle import write_bundle

        write_bundle(bundle, case, found)
        if not json:
            print(f"Wrote {bundle}: read it before you send it.")
    if any(finding.level == "fail" for finding in found.values()):
        raise typer.Exit(1)
