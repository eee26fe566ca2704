"""Flower's SuperLink as this coordinator runs it: in its own process, with its state in one owner-only file.

With `server/network_grid.py`'s inner grid these are the only lines of the coordinator that reach below Flower's public
API; a contract test names every internal they use, so that a new Flower breaks one test and not a hospital.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wardround.common.errors import LinkRefused

_FEDERATION = "@none/default"  # Flower's only one without its enterprise parts


def quiet_flower(home: Path) -> None:
    """Keep Flower to itself; to be called before anything of it is imported: no telemetry, no updates, nothing in $HOME."""
    os.environ |= {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    for name in ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API"):  # older ways in
        os.environ.pop(name, None)


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
        database: SQLite file; created, and kept readable by its owner alone.
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
        self.app: Callable[..., Any] = create_app(config, SuperLinkLifespan)
        self._state = self.app.state.linkstate_factory.state()

    def register(self, node_key: bytes) -> int:
        """Flower's number for a site's key; known keys keep theirs."""
        known: int | None = self._state.get_node_id_by_public_key(node_key)
        if known is not None:
            return known
        number: int = self._state.create_node("<id:none>", "none", node_key, 0)
        return number

    def connected(self) -> dict[bytes, str]:
        """Node key -> when it connected, of all that are here now."""
        return {bytes(node.public_key): str(node.last_activated_at) for node in self._state.get_node_info(statuses=["online"])}

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


def inner_grid(port: int, ticket: Ticket) -> Any:
    """Flower's own grid over the loopback listener, speaking for `ticket`."""
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid.http_grid import HttpGrid

    grid = HttpGrid(f"127.0.0.1:{port}", insecure=True, token=ticket.token)
    grid.set_run(Run.create_empty(run_id=ticket.run_id))
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = ticket.run_id, 1, ticket.task_id
    return grid
