"""Getting one round's updates: ask every site, check every reply, fold it in, drop what is not an update.

A reply is believed only as far as it was checked: the site named in it is the one that was asked, the study, run, round
and attempt are this one's, its tensors have the names, shapes and sizes of the model (from their headers, before memory
is taken), and every number is finite. How much a site counts stands in the plan, never in its reply.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from wardround.common.errors import OrderRefused, UpdateRefused, WardroundError
from wardround.common.messages import ROUND_TAKEN, OrderFacts, UpdateFacts, pack_with_model, unpack_model
from wardround.common.plan import StudyPlan
from wardround.common.weights import Shapes, Weights, norm, pack
from wardround.server.combine import Combiner, combiner

_POLL_SECONDS = 0.2  # between two looks for replies on a network; a grid in this process never waits
_LONGEST_REASON = 300  # characters of a site's own words that are written down

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
    mail = _Mail(grid, pack(weights), addresses, plan.deadline_seconds)
    mail.send(orders)
    line = _Line(list(orders), combiner(plan, shapes), plan.weights())
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
    found.sites = line.counted
    if len(found.sites) >= plan.min_sites:
        found.update = line.combiner.result()
    return found


class _Mail:
    """Orders out, replies in, until all have answered or the deadline has passed."""

    def __init__(self, grid: Grid, model: ArrayRecord, addresses: Mapping[str, int], seconds: float) -> None:
        self.orders: dict[str, OrderFacts] = {}
        self._grid, self._model, self._addresses = grid, model, addresses
        self._asked: dict[str, str] = {}  # message id -> site
        self._deadline = time.monotonic() + seconds

    def send(self, orders: Mapping[str, OrderFacts]) -> None:
        messages = [
            Message(pack_with_model(order, self._model), self._addresses[site], "train", group_id=str(order.round))
            for site, order in orders.items()
        ]
        self._asked |= dict(zip(self._grid.push_messages(messages), orders, strict=True))
        self.orders |= orders

    def replies(self) -> Iterator[tuple[str, Message]]:
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
        return list(self._asked.values())


class _Line:
    """Folds updates in a fixed order; one that comes early waits, as a copy."""

    def __init__(self, order: list[str], combiner: Combiner, share: Mapping[str, float]) -> None:
        self.combiner = combiner
        self.counted: list[str] = []
        self._share = share
        self._waiting: dict[str, Weights | None] = {}
        self._order = order

    def take(self, site: str, update: Weights) -> None:
        if self._order[0] == site:
            self._fold(update)
        else:
            self._waiting[site] = {name: tensor.clone() for name, tensor in update.items()}
        self._catch_up()

    def skip(self, site: str) -> None:
        self._waiting[site] = None
        self._catch_up()

    def _catch_up(self) -> None:
        while self._order and self._order[0] in self._waiting:
            self._fold(self._waiting.pop(self._order[0]))

    def _fold(self, update: Weights | None) -> None:
        site = self._order.pop(0)
        if update is not None:
            self.combiner.add(update, self._share[site])
            self.counted.append(site)


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
