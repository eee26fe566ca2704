"""The two doors of the coordinator: one to the network, for sites; one to this machine alone, for its own studies."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from wardround.server.network.asgi import App, Receive, Scope, Send
from wardround.server.network.gate import PEER, Bell


class Ringing:
    """The loopback listener's application: Flower's, and a bell that rings whenever a study put messages in."""

    def __init__(self, app: App, bell: Bell) -> None:
        self._app, self._bell = app, bell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        await self._app(scope, receive, send)
        if scope["type"] == "http" and scope["path"] in ("/v1/runtime/push-messages", "/v1/runtime/push-object"):
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
