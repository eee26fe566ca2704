"""`wardround join SITE`, writing down how long each round's training took: what `benchmarks.network` takes off a round.

Started by it as `python -m benchmarks.network_site SITE.toml`; adds "ROUND SECONDS" lines to `training.txt` beside that file.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, cast

from flwr.app import ConfigRecord, Context, Message


class Timed:
    """The installed ClientApp and a stopwatch.

    Args:
        notes: the file that is added to.
    """

    def __init__(self, notes: Path) -> None:
        from wardround.client.app import client_app

        self._app, self._notes = client_app(), notes

    def __call__(self, message: Message, context: Context) -> Message:
        """The app's own reply."""
        began = time.perf_counter()
        reply = self._app(message, context)
        seconds = time.perf_counter() - began
        facts = message.content.get("facts")
        if message.metadata.message_type == "train" and isinstance(facts, ConfigRecord):
            with self._notes.open("a") as notes:
                notes.write(f"{facts['round']} {seconds:.6f}\n")
        return reply


def main() -> None:
    from wardround.client.network.join import join

    path = Path(sys.argv[1])
    join(path, lambda: cast(Any, Timed(path.parent / "training.txt")))


if __name__ == "__main__":
    main()
