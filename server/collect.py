"""Getting one round's updates: ask every site, check every reply, fold it in, drop what is not an update.

A reply is believed only as far as it was checked: the site named in it is the one that was asked, the study, run, round
and attempt are this one's, its tensors have the names, shapes and sizes of the model (from their headers, before memory
is taken), and every number is finite. How much a site counts stands in the plan, never in its reply.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from wardround.common.errors import OrderRefused, UpdateRefused, WardroundError
from wardround.common.messages import LookFacts, OrderFacts, UpdateFacts, pack_with_model, unpack_model
from wardround.common.plan import StudyPlan
from wardround.common.refusals import ROUND_TAKEN
from wardround.common.weights import Shapes, Weights, norm, pack
from wardround.server.combine import combiner

_POLL_SECONDS = 0.2  # between two looks for replies on a network; a grid in this process never waits
_LONGEST_REASON = 300  # characters of a site's own words that are written down

_Order = TypeVar("_Order", OrderFacts, LookFacts)
_T = TypeVar("_T")

log = logging.getLogger("wardround.coordinator")


@dataclass
class Collected:
    """What came of one round's asking."""

    update: Weights | None = None
    attempt: int = 1  # the highest that any site was asked for
    sites: list[str] = field(default_factory=list)  # whose update counted
    dropped: dict[str, str] = field(default_factory=dict)  # site -> why not
    ledger_heads: dict[str, str] = field(default_factory=dict)
    steps_spent: dict[str, int] = field(default_factory=dict)


def collect(
    grid: Grid,
    plan: StudyPlan,
    shapes: Shapes,
    weights: Weights,
    orders: Mapping[str, OrderFacts],
    addresses: Mapping[str, int],
) -> Collected:
    """Send `orders`, wait until all have answered or the deadline has passed, and combine what is sound.

    Updates are folded in the plan's order, whatever order they arrive in, so that the sum has the same bits every time;
    an early one waits for its turn.
    """
    found = Collected()
    mail = Mail[OrderFacts](grid, "train", pack(weights), addresses, plan.deadline_seconds)
    mail.send(orders)
    total, share = combiner(plan, shapes), plan.weights()

    def fold(site: str, update: Weights) -> None:
        total.add(update, share[site])
        found.sites.append(site)

    line = Line(list(orders), fold, kept=lambda update: {name: tensor.clone() for name, tensor in update.items()})
    attempts = plan.privacy.max_attempts if plan.privacy else 1  # the plan's budget counts them all
    for site, reply in mail.replies():
        order = mail.orders[site]
        if reply.has_error() and reply.error.code == ROUND_TAKEN and order.attempt < attempts:
            mail.send({site: replace(order, attempt=order.attempt + 1)})
            found.attempt = max(found.attempt, order.attempt + 1)
            continue
        try:
            facts, update = _sound(reply, site, order, plan, shapes)
        except WardroundError as error:
            found.dropped[site] = str(error)
            line.skip(site)
            log.warning("round %d: %s dropped: %s", order.round, site, error)
            continue
        found.ledger_heads[site], found.steps_spent[site] = facts.ledger_head, facts.steps_spent
        line.take(site, update)
        del reply, update  # the sum is all that is kept
    for site in mail.unanswered:
        found.dropped[site] = f"no answer within {plan.deadline_seconds:g} s"
        line.skip(site)
    if len(found.sites) >= plan.min_sites:
        found.update = total.result()
    return found


class Mail(Generic[_Order]):
    """Orders out, replies in, until all have answered or the deadline has passed; `kind` is Flower's type of message."""

    def __init__(self, grid: Grid, kind: str, model: ArrayRecord, addresses: Mapping[str, int], seconds: float) -> None:
        self.orders: dict[str, _Order] = {}
        self._grid, self._kind, self._model, self._addresses = grid, kind, model, addresses
        self._asked: dict[str, str] = {}  # message id -> site
        self._deadline = time.monotonic() + seconds

    def send(self, orders: Mapping[str, _Order]) -> None:
        """Ask each site; one that was asked before is asked anew."""
        messages = [
            Message(pack_with_model(order, self._model), self._addresses[site], self._kind, group_id=str(order.round))
            for site, order in orders.items()
        ]
        self._asked |= dict(zip(self._grid.push_messages(messages), orders, strict=True))
        self.orders |= orders

    def replies(self) -> Iterator[tuple[str, Message]]:
        """(site, its reply), as they come."""
        while self._asked and time.monotonic() < self._deadline:
            arrived = list(self._grid.pull_messages(list(self._asked)))
            if not arrived:
                time.sleep(_POLL_SECONDS)
            while arrived:  # handed over, not lent: while the next one is computed, nobody holds this one
                site = self._asked.pop(arrived[0].metadata.reply_to_message_id, None)
                if site is not None:
                    yield site, arrived.pop(0)
                else:  # it answers a question nobody asked
                    arrived.pop(0)

    @property
    def unanswered(self) -> list[str]:
        """Sites that were asked and have not answered yet."""
        return list(self._asked.values())


class Line(Generic[_T]):
    """Folds what sites sent in a fixed order; what comes early waits, as `kept` makes it."""

    def __init__(self, order: list[str], fold: Callable[[str, _T], None], kept: Callable[[_T], _T] = lambda sent: sent) -> None:
        self._order, self._fold, self._kept = order, fold, kept
        self._waiting: dict[str, _T | None] = {}

    def take(self, site: str, sent: _T) -> None:
        """What `site` sent; lent until this returns."""
        if self._order[0] == site:
            self._order.pop(0)
            self._fold(site, sent)
        else:
            self._waiting[site] = self._kept(sent)
        self._catch_up()

    def skip(self, site: str) -> None:
        """Nothing comes from `site`."""
        self._waiting[site] = None
        self._catch_up()

    def _catch_up(self) -> None:
        while self._order and self._order[0] in self._waiting:
            site = self._order.pop(0)
            sent = self._waiting.pop(site)
            if sent is not None:
                self._fold(site, sent)


def _sound(reply: Message, site: str, order: OrderFacts, plan: StudyPlan, shapes: Shapes) -> tuple[UpdateFacts, Weights]:
    if reply.has_error():
        raise UpdateRefused(printable(reply.error.reason))
    try:
        facts = UpdateFacts.unpack(reply.content)
    except OrderRefused as error:
        raise UpdateRefused(str(error)) from None
    if facts.site != site:
        raise UpdateRefused("the reply carries another site's name")
    wanted = (order.study, order.run, order.round, order.attempt)
    if (facts.study, facts.run, facts.round, facts.attempt) != wanted:
        raise UpdateRefused("the reply belongs to another round")
    least, most = (plan.local.steps, plan.noised_steps(1.0).steps) if plan.privacy else (0, 0)
    if not least <= facts.steps_spent <= most:
        raise UpdateRefused("the reply counts its steps wrongly")
    update = unpack_model(reply.content, shapes)
    if not math.isfinite(norm(update)):
        raise UpdateRefused("the update holds numbers that are not finite")
    return facts, update


def printable(reason: object) -> str:
    """A site's own words, cut short and without control characters: they are printed, logged and reported."""
    text = str(reason) if reason else "no reason given"
    return "".join(c if c.isprintable() else " " for c in text)[:_LONGEST_REASON]
