"""Small change of ASGI: read a body with a limit, hand it on again, keep an answer, answer oneself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_SILENCE_SECONDS = 30.0  # between two pieces of a body


class Refused(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Answer:
    """What an application answered, kept."""

    def __init__(self) -> None:
        self._messages: list[MutableMapping[str, Any]] = []
        self.status = 0
        self.body = b""

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """Take one message of the answer."""
        self._messages.append(message)
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")

    async def pass_on(self, send: Send) -> None:
        """Give the answer to whoever asked."""
        for message in self._messages:
            await send(message)


def again(body: bytes) -> Receive:
    """The same body for an application that reads it (again), and then silence."""
    told = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal told
        if told:
            await asyncio.Event().wait()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def hangs_up(receive: Receive) -> None:
    """Return when the caller has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(receive: Receive, headers: dict[str, str], most: int) -> bytes:
    """The body of a request; raises `Refused` beyond `most` bytes, without reading them, or where its sender falls silent."""
    announced = headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > most:
        raise Refused(413, f"a request of {announced[:20]} bytes; at most {most}")
    found = bytearray()
    while True:
        try:
            async with asyncio.timeout(_SILENCE_SECONDS):  # `wait_for` would start a task for each of a hundred parts
                message = await receive()
        except TimeoutError:
            raise Refused(408, "the rest of the request did not come") from None
        if message["type"] == "http.disconnect":
            raise Refused(400, "the caller hung up")
        found += message.get("body", b"")
        if len(found) > most:
            raise Refused(413, f"a request of more than {most} bytes")
        if not message.get("more_body"):
            return bytes(found)


async def answer(send: Send, status: int, text: str) -> None:
    """Answer a request with a line of text."""
    body = json.dumps({"detail": text}).encode() if status != 200 else text.encode()
    kind = b"application/json" if status != 200 else b"text/plain"
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": body})
