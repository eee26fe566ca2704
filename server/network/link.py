"""Flower's SuperLink as this coordinator runs it: in its own process, with its state in one owner-only file.

With `server/network_grid.py`'s inner grid these are the only lines of the coordinator that reach below Flower's public
API; a contract test names every internal they use, so that a new Flower breaks one test and not a hospital.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from wardround.common.errors import LinkRefused, UpdateRefused

_LOOK_SECONDS = 0.3  # at most, between two looks for a part of a reply
_FEDERATION = "@none/default"  # Flower's only one without its enterprise parts


def flower_version() -> str:
    """Such as "1.41.0"."""
    from flwr.supercore.version import package_version

    return str(package_version)


@dataclass(frozen=True)
class Ticket:
    """One run of a study in Flower's books, and the right to speak for it."""

    run_id: int
    task_id: int
    token: str


class SuperLink:
    """Flower's own server: registers sites, keeps messages, knows who is connected.

    Args:
        database: SQLite file; created, and kept readable by its owner alone. Models and updates are never in it.
        port: of the loopback listener.
        secret: what Flower's own executors would have to know; nobody is told.
    """

    def __init__(self, database: Path, *, port: int, secret: bytes) -> None:
        from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
        from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
        from flwr.superlink.config_loader import SuperLinkLifespanConfig
        from flwr.superlink.main import create_app

        database.touch(mode=0o600)
        database.chmod(0o600)
        config = SuperLinkLifespanConfig(
            control_address="",
            health_server_address=None,
            host="127.0.0.1",
            port=port,
            insecure=True,  # the loopback listener; what faces the network is the gate's
            certificates=None,
            superexec_auth_secret=secret,
            authn_plugin=NoOpControlAuthnPlugin(),
            event_log_plugin=None,
            fleet_event_log_plugin=None,
            enable_event_log=False,
            artifact_provider=None,
            enable_supernode_auth=True,
            fleet_api_type="grpc-rere",
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=None,
            ssl_certfile=None,
            ssl_keyfile=None,
            database=str(database),
            isolation="process",  # no executor of Flower's is started
            runtime_dependency_install=False,
        )
        with _updates_in_memory():
            self.app: Callable[..., Any] = create_app(config, SuperLinkLifespan)
        self._state = self.app.state.linkstate_factory.state()

    def register(self, node_key: bytes) -> int:
        """Flower's number for a site's key; known keys keep theirs."""
        known: int | None = self._state.get_node_id_by_public_key(node_key)
        if known is not None:
            return known
        number: int = self._state.create_node("<id:none>", "none", node_key, 0)
        return number

    def begin_run(self, settings: dict[str, str]) -> Ticket:
        """A new run; `settings` is what every site can ask for about it.

        Raises:
            LinkRefused: Flower would not begin it.
        """
        run_id = self._state.create_run(None, None, None, settings, _FEDERATION, None, None, "flwr-serverapp")
        found = self._state.get_run_info(run_ids=[run_id])
        task_id = found[0].primary_task_id if found else None
        token = self._state.claim_task(task_id) if task_id is not None else None
        if task_id is None or token is None or not self._state.activate_task(task_id):
            raise LinkRefused("Flower did not begin the run")
        return Ticket(run_id, task_id, token)

    def keep_alive(self, ticket: Ticket) -> bool:
        """Say that the run goes on; False once Flower has ended it."""
        return bool(self._state.acknowledge_task_heartbeat(ticket.task_id))

    def end_run(self, run_id: int) -> None:
        """End a run and forget its messages; ending twice is harmless."""
        self._state.stop_run(run_id)
        self._state.cleanup_run(run_id)

    def end_all_runs(self) -> int:
        """End what an earlier process left behind; returns how many."""
        left = self._state.get_run_info(statuses=["pending", "starting", "running"])
        for run in left:
            self.end_run(run.run_id)
        return len(left)


@contextlib.contextmanager
def _updates_in_memory() -> Iterator[None]:
    """Have Flower keep what messages hold in memory: no update lies on a disk in clear, and none waits for one.

    Its books of sites, runs and messages stay in the file. What is lost with the process is asked for again by its runs' heirs.
    """
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink import main

    flowers: Any = main  # what it imports is not its interface
    before = flowers.get_objectstore_linkstate_factories

    def factories(database: str, federation_manager: Any) -> tuple[Any, Any]:
        objects = ObjectStoreFactory()
        return objects, LinkStateFactory(database, federation_manager, objects)

    flowers.get_objectstore_linkstate_factories = factories
    try:
        yield
    finally:
        flowers.get_objectstore_linkstate_factories = before


def inner_grid(port: int, ticket: Ticket, *, most: int, seconds: float) -> Any:
    """Flower's own grid over the loopback listener, speaking for `ticket`.

    A reply has at most `most` bytes, and its parts are waited for at most so many seconds.
    """
    from flwr.supercore.inflatable.inflatable_utils import pull_objects
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import http_grid
    from flwr.superlink.grid.http_grid import HttpGrid

    # a reply is announced before its tensors are there; Flower would look again after 1, 2, 4 ... s, and 500 times in all
    flowers: Any = http_grid
    flowers.pull_objects = partial(
        pull_objects, max_time=seconds, initial_backoff=0.05, backoff_cap=_LOOK_SECONDS, max_tries_per_object=None
    )
    grid = HttpGrid(f"127.0.0.1:{port}", insecure=True, token=ticket.token)
    grid.set_run(Run.create_empty(run_id=ticket.run_id))
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = ticket.run_id, 1, ticket.task_id
    _with_limit(grid._runtime_client, most)
    return grid


def _with_limit(client: Any, most: int) -> None:
    """Let `client` fetch at most `most` bytes a message: Flower would take all that a site says belongs to its reply."""
    pull_messages, pull_object, lock, left = client.PullMessages, client.PullObject, threading.Lock(), 0

    def messages(request: Any) -> Any:
        nonlocal left
        answer = pull_messages(request)
        left = most * len(answer.messages_list)
        return answer

    def part(request: Any) -> Any:
        nonlocal left
        answer = pull_object(request)
        with lock:
            left -= len(answer.object_content)
            if left < 0:
                raise UpdateRefused(f"a reply is larger than {most} bytes")
        return answer

    client.PullMessages, client.PullObject = messages, part
