"""`wardround join SITE`, whose second round takes a minute, once: so that it can be ended in the middle. Started by tests."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 60.0


def make_app() -> Any:
    """The installed app; its coins take their time."""
    import torch

    from wardround.client.app import client_app
    from wardround.client.dp import Coins
    from wardround.client.hospital import os_coins

    def coins_for(site: str, round: int) -> Coins:
        begun = Path(sys.argv[1]).with_name("begun")
        if round >= 2 and not begun.exists():
            begun.touch()
            until, some = time.monotonic() + SECONDS, torch.ones(300, 300)
            while time.monotonic() < until:
                some = torch.tanh(some @ some)
        return os_coins(site, round)

    return client_app(coins_for)


if __name__ == "__main__":
    from wardround.client.network.join import join

    join(Path(sys.argv[1]), make_app)
