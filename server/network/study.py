"""One study in a process of its own: `python -m wardround.server.network.study`, told everything on its standard input.

A study that fails, or is killed, takes nobody with it; whoever serves starts it again, and it goes on from its newest
checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wardround.common.errors import StudyStopped, WardroundError
from wardround.common.service import quiet_flower
from wardround.server.network.link import Ticket, inner_grid
from wardround.server.network.shelf import FINISHED, RUNNING, STOPPED, WAITING, Status, StudyFolder

_PATIENCE = 30.0  # seconds for latecomers once enough sites are there
_LOOK_SECONDS = 0.5
_LARGEST_LETTER = 2 << 20  # bytes of a reply without its tensors

log = logging.getLogger("wardround.coordinator")


@dataclass(frozen=True)
class Orders:
    """What a study's process is told.

    Attributes:
        folder: of the study.
        config: the coordinator's file.
        port: of the loopback listener.
        ticket: the run in Flower's books.
    """

    folder: str
    config: str
    port: int
    ticket: Ticket

    def text(self) -> str:
        """As it goes through the pipe."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Orders:
        """As it came through the pipe."""
        found = json.loads(text)
        return cls(**{**found, "ticket": Ticket(**found["ticket"])})


class Scribe:
    """Keeps a study's status file up to date."""

    def __init__(self, folder: StudyFolder, status: Status) -> None:
        self._folder, self.status = folder, status
        self._lock = threading.Lock()

    def note(self, **changes: Any) -> None:
        """Write down what changed, if it did."""
        with self._lock:
            changed = replace(self.status, **changes)
            if changed != self.status:
                self.status = changed
                self._folder.write(changed)


def run(orders: Orders) -> str:
    """Carry the study to its end. Returns the state it ended in."""
    import torch
    from flwr.app import Context, RecordDict

    from wardround.common.agreement import SignedStudy
    from wardround.common.devices import keep_memory
    from wardround.common.tasks import task_of
    from wardround.server.app import server_app
    from wardround.server.checkpoint import RoundRecord
    from wardround.server.federation import Observer
    from wardround.server.network.config import CoordinatorConfig
    from wardround.server.network.grid import NetworkGrid
    from wardround.server.network.post import opened_post
    from wardround.server.network.report import leave_report

    torch.set_num_threads(1)
    keep_memory()
    folder, config = StudyFolder(Path(orders.folder)), CoordinatorConfig.load(Path(orders.config))
    study = SignedStudy.load(folder.signed).study
    plan, before = study.plan, folder.status
    scribe = Scribe(folder, before or Status(plan.name, study.digest))
    scribe.note(state=WAITING, why="", rounds=plan.rounds, sites=list(plan.sites))

    def done(record: RoundRecord) -> None:
        scribe.note(round=record.round, last=asdict(record))

    vault = config.opened_vault()
    post, site_of = opened_post(config, study, folder.path)
    most = 5 * task_of(plan).size(plan.model) + _LARGEST_LETTER
    inner = inner_grid(orders.port, orders.ticket, most=most, seconds=plan.deadline_seconds)
    grid = NetworkGrid(inner, site_of, post, seen=lambda sites: scribe.note(connected=sites))
    try:
        _wait_for_sites(grid, list(plan.sites), plan.min_sites, scribe)
        scribe.note(state=RUNNING, why="")
        settings: dict[str, str | bool | int | float] = {"plan": study.text, "folder": str(folder.path)}
        if folder.weights.exists():
            settings["weights"] = str(folder.weights)
        context = Context(orders.ticket.run_id, 1, {}, RecordDict(), settings)
        server_app(Observer(round_done=done), vault=vault)(grid, context)
    except StudyStopped as stopped:
        leave_report(folder, stopped=str(stopped), vault=vault)
        scribe.note(state=STOPPED, why=str(stopped))
        return STOPPED
    finally:
        post.close()
    leave_report(folder, vault=vault)
    scribe.note(state=FINISHED, why="")
    return FINISHED


def _wait_for_sites(grid: Any, sites: list[str], enough: int, scribe: Scribe) -> None:
    """Until all sites are there, or enough of them and the others have had their time."""
    since: float | None = None
    while True:
        connected: Iterable[int] = grid.get_node_ids()
        count = len(list(connected))
        if count >= len(sites):
            return
        if count >= enough:
            since = since or time.monotonic()
            if time.monotonic() - since > _PATIENCE:
                return
        else:
            since = None
        missing = [site for site in sites if site not in scribe.status.connected]
        scribe.note(why=f"for {', '.join(missing[:10])}")
        time.sleep(_LOOK_SECONDS)


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(3)  # whoever serves is gone, and with it the listener and the run


def main() -> None:
    """Read the orders, run the study, and tell by the exit code how it ended: 0 finished, 1 stopped, 2 refused."""
    orders = Orders.parse(sys.stdin.readline())
    folder = Path(orders.folder)
    quiet_flower(folder.parent.parent / "flower")
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    logging.basicConfig(
        filename=folder / "log.txt", level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        state = run(orders)
    except WardroundError as error:
        log.error("%s%s", error, f" ({error.detail})" if error.detail else "")
        found = StudyFolder(folder)
        with contextlib.suppress(OSError):
            found.write(replace(found.status or Status(folder.name, ""), state=STOPPED, why=str(error)))
        sys.exit(2)
    sys.exit(0 if state == FINISHED else 1)


if __name__ == "__main__":
    main()
