"""`wardround ledger`: what studies have cost this hospital's patients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ledger(
    site: Annotated[Path, typer.Argument(help="The hospital's site file (site.toml).")],
    settle: Annotated[
        str | None, typer.Option(metavar="RUN", help="End this run here: nothing more is trained, what is unspent comes back.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
) -> None:
    """Show the privacy ledger: studies, spent, left, and whether its chain is intact.

    A study that ended without a farewell keeps its whole reservation; --settle gives back what it did not spend.
    """
    from wardround.client.statement import print_statement, settle_here

    if settle is not None:
        settle_here(site, settle)
    print_statement(site, as_json=json)
