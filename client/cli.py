"""`wardround ledger`: what studies have cost this hospital's patients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ledger(
    site: Annotated[Path, typer.Argument(help="The hospital's site file (site.toml).")],
    json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
) -> None:
    """Show the privacy ledger: studies, spent, left, and whether its chain is intact."""
    from wardround.client.statement import print_statement

    print_statement(site, as_json=json)
