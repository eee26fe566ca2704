"""Flower sees a few requests at a time, and a slow line costs nobody else a turn."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore import sql_mixin
from flwr.superlink.grid import http_grid

from wardround.server.network.asgi import Receive, Scope, Send
from wardround.server.network.link import _large_pages
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


def test_the_database_takes_pieces_of_models_in_its_stride(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    _large_pages()
    _large_pages()
    with contextlib.closing(sqlite3.connect(tmp_path / "fresh.sqlite")) as database:
        sql_mixin._set_sqlite_pragmas(database, None)
        database.execute("CREATE TABLE one (two)")
        found = [
            database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "wal_autocheckpoint", "journal_mode")
        ]
    assert found == [32768, 4096, "wal"]
    assert hasattr(http_grid, "pull_objects")


def test_a_body_without_end_is_refused():
    assert asyncio.run(ask(InTurn(Busy()), b"x" * (17 << 20)))[0]["status"] == 413
