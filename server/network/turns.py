"""Flower's application, a few requests at a time.

Its database has one writer, and a request that finds it busy sleeps before it looks again, ever longer. So requests wait here
instead, whole, and their answers leave when others have their turn: a slow line keeps nobody waiting.
"""

from __future__ import annotations

import asyncio

from wardround.server.network.asgi import Answer, App, Receive, Refused, Scope, Send, again, answer, read_body

_AT_ONCE = 2
_LARGEST = 16 << 20  # bytes; Flower's pieces have 5 MB, and the gate lets in no more than 8


class InTurn:
    """An ASGI application in front of another one.

    Args:
        app: the other one.
        at_once: how many requests it may see together.
    """

    def __init__(self, app: App, *, at_once: int = _AT_ONCE) -> None:
        self._app, self._turn = app, asyncio.Semaphore(at_once)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request when its turn has come."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body, found = await read_body(receive, {}, _LARGEST), Answer()
        except Refused as refused:
            await answer(send, refused.status, refused.text)
            return
        async with self._turn:
            await self._app(scope, again(body), found)
        await found.pass_on(send)
