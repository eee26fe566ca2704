"""`wardround simulate`: many hospitals on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def simulate(
    study: Annotated[str, typer.Argument(help="A shipped study (heart-disease) or the path of a study's TOML file.")],
    epsilon: Annotated[float | None, typer.Option(help="Patient-level budget of the study, in place of its own.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Number of rounds, in place of the study's own.")] = None,
    no_privacy: Annotated[bool, typer.Option("--no-privacy", help="Train without noise: no guarantee for anyone.")] = False,
    sites: Annotated[int | None, typer.Option(help="Share the patients out over this many simulated sites.")] = None,
    partition: Annotated[
        str | None, typer.Option(help="How they are shared out: iid, dirichlet:ALPHA (label skew) or size:ALPHA.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first model and of the test split; never of noise.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with this many seeds and report mean and spread.")] = 1,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes that compute for the sites; 1 by default.")] = None,
    baselines: Annotated[
        bool | None,
        typer.Option("--baselines/--no-baselines", help="Also train each hospital alone and all pooled; on by default."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data sets that are not embedded; WARDROUND_DATA says the same.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="File of public weights to start from: safetensors, or a state_dict saved by torch.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the run folder goes.")] = Path("runs"),
    resume: Annotated[Path | None, typer.Option(help="Go on with this run folder (or its name below --out).")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the report's path, nothing else.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print report.json, nothing else.")] = False,
) -> None:
    """Train a study over simulated hospitals and write a report with pictures.

    Every simulated hospital has its own policy file and privacy ledger, as a real one would; the coordinator and the
    client are the ones that run in a hospital.

    \b
    wardround simulate heart-disease
    wardround simulate heart-disease --epsilon 1 --seeds 5
    wardround simulate heart-disease --sites 20 --partition dirichlet:0.3
    wardround simulate heart-disease --resume runs/heart-disease
    """  # noqa: D301 - \b keeps click from re-flowing the examples
    from wardround.simulations.command import Request, run

    run(
        Request(
            study=study, epsilon=epsilon, rounds=rounds, without_privacy=no_privacy, sites=sites, partition=partition,
            seed=seed, seeds=seeds, processes=processes, baselines=baselines, out=out, resume=resume, quiet=quiet,
            json=json, data=data, weights=weights,
        )
    )  # fmt: skip
