"""The least that a round could cost: a model's bytes to every site and back, by plain HTTP over the same mutual TLS 1.3.

A server process and one process a site, all at once, in pieces of the size that Flower cuts; nothing is checked, hashed or
kept. `python -m benchmarks.network_bytes serve|site ...` is what `Mover` starts.
"""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

PIECE = 5 << 20  # bytes
_ROOT = Path(__file__).parents[1]


class Mover:
    """Processes that are connected and wait to move bytes."""

    def __init__(self, sites: Sequence[subprocess.Popen[str]]) -> None:
        self._sites = sites

    def seconds(self) -> float:
        """From the first piece asked for to the last one taken, all sites at once."""
        began = time.perf_counter()
        for site in self._sites:
            _pipe(site.stdin).write("\n")
            _pipe(site.stdin).flush()
        for site in self._sites:
            if _pipe(site.stdout).readline() != "moved\n":
                raise SystemExit("a process that moves bytes is gone")
        return time.perf_counter() - began


@contextlib.contextmanager
def mover(port: int, size: int, coordinator: tuple[Path, Path, Path], sites: Sequence[tuple[Path, Path]]) -> Iterator[Mover]:
    """A server and its sites.

    Args:
        port: free on loopback.
        size: bytes of a model.
        coordinator: its certificate, key and authority.
        sites: certificate and key of each.
    """
    command = [sys.executable, "-m", "benchmarks.network_bytes"]
    with contextlib.ExitStack() as stack:

        def start(*more: object) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [*command, *map(str, more)], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            if _pipe(process.stdout).readline() != "ready\n":
                raise SystemExit("a process that moves bytes did not start")
            return process

        start("serve", port, *coordinator)
        yield Mover([start("site", port, size, *site, coordinator[2]) for site in sites])


def _pipe(end: IO[str] | None) -> IO[str]:
    assert end is not None
    return end


def _serve(port: int, certificate: Path, key: Path, authority: Path) -> None:
    import uvicorn

    from wardround.server.network.doors import tls_context

    block = bytes(PIECE)

    async def app(scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        taken = 0
        while (message := await receive())["type"] == "http.request":
            taken += len(message["body"])
            if not message.get("more_body"):
                break
        size = int(scope["path"].removeprefix("/")) if scope["method"] == "GET" else 0
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": block[:size]})

    config = uvicorn.Config(app, host="127.0.0.1", port=port, http="httptools", lifespan="off", log_level="error")
    config.load()
    config.ssl = tls_context(certificate, key, authority)

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            print("ready", flush=True)

    Server(config).run()


def _site(port: int, size: int, certificate: Path, key: Path, authority: Path) -> None:
    import httpx

    context = ssl.create_default_context(cafile=str(authority))
    context.load_cert_chain(certificate, key)
    pieces = [min(PIECE, size - start) for start in range(0, size, PIECE)]
    block = bytes(PIECE)
    with httpx.Client(base_url=f"https://localhost:{port}", verify=context, trust_env=False, timeout=60) as client:
        client.get("/1").raise_for_status()
        print("ready", flush=True)
        for _ in sys.stdin:
            for piece in pieces:
                client.get(f"/{piece}").raise_for_status()
            for piece in pieces:
                client.post("/", content=block[:piece]).raise_for_status()
            print("moved", flush=True)


if __name__ == "__main__":
    who, *rest = sys.argv[1:]
    if who == "serve":
        _serve(int(rest[0]), *map(Path, rest[1:4]))
    else:
        _site(int(rest[0]), int(rest[1]), *map(Path, rest[2:5]))
