"""The two doors of the coordinator: one to the network, for sites; one to this machine alone, for its own studies."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from wardround.server.network.asgi import App, Receive, Scope, Send, answer
from wardround.server.network.gate import PEER, Bell

_STUDYS = frozenset(
    f"/v1/runtime/{room}"
    for room in ("push-messages", "pull-messages", "push-object", "pull-object", "confirm-message-received", "get-nodes")
)
_PUSHES = frozenset({"/v1/runtime/push-messages", "/v1/runtime/push-object"})
_QUIET_BEFORE_RING, _LATEST_RING = 0.03, 1.0  # seconds after the last push, and after the first one


class Ringing:
    """The loopback listener's application: Flower's, and a bell that rings when a study has put messages in.

    Whoever has an account on this machine can call it. The rooms a study needs ask for its token, which goes to the study's
    process through a pipe; all others, which would stop runs and remove sites for anybody, are "not found".
    """

    def __init__(self, app: App, bell: Bell) -> None:
        self._app, self._bell = app, bell
        self._under_way = 0  # pushes
        self._due: asyncio.TimerHandle | None = None
        self._latest = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and (scope["path"] not in _STUDYS or scope["method"] != "POST"):
            await answer(send, 404, "not found")
            return
        if scope["type"] != "http" or scope["path"] not in _PUSHES:
            await self._app(scope, receive, send)
            return
        self._under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1
            self._ring_soon()

    def _ring_soon(self) -> None:
        """Ring once for a whole round's orders: each ring makes every site that waits ask, and each asks for every part."""
        loop = asyncio.get_running_loop()
        if self._due is None:
            self._latest = loop.time() + _LATEST_RING
        else:
            self._due.cancel()
        wait = self._latest if self._under_way else min(self._latest, loop.time() + _QUIET_BEFORE_RING)
        self._due = loop.call_at(wait, self._ring)

    def _ring(self) -> None:
        self._due = None
        self._bell.ring()


def tls_context(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """TLS 1.3, and no word to anybody without a certificate of the consortium.

    Raises:
        OSError: a file cannot be read (ssl.SSLError among them: it is no certificate, or not the key's).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def with_peer(protocol: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """Uvicorn's HTTP protocol, telling the application which certificate the caller showed."""

    class WithPeer(protocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            channel = transport.get_extra_info("ssl_object")
            shown = channel.getpeercert(binary_form=True) if channel else None
            app: App = getattr(self, "app")  # noqa: B009 - uvicorn says nothing of its type

            async def told(scope: Scope, receive: Receive, send: Send) -> None:
                scope[PEER] = shown
                await app(scope, receive, send)

            self.app = told

    return WithPeer
