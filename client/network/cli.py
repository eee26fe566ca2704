"""`wardround join`: a hospital takes part."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def join(site: Annotated[Path, typer.Argument(help="The hospital's site file (site.toml).")]) -> None:
    """Take part: connect to the coordinator and carry out what was approved here, until SIGTERM or Ctrl-C.

    Calls go out and none come in. It may be killed at any moment and comes back after every break by itself.
    """
    from wardround.client.network.join import join as join_coordinator

    join_coordinator(site)
