"""Flower's grid without its surprises: only the plan's sites, orders that outlive a dropped line, replies that were signed.

A site that loses its line, or whose process is started anew, has forgotten what it was asked; Flower then answers in its
place. Here that answer is not taken: the order is sent again as soon as the site is back, for as long as somebody waits
for the reply. An order is safe to repeat: a site answers a round it has answered before with the same bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from wardround.common.errors import WardroundError
from wardround.common.refusals import REFUSED

_FLOWERS_OWN = 100  # error codes below come from Flower, not from a site
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0  # between two looks at who is connected

log = logging.getLogger("wardround.coordinator")


class Post(Protocol):
    """Seals what goes out and opens what comes in."""

    def seal(self, site: str, action: str, content: RecordDict) -> tuple[RecordDict, str]:
        """What is sent to `site` in place of `content`, and the name of that order."""

    def open(self, site: str, order: str, reply: Message) -> RecordDict | Error:
        """What the site wrote, or its refusal; raises `WardroundError` where it is not that site's reply to that order."""


@dataclass
class _Asked:
    """An order that waits for its reply."""

    message: Message
    site: str
    sent_as: str = ""  # Flower's id of the newest copy; empty: to be sent when the site is there
    order: str = ""
    since: str = ""  # when the site had connected as it was sent


