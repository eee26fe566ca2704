"""The only door that faces the network: who may come in, how often, with how much, and to which rooms.

In front of Flower's SuperLink. TLS 1.3 with a client certificate is the listener's business (`tls_context`); here each
request's certificate is looked up in the roster, so that a revocation counts from the next request on, also inside an
open connection. Everything that is not a site's own business is "not found".
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from wardround.common.errors import TrustRefused
from wardround.server.network.asgi import Answer, App, Receive, Refused, Scope, Send, again, answer, hangs_up, read_body
from wardround.server.network.letters import Letters

PEER = "wardround.peer"  # where a connection's client certificate stands in a request's scope
_ROOMS = frozenset(
    f"/v1/fleet/{room}"
    for room in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
_WAITING_ROOM = "/v1/fleet/pull-messages"
_LARGEST_OBJECT = 8 << 20  # bytes; Flower cuts tensors into pieces of 5 MB
_LARGEST_LETTER = 64 << 10  # names of some 900 pieces, which bounds what a site may have kept here for one reply
_LARGEST_OTHER = 2 << 20
_LIMITS = {"/v1/fleet/push-object": _LARGEST_OBJECT, "/v1/fleet/push-messages": _LARGEST_LETTER}
_LONGEST_SIGNATURE = 256  # characters; Flower's have some 140
_MOST_AT_ONCE = 64  # bodies of a site that are under way; each takes memory
_ONCE = ("flwr-public-key", "flwr-signature", "flwr-package-version", "content-length")  # headers
_NOTES = (0.1, 20.0)  # refusals of a site that are written down: a second in the long run, and at once
_HOLD_SECONDS = 20.0  # a request for messages is kept until there is one; proxies give up after 30 to 60
_MEMORY_SECONDS = 320.0  # Flower takes a signed header for 305 s


class Doorkeeper(Protocol):
    """What the gate asks of a roster."""

    def admits(self, der: bytes) -> str:
        """The site a client certificate belongs to; raises `TrustRefused`."""

    def node_key(self, name: str) -> bytes:
        """The site's Flower key."""


class Bell:
    """Rung when there may be mail for somebody."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wake everybody who waits."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, seconds: float) -> None:
        """Until it rings, or so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)


