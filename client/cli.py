"""`wardround ledger`: what studies have cost this hospital's patients. `wardround explain`: why a model says what it says."""

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


def explain(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="A simulation's run folder, whose study has ended.", show_default=False),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="With RUN: which of its hospitals, by name (default: the first). Without: the site file."
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Without RUN: the study's plan.")] = None,
    model: Annotated[Path | None, typer.Option(metavar="FILE", help="Without RUN: its model.safetensors.")] = None,
    records: Annotated[int, typer.Option(min=1, max=100, help="How many held-out records to show.")] = 6,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the page goes; default: explain/ in the site's state folder.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, too.")] = False,
) -> None:
    """Show why a model says what it says of this hospital's own held-out records, on a page that stays here.

    wardround explain runs/heart-disease --site va

    wardround explain --site site.toml --plan plan.toml --model m.safetensors

    The page shows patients' records, so only you may read the file, and nothing is sent anywhere.
    """
    from wardround.client.interpret import Request
    from wardround.client.interpret import explain as explain_records

    explain_records(Request(run, site, plan, model, records, out, json))
