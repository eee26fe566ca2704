"""`wardround serve`: Flower's SuperLink, the gate in front of it, and the studies, in one process that may be killed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
import socket
import ssl
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from wardround.common.errors import ConfigError, TrustRefused
from wardround.server.network.config import CoordinatorConfig
from wardround.server.network.link import SuperLink, flower_version, quiet_flower
from wardround.server.network.shelf import Shelf

_TICK_SECONDS = 0.5
_LOG_BYTES, _LOGS = 10 << 20, 5

log = logging.getLogger("wardround.coordinator")


def serve(path: Path) -> None:
    """Serve until a signal says otherwise.

    Args:
        path: the coordinator's file.

    Raises:
        ConfigError: a file or port is not as it must be.
        TrustRefused: the keys do not belong to the certificates.
    """
    config = CoordinatorConfig.load(path)
    config.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    quiet_flower(config.state / "flower")
    os.umask(0o077)
    with _alone(config.state), _logging_to(config.state / "coordinator.log"):
        asyncio.run(_serve(config, path.resolve()))


async def _serve(config: CoordinatorConfig, path: Path) -> None:
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    from wardround.common.audit_log import AuditLog
    from wardround.common.trust.bundle import Bundle
    from wardround.common.trust.certificates import COORDINATOR
    from wardround.common.trust.roster import Roster
    from wardround.server.network.doors import Ringing, tls_context, with_peer
    from wardround.server.network.gate import Bell, Gate
    from wardround.server.network.post import coordinator_signer
    from wardround.server.network.studies import Studies

    roster, bell = Roster(config.trust), Bell()
    signer = coordinator_signer(config)
    try:
        context = tls_context(config.trust / "roster" / "coordinator.tls.crt", config.keys / "tls.key", config.trust / "ca.crt")
    except (ssl.SSLError, OSError) as error:
        raise TrustRefused(f"the coordinator's TLS key and certificate cannot be used: {error}") from None
    public, private = _bound(config.host, config.port), _bound("127.0.0.1", config.control_port)
    audit = AuditLog.open(config.state / "audit.jsonl", signer)
    audit.add("serve.begin", port=config.port)
    link = SuperLink(config.state / "superlink.sqlite", port=config.control_port, secret=secrets.token_bytes(32))
    if left := link.end_all_runs():
        log.info("%d runs of an earlier process are over", left)
    flower = logging.getLogger("flwr")  # it has chosen a level and a terminal of its own by now
    flower.handlers[:] = logging.getLogger("wardround").handlers
    flower.setLevel(logging.WARNING)
    gate = Gate(
        link.app,
        roster,
        bell,
        version=flower_version(),
        trust=lambda site: Bundle.of(config.trust, (COORDINATOR, site), roster.sites()).text(),
        note=lambda site, what: _noted(audit, site, what),
        per_second=float(config.requests_per_second),
    )
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "lifespan": "off", "ws": "none"}
    outer = uvicorn.Config(gate, http=with_peer(HttpToolsProtocol), timeout_keep_alive=75, **quiet)
    outer.load()
    outer.ssl = context
    inner = uvicorn.Config(Ringing(link.app, bell), **{**quiet, "lifespan": "on"})
    doors = [_Door(inner), _Door(outer)]
    studies = Studies(Shelf(config.state), link, config=path, port=config.control_port, at_once=config.studies_at_once)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    serving = [asyncio.create_task(door.serve(sockets=[own])) for door, own in zip(doors, (private, public), strict=True)]
    print(f"serving hospitals on {config.host}:{config.port}; state in {config.state}", flush=True)
    try:
        while not stop.is_set():
            _register(link, roster)
            await asyncio.to_thread(studies.look_after)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _TICK_SECONDS)
    finally:
        await asyncio.to_thread(studies.close)
        for door in doors:
            door.should_exit = door.force_exit = True
        bell.ring()
        await asyncio.gather(*serving, return_exceptions=True)
        audit.add("serve.end")
        audit.close()


def _Door(config: Any) -> Any:  # noqa: N802 - uvicorn's server, without its own handlers of signals
    import uvicorn

    class Door(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Door(config)


_registered: dict[bytes, int] = {}


def _register(link: SuperLink, roster: Any) -> None:
    """Give every site of the roster its number in Flower's books; a new one is let in without a restart."""
    for site in roster.sites():
        with contextlib.suppress(TrustRefused):
            key = roster.node_key(site)
            if key not in _registered:
                _registered[key] = link.register(key)
                log.info("%s may connect", site)


def _noted(audit: Any, site: str, what: str) -> None:
    log.warning("refused: %s %s", site or "somebody", what)
    audit.add("gate.refused", site=site, why=what)


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    found.listen(256)
    found.setblocking(False)
    return found


@contextlib.contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Hold the state folder; raises `ConfigError` where another process does."""
    with (state / "serve.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{state} is in use: another `wardround serve` is running") from None
        yield


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=_LOGS, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logger = logging.getLogger("wardround")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
