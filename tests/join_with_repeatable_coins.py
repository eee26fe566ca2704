"""`wardround join SITE`, with coins that repeat: for comparing bits, never for patients. Started by tests as a process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def make_app() -> Any:
    """The installed app with the coins of `conftest`."""
    from conftest import repeatable_coins

    from wardround.client.app import client_app

    return client_app(repeatable_coins)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    __import__("conftest")
    from wardround.client.network.join import join

    join(Path(sys.argv[1]), make_app)
