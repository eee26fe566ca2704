"""`wardround serve`, `start`, `status` and `stop`: a coordinator and its studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_ConfigOption = Annotated[
    Path, typer.Option("--config", metavar="FILE", help="The coordinator's file.", envvar="WARDROUND_COORDINATOR")
]
_DEFAULT = Path("coordinator.toml")
_SignedArgument = Annotated[Path, typer.Argument(help="A study that was signed: the file that `wardround sign` wrote.")]


def serve(config: Annotated[Path, typer.Argument(help="The coordinator's file.")] = _DEFAULT) -> None:
    """Serve hospitals: one public port with TLS and client certificates, one on this machine alone, and the studies.

    It may be killed at any moment; started again, it goes on where it was. Ends with SIGTERM or Ctrl-C.
    """
    from wardround.server.network.serve import serve as serve_hospitals

    serve_hospitals(config)


def start(
    study: _SignedArgument,
    config: _ConfigOption = _DEFAULT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a study that had stopped.")] = False,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The public weights that the plan names, where it names any.")
    ] = None,
    follow: Annotated[bool, typer.Option(help="Show the rounds as they come, until the study is over.")] = True,
) -> None:
    """Put a signed study into the coordinator's queue; `wardround serve` begins it when its sites are there.

    Exit code 0: finished, or queued with --no-follow. 1: the study stopped. 2: refused.
    """
    from wardround.server.network.operate import follow_study, start_study

    folder = start_study(config, study, resume=resume, weights=weights)
    if follow:
        follow_study(folder)


def status(
    config: _ConfigOption = _DEFAULT,
    study: Annotated[str | None, typer.Argument(help="One study's name; left out: all of them.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
) -> None:
    """Where the coordinator's studies stand: state, round, who is connected, and why nothing moves."""
    from wardround.server.network.operate import print_status

    print_status(config, study, as_json=json)


def stop(
    study: Annotated[str, typer.Argument(help="The study's name.")],
    config: _ConfigOption = _DEFAULT,
) -> None:
    """Stop a study after what is on disk; `wardround start --resume` goes on with it, spending nothing twice."""
    from wardround.server.network.operate import stop_study

    stop_study(config, study)
