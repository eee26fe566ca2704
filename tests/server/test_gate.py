"""The gate: who comes in, to which rooms, how often and with how much; and that mail is handed over when it comes."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from wardround.common.errors import TrustRefused
from wardround.server.network import asgi
from wardround.server.network import gate as module
from wardround.server.network.asgi import App
from wardround.server.network.doors import Ringing
from wardround.server.network.gate import PEER, Bell, Gate

KEYS = {"a": b"key of a", "b": b"key of b"}


class Roster:
    """Certificates are the names of their sites; "revoked" is nobody's any more."""

    def admits(self, der: bytes) -> str:
        if der.decode() not in KEYS:
            raise TrustRefused("the certificate was revoked" if der == b"revoked" else "no certificate of this consortium")
        return der.decode()

    def node_key(self, name: str) -> bytes:
        return KEYS[name]


class Flower:
    """Answers every request with what it was asked, or with waiting mail."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.mail: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        self.heard.append((scope["path"], body))
        text = b"done"
        if scope["path"] == "/v1/fleet/pull-messages":
            text = self.mail.pop() if self.mail else b""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text})


def gate(flower: App, bell: Bell | None = None, **more: Any) -> Gate:
    return Gate(flower, Roster(), bell or Bell(), version="1.41.0", **more)


async def asked(
    app: App,
    path: str = "/v1/fleet/push-messages",
    *,
    peer: str = "a",
    key: bytes | None = None,
    method: str = "POST",
    body: bytes = b"hello",
    more: dict[str, str] | None = None,
    gone: asyncio.Event | None = None,
) -> tuple[int, bytes]:
    """One request; its status and body."""
    headers = {
        "flwr-public-key": base64.b64encode(KEYS.get(peer, b"") if key is None else key).decode(),
        "flwr-signature": f"signature {time.perf_counter_ns()}",
        "flwr-package-version": "1.41.3",
        "content-length": str(len(body)),
    } | (more or {})
    scope = {
        "type": "http",
        "path": path,
        "method": method,
        PEER: peer.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    chunks = [body[:3], body[3:]]
    found: dict[str, Any] = {"status": 0, "body": b""}

    async def receive() -> dict[str, Any]:
        if chunks:
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        found["status"] = message.get("status", found["status"])
        found["body"] += message.get("body", b"")

    await app(scope, receive, send)
    return found["status"], found["body"]


def refusal(answer: tuple[int, bytes]) -> tuple[int, str]:
    return answer[0], json.loads(answer[1])["detail"]


def test_a_site_reaches_the_rooms_of_sites_with_its_own_words():
    flower = Flower()
    assert asyncio.run(asked(gate(flower), body=b"a letter")) == (200, b"done")
    assert flower.heard == [("/v1/fleet/push-messages", b"a letter")]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/runtime/push-messages",
        "/docs",
        "/openapi.json",
        "/",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-fab",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/push-messages/",
        "//v1/fleet/push-messages",
    ],
)
def test_every_other_room_is_not_found_even_for_a_site(path: str):
    flower = Flower()
    assert refusal(asyncio.run(asked(gate(flower), path))) == (404, "not found")
    assert not flower.heard


def test_nothing_of_flower_answers_to_another_method():
    flower = Flower()
    assert asyncio.run(asked(gate(flower), method="GET"))[0] == 404
    assert not flower.heard


@pytest.mark.parametrize(("peer", "why"), [("", "no certificate"), ("mallory", "no certificate"), ("revoked", "was revoked")])
@pytest.mark.parametrize(("path", "method"), [("/v1/fleet/pull-messages", "POST"), ("/health", "GET"), ("/trust", "GET")])
def test_without_a_certificate_that_holds_nothing_is_said(peer: str, why: str, path: str, method: str):
    told: list[tuple[str, str]] = []
    status, text = refusal(
        asyncio.run(asked(gate(Flower(), note=lambda *what: told.append(what)), path, peer=peer, method=method))
    )
    assert status == 403
    assert why in text
    assert len(told) == 1


def test_a_certificate_with_another_sites_key_is_refused():
    flower = Flower()
    assert refusal(asyncio.run(asked(gate(flower), peer="a", key=KEYS["b"]))) == (
        403,
        "the certificate of a came with another site's key",
    )
    assert not flower.heard


@pytest.mark.parametrize("key", ["", "no base64!", "é"])
def test_a_request_without_a_key_is_refused(key: str):
    status, _ = asyncio.run(asked(gate(Flower()), more={"flwr-public-key": key}))
    assert status == 403


def test_another_flower_is_refused_with_both_versions():
    status, text = refusal(asyncio.run(asked(gate(Flower()), more={"flwr-package-version": "1.40.2"})))
    assert status == 426
    assert "1.41.0" in text
    assert "1.40.2" in text


def test_a_request_that_was_made_before_is_refused():
    async def twice() -> list[int]:
        door = gate(Flower())
        return [(await asked(door, more={"flwr-signature": "the same"}))[0] for _ in range(2)]

    assert asyncio.run(twice()) == [200, 409]


def test_a_request_without_a_signature_is_refused():
    assert asyncio.run(asked(gate(Flower()), more={"flwr-signature": ""}))[0] == 409


@pytest.mark.parametrize("announced", ["3000000", "5", "-1", "1e9", "9" * 400])
def test_a_body_beyond_the_limit_is_refused_whatever_it_announces(announced: str):
    flower = Flower()
    status, _ = asyncio.run(asked(gate(flower), body=b"x" * 2_500_000, more={"content-length": announced}))
    assert status == 413
    assert not flower.heard


def behind(door: App, *headers: tuple[bytes, bytes], silent: bool = False) -> App:
    """The gate, for a caller with more headers, or one who falls silent in the middle of a body."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def halting() -> Any:
            message = await receive()
            if silent and not message.get("more_body"):
                await asyncio.Event().wait()
            return message

        await door({**scope, "headers": [*scope["headers"], *headers]}, halting, send)

    return app


