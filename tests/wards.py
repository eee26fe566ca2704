"""An enrolled hospital in a folder that a test may break, and coordinators of many kinds for it to call."""

from __future__ import annotations

import contextlib
import email.utils
import http.server
import shutil
import socket
import socketserver
import ssl
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from lab import Lab
from wardround.client.doctor.findings import Case, Finding, examine
from wardround.client.doctor.report import checks
from wardround.client.policy import SiteConfig
from wardround.server.network.doors import tls_context


@dataclass
class Ward:
    """One enrolled hospital, `va`, and the consortium it belongs to."""

    folder: Path

    @property
    def site(self) -> Path:
        return self.folder / "run" / "sites" / "va" / "site.toml"

    @property
    def state(self) -> Path:
        return self.site.parent / "state"

    @property
    def plan(self) -> Path:
        return self.folder / "run" / "plan.toml"

    def change(self, **sections: dict[str, Any]) -> None:
        """Other values in sections of the site file."""
        table = tomllib.loads(self.site.read_text())
        for name, values in sections.items():
            table[name] = table.get(name, {}) | values
        self.site.write_text(tomli_w.dumps(table))

    def look(self, plan: Path | None = None) -> dict[str, Finding]:
        case = Case(self.site, SiteConfig.load(self.site), plan)
        return examine(list(checks(case)), case)

    def find(self, name: str, plan: Path | None = None) -> Finding:
        """One check, on the assumption that those it needs are fine."""
        case = Case(self.site, SiteConfig.load(self.site), plan)
        only = [check for check in checks(case) if check.name == name]
        return examine(only, case)[name]

    def context(self, of: Path | None = None) -> ssl.SSLContext:
        """TLS as a coordinator of this consortium has it, or of the one in the folder `of`."""
        home = (of or self.folder) / "consortium"
        return tls_context(home / "public/roster/coordinator.tls.crt", home / "coordinator/tls.key", home / "public/ca.crt")

    @contextlib.contextmanager
    def called(self, handler: type[socketserver.BaseRequestHandler], context: ssl.SSLContext | None = None) -> Iterator[int]:
        """Somebody listens where the site thinks that the coordinator is."""
        with listening(handler, context) as port:
            self.change(network={"coordinator": f"localhost:{port}"})
            yield port


def copied(master: Path, folder: Path) -> Ward:
    shutil.copytree(master, folder)
    return Ward(folder)


def founded(folder: Path, sites: dict[str, Path]) -> Ward:
    folder.mkdir(parents=True, exist_ok=True)
    Lab(folder, sites).found()
    return Ward(folder)


def coordinator(status: int = 200, body: bytes = b"ok", ahead: float = 0.0) -> type[http.server.BaseHTTPRequestHandler]:
    """One that answers like this, with its clock so many seconds ahead."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response_only(status)
            self.send_header("date", email.utils.formatdate(time.time() + ahead, usegmt=True))
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


class Silent(socketserver.BaseRequestHandler):
    """Takes a connection and says nothing."""

    def handle(self) -> None:
        self.request.settimeout(5)
        with contextlib.suppress(OSError):
            while self.request.recv(1024):
                pass


def proxy(allows: bool = True) -> type[socketserver.BaseRequestHandler]:
    """One that passes CONNECT through, or not."""

    class Proxy(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            head = b""
            while b"\r\n\r\n" not in head:
                found = self.request.recv(4096)
                if not found:
                    return
                head += found
            if not allows:
                self.request.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
                return
            host, _, port = head.split()[1].decode().rpartition(":")
            with socket.create_connection((host, int(port))) as there:
                self.request.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=pump, args=(there, self.request), daemon=True)
                back.start()
                pump(self.request, there)
                back.join()

    return Proxy


def pump(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while found := one.recv(1 << 16):
            other.sendall(found)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def listening(handler: type[socketserver.BaseRequestHandler], context: ssl.SSLContext | None = None) -> Iterator[int]:
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

        def finish_request(self, request: Any, address: Any) -> None:
            if context is None:
                super().finish_request(request, address)
                return
            with contextlib.suppress(OSError), context.wrap_socket(request, server_side=True) as channel:
                super().finish_request(channel, address)

        def handle_error(self, request: Any, address: Any) -> None:
            pass

    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