class NetworkGrid(Grid):
    """Delivers a study's messages to its sites over Flower's own grid.

    Args:
        inner: Flower's grid.
        site_of: Flower key -> site, of the plan's sites; others do not exist here.
        post: seals and opens.
        seen: told who is connected, whenever it is looked at.
    """

    def __init__(
        self,
        inner: Any,
        site_of: Mapping[bytes, str],
        post: Post,
        seen: Callable[[list[str]], None] = lambda sites: None,
    ) -> None:
        self._inner, self._site_of, self._post, self._seen = inner, site_of, post, seen
        self._asked: dict[str, _Asked] = {}  # by the id the caller knows
        self._sites: dict[int, str] = {}  # Flower's number -> site, of all ever seen
        self._since: dict[int, str] = {}  # the connected ones, and since when
        self._missing: set[str] = set()  # away since before their last order, which they let pass
        self._looked = 0.0
        self._alone = False  # whether replies are read one by one
        self._count = 0

    def set_run(self, run: Any) -> None:
        """Take Flower's run."""
        self._inner.set_run(run)

    @property
    def run(self) -> Any:
        """Flower's run."""
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one site."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The plan's sites that are connected."""
        self._look()
        return sorted(self._since)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send orders; a site that is away gets its own when it is back.

        One that let its last order pass unanswered and is still away is not waited for again: that is an answer.
        """
        asked, silent = {}, {asked.site for asked in self._asked.values()}
        for message in messages:
            self._count += 1
            site = self._sites[message.metadata.dst_node_id]
            if site in silent and message.metadata.dst_node_id not in self._since:
                self._missing.add(site)
            asked[f"order-{self._count}"] = _Asked(message, site)
        self._asked |= asked
        self._send([one for one in asked.values() if one.site not in self._missing])
        return list(asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that have come, opened; what only Flower says is not one of them. Others are given up."""
        wanted = set(message_ids)
        self._asked = {known: asked for known, asked in self._asked.items() if known in wanted}
        under_way = {asked.sent_as: known for known, asked in self._asked.items() if asked.sent_as}
        missing = [known for known, asked in self._asked.items() if asked.site in self._missing]
        found = [_refusal(known, asked, f"{asked.site} is away") for known in missing for asked in [self._asked.pop(known)]]
        under_way = {sent_as: known for sent_as, known in under_way.items() if known in self._asked}
        for reply in self._read(list(under_way), found):
            known = under_way[reply.metadata.reply_to_message_id]
            if reply.has_error() and reply.error.code < _FLOWERS_OWN:
                self._asked[known].sent_as = ""  # the site is away, or was started anew
                continue
            found.append(self._opened(known, reply))
            del self._asked[known]
        self._remind()
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies to all messages that came in time."""
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        waiting, replies = set(self.push_messages(messages)), []
        while waiting and time.monotonic() < deadline:
            arrived = list(self.pull_messages(waiting))
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            if waiting and not arrived:
                time.sleep(_POLL_SECONDS)
        return replies

    def _read(self, ids: list[str], found: list[Message]) -> list[Message]:
        """Replies that Flower can read; refusals in place of others go to `found`. A bad one costs nobody else anything.

        Flower reads all that came in one go and says nothing of which was bad. What it held then is gone: everybody is asked
        again, answers the same, and from then on is read alone.
        """
        if not self._alone:
            try:
                return list(self._inner.pull_messages(ids)) if ids else []
            except httpx.TransportError:  # nothing was read
                raise
            except Exception as error:
                self._look()  # raises where it is Flower that does not answer
                log.warning("a reply cannot be read (%s); from now on they are read one by one", type(error).__name__)
                self._alone = True
                for asked in self._asked.values():
                    asked.sent_as = ""
                return []
        return [reply for number in ids for reply in self._read_alone(number, found)]

    def _read_alone(self, number: str, found: list[Message]) -> list[Message]:
        try:
            return list(self._inner.pull_messages([number]))
        except httpx.TransportError:
            raise
        except Exception as error:
            self._look()
            known = next(known for known, asked in self._asked.items() if asked.sent_as == number)
            asked = self._asked.pop(known)
            log.warning("a reply of %s cannot be read (%s)", asked.site, type(error).__name__)
            found.append(_refusal(known, asked, "the reply cannot be read"))
            return []

    def _send(self, due: list[_Asked]) -> None:
        sealed = []
        for asked in due:
            message = asked.message.metadata
            content, asked.order = self._post.seal(asked.site, message.message_type, asked.message.content)
            sealed.append(Message(content, message.dst_node_id, message.message_type, group_id=message.group_id))
            asked.since = self._since.get(message.dst_node_id, "")
        for asked, number in zip(due, self._inner.push_messages(sealed) if sealed else [], strict=True):
            asked.sent_as = number or ""  # Flower does not take messages of a run that is over

    def _remind(self) -> None:
        """Send again to whoever came back since it was asked."""
        if not self._asked or time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._look()
        due = []
        for asked in self._asked.values():
            since = self._since.get(asked.message.metadata.dst_node_id)
            if since is not None and (not asked.sent_as or since != asked.since):
                log.info("%s is back; its order is sent again", asked.site)
                due.append(asked)
        self._send(due)

    def _look(self) -> None:
        self._looked = time.monotonic()
        self._since = {}
        for node in self._inner.get_nodes():
            site = self._site_of.get(bytes(node.public_key))
            if site is not None and node.status == "online":
                self._sites[node.node_id] = site
                self._since[node.node_id] = node.last_activated_at
        self._missing -= {self._sites[number] for number in self._since}
        self._seen(sorted(self._sites[number] for number in self._since))

    def _opened(self, known: str, reply: Message) -> Message:
        asked = self._asked[known]
        try:
            found = self._post.open(asked.site, asked.order, reply)
        except Exception as error:  # of what another made: no reply may end a study
            why = str(error) if isinstance(error, WardroundError) else "it cannot be read"
            log.warning("a reply in the name of %s is refused: %s", asked.site, why)
            found = Error(REFUSED, why)
        said = {"_content": None, "_error": found} if isinstance(found, Error) else {"_content": found, "_error": None}
        reply.__dict__.update(said)
        reply.metadata.__dict__["_reply_to_message_id"] = known
        return reply


def _refusal(known: str, asked: _Asked, why: str) -> Message:
    """In place of a reply that did not come, or cannot be read."""
    asked.message.metadata.__dict__["_message_id"] = known
    return Message(Error(REFUSED, why), reply_to=asked.message)