@pytest.mark.parametrize("name", [b"flwr-signature", b"flwr-public-key", b"content-length"])
def test_a_header_that_decides_and_stands_there_twice_is_refused(name: bytes):
    flower = Flower()
    assert refusal(asyncio.run(asked(behind(gate(flower), (name, b"5")))))[0] == 400
    assert not flower.heard


def test_a_signature_longer_than_any_is_refused_and_not_remembered():
    door = gate(Flower())
    assert asyncio.run(asked(door, more={"flwr-signature": "x" * 10_000}))[0] == 409
    assert not door._heard


def test_a_body_whose_rest_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(asgi, "_SILENCE_SECONDS", 0.05)
    assert refusal(asyncio.run(asked(behind(gate(Flower()), silent=True))))[0] == 408


def test_a_site_that_sends_too_much_at_once_waits_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(asgi, "_SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(module, "_MOST_AT_ONCE", 2)

    async def many() -> list[int]:
        door = gate(Flower())
        slow = [asyncio.create_task(asked(behind(door, silent=True))) for _ in range(3)]
        await asyncio.sleep(0.05)
        other = await asked(door, peer="b")
        found = [status for status, _ in await asyncio.gather(*slow)]
        return [other[0], *found, (await asked(door))[0]]  # those given up count no more

    assert asyncio.run(many()) == [200, 408, 408, 429, 200]


def test_names_of_more_pieces_than_a_model_has_are_refused():
    assert asyncio.run(asked(gate(Flower()), "/v1/fleet/push-messages", body=b"x" * 70_000))[0] == 413
    assert asyncio.run(asked(gate(Flower()), "/v1/fleet/pull-object", body=b"x" * 70_000))[0] == 200


@pytest.mark.parametrize("peer", ["a", "revoked"])
def test_whoever_is_refused_for_ever_does_not_fill_the_log(peer: str):
    noted: list[tuple[str, str]] = []

    async def many() -> None:
        door = gate(Flower(), note=lambda site, what: noted.append((site, what)))
        for _ in range(200):
            await asked(door, peer=peer, key=b"another")

    asyncio.run(many())
    assert 20 <= len(noted) <= 25


def test_who_asks_for_another_room_is_written_down():
    noted: list[str] = []
    asyncio.run(asked(gate(Flower(), note=lambda site, what: noted.append(what)), "/v1/control/start-run"))
    assert noted == ["not found: '/v1/control/start-run'"]


def test_a_part_of_a_model_may_be_larger_than_a_letter():
    assert asyncio.run(asked(gate(Flower()), "/v1/fleet/push-object", body=b"x" * 2_500_000))[0] == 200
    assert asyncio.run(asked(gate(Flower()), "/v1/fleet/push-object", body=b"x" * 9_000_000))[0] == 413


def test_a_site_that_asks_too_often_waits_and_the_others_do_not():
    async def many() -> list[tuple[str, int]]:
        door = gate(Flower(), per_second=0.001, burst=3.0)
        return [(peer, (await asked(door, peer=peer))[0]) for peer in ("a", "a", "a", "a", "b")]

    assert asyncio.run(many()) == [("a", 200), ("a", 200), ("a", 200), ("a", 429), ("b", 200)]


def test_a_site_is_given_what_it_may_trust():
    answer = asyncio.run(asked(gate(Flower(), trust=lambda site: f"for {site}"), "/trust", method="GET"))
    assert answer == (200, b"for a")


def waiting(act: Callable[[Gate, Flower, Bell], Any]) -> tuple[Any, Flower, float]:
    """What `act` makes of a call for mail, and how long it took."""
    flower, bell = Flower(), Bell()
    began = time.monotonic()
    found = asyncio.run(act(gate(flower, bell), flower, bell))
    return found, flower, time.monotonic() - began


def test_a_call_for_mail_is_held_until_some_comes():
    async def act(door: Gate, flower: Flower, bell: Bell) -> tuple[int, bytes]:
        call = asyncio.create_task(asked(door, "/v1/fleet/pull-messages"))
        await asyncio.sleep(0.05)
        assert not call.done()
        bell.ring()  # for somebody else
        await asyncio.sleep(0.05)
        assert not call.done()
        flower.mail.append(b"an order")
        bell.ring()
        return await asyncio.wait_for(call, 5)

    found, flower, seconds = waiting(act)
    assert found == (200, b"an order")
    assert len(flower.heard) == 3
    assert seconds < 5


def test_mail_that_is_there_is_handed_over_at_once():
    async def act(door: Gate, flower: Flower, bell: Bell) -> tuple[int, bytes]:
        flower.mail.append(b"an order")
        return await asyncio.wait_for(asked(door, "/v1/fleet/pull-messages"), 5)

    assert waiting(act)[0] == (200, b"an order")


def test_mail_is_not_taken_out_for_a_caller_who_has_gone():
    async def act(door: Gate, flower: Flower, bell: Bell) -> list[bytes]:
        gone = asyncio.Event()
        call = asyncio.create_task(asked(door, "/v1/fleet/pull-messages", gone=gone))
        await asyncio.sleep(0.05)
        gone.set()
        await asyncio.wait_for(call, 5)
        flower.mail.append(b"an order")
        bell.ring()
        await asyncio.sleep(0.05)
        return flower.mail

    assert waiting(act)[0] == [b"an order"]


def test_mail_that_a_broken_line_swallowed_is_handed_over_again():
    async def act(door: Gate, flower: Flower, bell: Bell) -> list[tuple[int, bytes]]:
        flower.mail.append(b"an order")
        lost = await asked(door, "/v1/fleet/pull-messages")  # taken out, and never arrived
        await asked(door, "/v1/fleet/send-node-heartbeat")
        other = asyncio.create_task(asked(door, "/v1/fleet/pull-messages", peer="b"))
        found = await asyncio.wait_for(asked(door, "/v1/fleet/pull-messages"), 5)
        assert not other.done()
        other.cancel()
        return [lost, found]

    assert waiting(act)[0] == [(200, b"an order")] * 2


@pytest.mark.parametrize("room", ["pull-object", "get-run", "confirm-message-received", "activate-node"])
def test_mail_that_arrived_is_not_handed_over_again(room: str):
    async def act(door: Gate, flower: Flower, bell: Bell) -> tuple[int, bytes]:
        flower.mail.append(b"an order")
        await asked(door, "/v1/fleet/pull-messages")
        await asked(door, f"/v1/fleet/{room}")
        flower.mail.append(b"the next")
        return await asyncio.wait_for(asked(door, "/v1/fleet/pull-messages"), 5)

    assert waiting(act)[0] == (200, b"the next")


def test_mail_goes_to_the_newest_call_of_a_site_and_not_into_a_dead_line():
    async def act(door: Gate, flower: Flower, bell: Bell) -> list[tuple[int, bytes]]:
        dead = asyncio.create_task(asked(door, "/v1/fleet/pull-messages"))  # nobody says that it has gone
        await asyncio.sleep(0.05)
        alive = asyncio.create_task(asked(door, "/v1/fleet/pull-messages"))
        await asyncio.sleep(0.05)
        flower.mail.append(b"an order")
        bell.ring()
        return [await asyncio.wait_for(call, 5) for call in (alive, dead)]

    alive, _ = waiting(act)[0]
    assert alive == (200, b"an order")


def test_a_study_that_puts_messages_in_rings():
    async def rung(path: str) -> bool:
        bell = Bell()
        heard = asyncio.create_task(bell.wait(5))
        await asyncio.sleep(0.02)
        await asked(Ringing(Flower(), bell), path)
        await asyncio.wait({heard}, timeout=0.3)
        done = heard.done()
        heard.cancel()
        return done

    assert asyncio.run(rung("/v1/runtime/push-messages"))
    assert asyncio.run(rung("/v1/runtime/push-object"))
    assert not asyncio.run(rung("/v1/runtime/get-nodes"))


def test_a_round_that_is_put_in_rings_once():
    class Counting(Bell):
        rings = 0

        def ring(self) -> None:
            self.rings += 1

    async def many() -> int:
        bell = Counting()
        door = Ringing(Flower(), bell)
        await asked(door, "/v1/runtime/push-messages")
        await asyncio.gather(*(asked(door, "/v1/runtime/push-object") for _ in range(20)))
        await asyncio.sleep(0.3)
        return bell.rings

    assert asyncio.run(many()) == 1


@pytest.mark.parametrize("path", ["/v1/control/stop-run", "/v1/control/list-nodes", "/v1/runtime/acquire-task", "/docs",
                                  "/v1/fleet/activate-node", "/health"])  # fmt: skip
def test_on_this_machine_only_the_rooms_of_a_study_answer(path: str):
    flower = Flower()
    assert asyncio.run(asked(Ringing(flower, Bell()), path))[0] == 404
    assert not flower.heard