@dataclass
class _Bucket:
    """How many requests a site may still make: refills by the second."""

    per_second: float
    burst: float
    left: float = field(init=False)
    at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = self.burst

    def take(self) -> bool:
        now = time.monotonic()
        self.left = min(self.burst, self.left + (now - self.at) * self.per_second)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Gate:
    """An ASGI application in front of another one.

    Args:
        app: Flower's.
        roster: who belongs to the consortium.
        bell: rung when messages were put in.
        version: of Flower here, such as "1.41.0"; sites must have the same first two numbers.
        trust: what a site is given to renew its trust folder with; all of it is public.
        note: told of every refusal: (site or "", what happened).
        per_second: requests a site may make in the long run.
        burst: and at once; a model of a hundred tensors takes a few hundred.
    """

    def __init__(
        self,
        app: App,
        roster: Doorkeeper,
        bell: Bell,
        *,
        version: str,
        trust: Callable[[str], str] = lambda site: "",
        note: Callable[[str, str], None] = lambda site, what: None,
        per_second: float = 200.0,
        burst: float = 4000.0,
    ) -> None:
        self._app, self._roster, self._bell, self._version, self._trust, self._note = app, roster, bell, version, trust, note
        self._rate = (per_second, burst)
        self._buckets: dict[str, _Bucket] = {}
        self._notes: dict[str, _Bucket] = {}
        self._under_way: Counter[str] = Counter()
        self._letters = Letters()
        self._heard: dict[bytes, float] = {}  # signature of a request -> when it may be forgotten
        self._forgotten_until = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or answer it here."""
        if scope["type"] != "http":
            return
        site = ""
        try:
            if scope["path"] == "/health" and scope["method"] == "GET":
                self._admit(scope)
                await answer(send, 200, f"ok flower/{self._version}")
                return
            if scope["path"] == "/trust" and scope["method"] == "GET":
                await answer(send, 200, self._trust(self._admit(scope)))
                return
            if scope["path"] not in _ROOMS or scope["method"] != "POST":
                raise Refused(404, "not found")
            site = self._admit(scope)
            headers = _headers(scope)
            self._same_flower(headers)
            self._own_key(site, headers)
            with self._one_more(site):
                body = await read_body(receive, headers, _LIMITS.get(scope["path"], _LARGEST_OTHER))
            self._never_heard(headers)
        except TrustRefused as error:
            await answer(send, 503, str(error))
            return
        except Refused as refused:
            if self._notes.setdefault(site, _Bucket(*_NOTES)).take():
                self._note(site, f"{refused.text}: {scope['path'][:60]!a}" if refused.status == 404 else refused.text)
            await answer(send, refused.status, refused.text)
            return
        self._letters.heard(site, scope["path"])
        if scope["path"] == _WAITING_ROOM:
            await self._hold(site, scope, body, receive, send)
        else:
            await self._app(scope, again(body), send)

    def _admit(self, scope: Scope) -> str:
        try:
            site = self._roster.admits(scope.get(PEER) or b"")
        except TrustRefused as error:
            raise Refused(403, str(error)) from None
        if not self._buckets.setdefault(site, _Bucket(*self._rate)).take():
            raise Refused(429, f"{site} asks too often")
        return site

    @contextlib.contextmanager
    def _one_more(self, site: str) -> Iterator[None]:
        if self._under_way[site] >= _MOST_AT_ONCE:
            raise Refused(429, f"{site} sends too much at once")
        self._under_way[site] += 1
        try:
            yield
        finally:
            self._under_way[site] -= 1

    def _same_flower(self, headers: dict[str, str]) -> None:
        theirs = headers.get("flwr-package-version", "")
        if theirs.split(".")[:2] != self._version.split(".")[:2]:
            raise Refused(426, f"the coordinator runs Flower {self._version}, this site {theirs[:20] or 'another one'}")

    def _own_key(self, site: str, headers: dict[str, str]) -> None:
        try:
            key = base64.b64decode(headers.get("flwr-public-key", ""), validate=True)
            known = self._roster.node_key(site)
        except (binascii.Error, ValueError):
            raise Refused(403, "the request carries no key") from None
        except TrustRefused as error:
            raise Refused(403, str(error)) from None
        if key != known:
            raise Refused(403, f"the certificate of {site} came with another site's key")

    def _never_heard(self, headers: dict[str, str]) -> None:
        now = time.monotonic()
        if now > self._forgotten_until:
            self._heard = {heard: until for heard, until in self._heard.items() if until > now}
            self._forgotten_until = now + 30
        signature = headers.get("flwr-signature", "").encode()
        if not 0 < len(signature) <= _LONGEST_SIGNATURE or signature in self._heard:
            raise Refused(409, "this request was made before")
        self._heard[signature] = now + _MEMORY_SECONDS

    async def _hold(self, site: str, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Ask Flower for messages until there is one, the time is over, or the caller has gone or called again."""
        deadline, call = time.monotonic() + _HOLD_SECONDS, self._letters.call(site)
        gone = asyncio.ensure_future(hangs_up(receive))
        try:
            while True:
                rung = asyncio.ensure_future(self._bell.wait(max(0.0, deadline - time.monotonic())))
                found = self._letters.given(site) or Answer()
                if not found.body:  # asked after the bell is heard, so that no ring is missed
                    await self._app(dict(scope), again(body), found)
                if found.status == 200 and found.body:
                    self._letters.give(site, found)
                over = self._letters.is_over(site, call)
                if found.status != 200 or found.body or over or time.monotonic() >= deadline or gone.done():
                    rung.cancel()
                    if over:
                        self._bell.ring()  # for the newer call, should this one have been given the mail
                    break
                await asyncio.wait({rung, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not gone.done():
                await found.pass_on(send)
        finally:
            gone.cancel()


def _headers(scope: Scope) -> dict[str, str]:
    """A request's headers; raises `Refused` where one of `_ONCE` stands there twice: whoever reads on may take the other."""
    names = Counter(name for name, _ in scope["headers"])
    if any(names[name.encode()] > 1 for name in _ONCE):
        raise Refused(400, "a header stands there twice")
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
