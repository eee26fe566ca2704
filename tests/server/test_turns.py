"""Flower sees a few requests at a time, and a slow line costs nobody else a turn."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.superlink import main

from wardround.server.network.asgi import Receive, Scope, Send
from wardround.server.network.link import SuperLink
from wardround.server.network.turns import InTurn

SCOPE = {"type": "http", "path": "/", "headers": []}


class Busy:
    """Takes its time, and knows how many were there together."""

    def __init__(self) -> None:
        self.here = self.most = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        self.here += 1
        self.most = max(self.most, self.here)
        await asyncio.sleep(0.01)
        self.here -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


def caller(body: bytes) -> Receive:
    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": body}

    return receive


async def ask(door: InTurn, body: bytes = b"x") -> list[MutableMapping[str, Any]]:
    told: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        told.append(message)

    await door(dict(SCOPE), caller(body), send)
    return told


def test_only_so_many_are_served_together_and_everyone_is_answered():
    async def many() -> tuple[int, list[bytes]]:
        busy = Busy()
        door = InTurn(busy, at_once=2)
        found = await asyncio.gather(*(ask(door, bytes([number])) for number in range(9)))
        return busy.most, [told[1]["body"] for told in found]

    assert asyncio.run(many()) == (2, [bytes([number]) for number in range(9)])


def test_a_caller_that_does_not_read_or_write_keeps_nobody_waiting():
    async def stuck(*_: object) -> Any:
        await asyncio.Event().wait()

    async def many() -> list[MutableMapping[str, Any]]:
        door = InTurn(Busy(), at_once=1)
        slow = [
            asyncio.create_task(door(dict(SCOPE), caller(b""), stuck)),
            asyncio.create_task(door(dict(SCOPE), stuck, stuck)),
        ]
        await asyncio.sleep(0.05)
        told = await asyncio.wait_for(ask(door), 5)
        for one in slow:
            one.cancel()
        return told

    assert asyncio.run(many())[0]["status"] == 200


def test_no_update_is_kept_on_disk(tmp_path: Path):
    link = SuperLink(tmp_path / "superlink.sqlite", port=1, secret=b"x" * 32)
    ticket = link.begin_run({"plan": "a plan"})
    secret = b"what a hospital learnt" * 100
    letter = ConfigRecord({"update": secret})
    session = link._state.start_session(ticket.run_id)
    link._state.preregister_object_tree(get_object_tree(letter), session)
    assert link._state.store_object(ticket.run_id, session, letter.object_id, letter.deflate())
    assert secret in (link._state.get_object(ticket.run_id, letter.object_id) or b"")
    for path in tmp_path.glob("superlink.sqlite*"):
        assert b"a hospital learnt" not in path.read_bytes()
    link.end_run(ticket.run_id)
    assert link._state.get_object(ticket.run_id, letter.object_id) is None
    assert main.get_objectstore_linkstate_factories.__module__ == "flwr.superlink.config_loader"  # put back


def test_a_body_without_end_is_refused():
    assert asyncio.run(ask(InTurn(Busy()), b"x" * (17 << 20)))[0]["status"] == 413
