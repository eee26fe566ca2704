"""`wardround serve`: Flower's SuperLink, the gate in front of it, and the studies, in one process that may be killed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wardround.common.errors import ConfigError, TrustRefused
from wardround.common.service import LOG_BYTES, alone, logging_to, quiet_flower
from wardround.server.network.config import CoordinatorConfig
from wardround.server.network.link import SuperLink, flower_version
from wardround.server.network.shelf import Shelf

_TICK_SECONDS = 0.5

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
    quiet_flower(config.state / "flower")
    os.umask(0o077)
    with (
        alone(config.state, "serve", "another `wardround serve` is running"),
        logging_to(config.state / "coordinator.log", largest=LOG_BYTES),
    ):
        asyncio.run(_serve(config, path.resolve()))


async def _serve(config: CoordinatorConfig, path: Path) -> None:
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    from wardround.common.audit_log import AuditLog
    from wardround.common.trust.bundle import Bundle
    from wardround.common.trust.certificates import COORDINATOR
    from wardround.common.trust.private_files import read_private
    from wardround.common.trust.roster import Roster
    from wardround.server.network.doors import Ringing, tls_context, with_peer
    from wardround.server.network.gate import Bell, Gate
    from wardround.server.network.post import coordinator_signer
    from wardround.server.network.studies import Studies
    from wardround.server.network.turns import InTurn

    roster, bell = Roster(config.trust), Bell()
    signer = coordinator_signer(config)
    _own_key(config, signer)
    read_private(config.keys / "tls.key")  # refuses one that others could read
    certificate = config.trust / "roster" / "coordinator.tls.crt"
    try:
        context = tls_context(certificate, config.keys / "tls.key", config.trust / "ca.crt")
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
    flower_app = InTurn(link.app)
    gate = Gate(
        flower_app,
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
    inner = uvicorn.Config(Ringing(flower_app, bell), **{**quiet, "lifespan": "on"})
    doors = inner_door, outer_door = _Door(inner), _Door(outer)
    studies = Studies(Shelf(config.state), link, config=path, port=config.control_port, at_once=config.studies_at_once)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    serving = [asyncio.create_task(door.serve(sockets=[own])) for door, own in zip(doors, (private, public), strict=True)]
    print(f"serving hospitals on {config.host}:{config.port}; state in {config.state}", flush=True)
    registered: set[bytes] = set()
    failed, shown = "", _stamp(certificate)
    try:
        while not stop.is_set():
            _register(link, roster, registered)
            if (renewed := _stamp(certificate)) != shown:
                shown = renewed
                _show(context, certificate, config.keys / "tls.key")
            try:
                await asyncio.to_thread(studies.look_after)
            except Exception as error:  # a full disk, a damaged file: hospitals are served on, and it is tried again
                log.error("the studies cannot be looked after: %s", error, exc_info=str(error) != failed)
                failed = str(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _TICK_SECONDS)
    finally:
        await asyncio.to_thread(studies.close)
        outer_door.should_exit = outer_door.force_exit = True  # calls for mail are held open
        inner_door.should_exit = True  # and lets Flower end in order
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


def _register(link: SuperLink, roster: Any, registered: set[bytes]) -> None:
    """Give every site of the roster its number in Flower's books; a new one is let in without a restart."""
    for site in roster.sites():
        with contextlib.suppress(TrustRefused):
            key = roster.node_key(site)
            if key not in registered:
                link.register(key)
                registered.add(key)
                log.info("%s may connect", site)


def _stamp(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _show(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Show a renewed certificate from the next connection on; where it cannot be used, the old one is shown."""
    try:
        context.load_cert_chain(certificate, key)
        log.info("the coordinator's certificate was renewed")
    except OSError as error:  # ssl.SSLError is one
        log.error("the renewed certificate of the coordinator cannot be used: %s", error)


def _noted(audit: Any, site: str, what: str) -> None:
    log.warning("refused: %s %s", site or "somebody", what)
    audit.add("gate.refused", site=site, why=what)


def _own_key(config: CoordinatorConfig, signer: Any) -> None:
    """Return if `signer` has the key of the coordinator's certificate: with another, hospitals would refuse every order."""
    from cryptography import x509

    from wardround.common.trust.signing import verify

    path = config.trust / "roster" / "coordinator.sign.crt"
    try:
        verify(signer.sign("test", {}), x509.load_pem_x509_certificate(path.read_bytes()))
    except (OSError, ValueError, TrustRefused):
        raise TrustRefused(f"{config.keys / 'sign.key'} is not the key of {path}") from None


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle's delay on
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    found.setblocking(False)
    return found
