"""Who is there: the roll call before the first round, newcomers later, and the farewell."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from wardround.common.errors import OrderRefused, StudyStopped, UpdateRefused
from wardround.common.messages import Farewell, Present, RollCall, Settled
from wardround.common.plan import SignedText, StudyPlan
from wardround.server.checkpoint import Progress
from wardround.server.collect import printable

_SECONDS = 60.0  # for an answer to a roll call or a farewell
_NEWCOMER_SECONDS = 10.0  # between two rounds nobody waits as long
_OFTEN = 3  # times a newcomer that does not answer is asked round by round

log = logging.getLogger("wardround.coordinator")


@dataclass(frozen=True)
class Roll:
    """Who answered.

    Attributes:
        addresses: site -> Flower's number for it, in the plan's order.
        refused: site -> why it does not take part.
        ledger_heads: site -> the newest entry of its ledger, as the site says.
        settled: Flower's numbers of all who need not be asked again: present, refusing, or of another study.
        silent: Flower's number -> for how many rounds it has left the question unanswered.
    """

    addresses: dict[str, int]
    refused: dict[str, str]
    ledger_heads: dict[str, str]
    settled: frozenset[int]
    silent: Mapping[int, int] = field(default_factory=dict)

    def too_few(self, study: SignedText) -> str:
        """Why the study cannot begin."""
        absent = [site for site in study.plan.sites if site not in self.addresses and site not in self.refused]
        why = list(self.refused.values()) + ([f"not connected: {', '.join(absent[:10])}"] if absent else [])
        return f"{len(self.addresses)} of at least {study.plan.min_sites} sites take part. " + "; ".join(why)


def call_the_roll(grid: Grid, study: SignedText, run: str) -> Roll:
    """Ask everybody connected who they are; only sites the plan names count, each once.

    A site that trains, as the coordinator before this one told it to or for another study, answers when it has done: it is
    waited for as long as in a round, while it is connected.

    Raises:
        StudyStopped: two of them carry the same name.
    """
    addresses: dict[str, int] = {}
    refused: dict[str, str] = {}
    heads: dict[str, str] = {}
    settled = set()
    for address, present in _all_answers(grid, study, run):
        settled.add(address)
        if present is None:
            continue
        if addresses.get(present.site, address) != address:
            raise StudyStopped(f"two sites call themselves {present.site}")
        if present.refusal:
            refused[present.site] = printable(present.refusal)
            continue
        addresses[present.site] = address
        heads[present.site] = present.ledger_head
    return Roll(_in_order(study.plan, addresses), refused, heads, frozenset(settled))


def with_newcomers(grid: Grid, study: SignedText, run: str, roll: Roll) -> Roll:
    """The roll with sites that connected since, and with those that were silent before.

    A name that is taken stays with whoever is connected under it; the other one is asked again once that one has gone.
    """
    connected = set(grid.get_node_ids())
    if connected <= roll.settled:
        return roll
    addresses, refused, settled = dict(roll.addresses), dict(roll.refused), set(roll.settled)
    asked = connected - roll.settled
    silent = {address: roll.silent.get(address, 0) + 1 for address in asked}
    due = {address for address in asked if _is_due(silent[address])}
    for address, present in _answers(grid, study, run, due, seconds=_NEWCOMER_SECONDS):
        silent.pop(address, None)
        if present is not None and not present.refusal:
            holder = addresses.get(present.site, address)
            if holder != address and holder in connected:
                log.warning("somebody else calls itself %s while that site is connected; not asked", present.site)
                continue
            log.info("%s joined", present.site)
            settled.discard(holder)  # should it come back, it is asked who it is
            addresses[present.site] = address
            refused.pop(present.site, None)
        elif present is not None and present.site not in addresses:
            refused[present.site] = printable(present.refusal)
        settled.add(address)
    return Roll(_in_order(study.plan, addresses), refused, roll.ledger_heads, frozenset(settled), silent)


def _is_due(times: int) -> bool:
    """Whether to ask a silent newcomer: at once a few times, then ever more rarely; it may only be busy with another study."""
    return times <= _OFTEN or times & (times - 1) == 0


def say_farewell(grid: Grid, study: SignedText, progress: Progress) -> dict[str, Settled]:
    """Tell everybody that the study is over, so that each site gives back what it did not spend."""
    farewell = Farewell(study.digest, progress.run).pack()
    messages = [Message(farewell, address, "query.close") for address in grid.get_node_ids()]
    settled = {}
    for reply in grid.send_and_receive(messages, timeout=_SECONDS):
        try:
            if reply.has_error():
                raise OrderRefused(printable(reply.error.reason))
            answer = Settled.unpack(reply.content)
        except OrderRefused as error:
            log.info("farewell: somebody answered: %s", error)
            continue
        if answer.site in study.plan.sites and answer.study == study.digest:
            settled[answer.site] = answer
    return settled


def _answers(
    grid: Grid, study: SignedText, run: str, among: Iterable[int], seconds: float = _SECONDS
) -> Iterator[tuple[int, Present | None]]:
    """(address, presence) of all who answer properly; None for a site of another study. The silent are left out."""
    call = RollCall(study.digest, run).pack()
    messages = [Message(call, address, "query") for address in sorted(among)]
    for reply in grid.send_and_receive(messages, timeout=seconds):
        try:
            if reply.has_error():
                raise UpdateRefused(printable(reply.error.reason))
            present = Present.unpack(reply.content)
        except (OrderRefused, UpdateRefused) as error:
            log.warning("roll call: a site answered: %s", error)
            continue
        ours = present.site in study.plan.sites and present.study == study.digest
        yield reply.metadata.src_node_id, present if ours else None


def _all_answers(grid: Grid, study: SignedText, run: str) -> Iterator[tuple[int, Present | None]]:
    """The same of all who are connected, who are asked again while they are silent."""
    asked, seconds, end = set(grid.get_node_ids()), _SECONDS, time.monotonic() + study.plan.deadline_seconds
    while asked:
        began = time.monotonic()
        for address, present in _answers(grid, study, run, asked, seconds):
            asked.discard(address)
            yield address, present
        now = time.monotonic()
        if now - began < seconds or now >= end:  # all have answered, if not properly
            return
        asked &= set(grid.get_node_ids())
        seconds = min(2 * seconds, max(_SECONDS, end - now))


def _in_order(plan: StudyPlan, addresses: dict[str, int]) -> dict[str, int]:
    return {site: addresses[site] for site in plan.sites if site in addresses}
