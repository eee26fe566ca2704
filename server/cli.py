"""`wardround check`: a study plan in sentences, before anybody agrees to it. `wardround report`: what became of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def check(
    study: Annotated[str, typer.Argument(help="A shipped study or the path of a study's TOML file.")],
    weights: Annotated[
        Path | None, typer.Option(help="A file of public weights: say its names for [model], or check it against them.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
) -> None:
    """Say what a study plan means: who takes part, what a patient pays, what leaves a hospital. Or every problem in it."""
    import json as json_module

    from wardround.common.explain import facts, sentences
    from wardround.common.plan import SignedText
    from wardround.common.start import named, start
    from wardround.common.studies import find_study

    found = SignedText.load(find_study(study))
    known, lines = facts(found), sentences(found)
    if weights is not None and "weights" in found.plan.model:
        known["start"] = start(found.plan, weights).notes
        lines += known["start"]
    elif weights is not None:
        known["start"] = named(found.plan, weights)
        lines += ["To start from that file, write under [model]:"]
        lines += [f'{key} = "{name}"' for key, name in known["start"].items()]
    print(json_module.dumps(known, indent=2) if json else "\n".join(lines))


def report(
    run: Annotated[str, typer.Argument(metavar="RUN|STUDY", help="A study's name, or the beginning of its run's number.")],
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE", help="The coordinator's file.", envvar="WARDROUND_COORDINATOR")
    ] = Path("coordinator.toml"),
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where report.json and report.html go; default: the study's folder.")
    ] = None,
) -> None:
    """Write a study's report from its newest checkpoint, also while it is under way. It is written by itself at a study's end.

    The coordinator has no test patients, so the report holds no figure on how good the model is.
    """
    from wardround.server.network.report import report_run

    print(report_run(config, run, out) / "report.html")
