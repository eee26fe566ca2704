"""The `wardround` command. Every package offers its verbs through the entry point group `wardround.verbs`."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Annotated, NoReturn

import typer

from wardround.common import __version__
from wardround.common.errors import StudyStopped, WardroundError


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def application() -> typer.Typer:
    """All verbs of the installed packages in one application."""
    app = typer.Typer(
        name="wardround",
        help="Train one model across hospitals; patients' records stay where they are.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback()
    def options(
        version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    ) -> None:
        """Train one model across hospitals; patients' records stay where they are."""

    for verb in sorted(entry_points(group="wardround.verbs"), key=lambda verb: verb.name):
        found = verb.load()
        if isinstance(found, typer.Typer):  # a verb with verbs of its own
            app.add_typer(found, name=verb.name)
        else:
            app.command(name=verb.name)(found)
    return app


def main() -> NoReturn:
    """Run the command; a refusal ends with its text on stderr and exit code 2, a stopped study with 1, Ctrl-C with 130."""
    try:
        application()()
    except StudyStopped as stopped:
        print(f"wardround: the study stopped: {stopped}", file=sys.stderr)
        sys.exit(1)
    except WardroundError as error:
        print(f"wardround: {error}", file=sys.stderr)
        if error.detail:
            print(f"  {error.detail}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"wardround: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as done:
        if done.code == 130:  # how typer ends after Ctrl-C
            print("wardround: interrupted; what was done is kept, see --resume", file=sys.stderr)
        raise
    sys.exit(0)


if __name__ == "__main__":
    main()
