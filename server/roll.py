"""Who is there: the roll call before the first round, newcomers later, and the farewell."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from wardround.common.errors import OrderRefused, StudyStopped, UpdateRefused
from wardround.common.messages import Farewell, Present, RollCall, Settled
from wardround.common.plan import SignedText, StudyPlan
from wardround.server.checkpoint import Progress
from wardround.server.collect import printable

_SECONDS = 60.0  # for an answer to a roll call or a farewell

log = logging.getLogger("wardround.coordinator")


@dataclass(frozen=True)
class Roll:
    """Who answered.

    Attributes:
        addresses: site -> Flower's number for it, in the plan's order.
        refused: site -> why it does not take part.
        ledger_heads: site -> the newest entry of its ledger, as the site says.
        asked: Flower's numbers of all who were ever asked.
    """

    addresses: dict[str, int]
    refused: dict[str, str]
    ledger_heads: dict[str, str]
    asked: frozenset[int]

    def too_few(self, study: SignedText) -> str:
        """Why the study cannot begin."""
        absent = [site for site in study.plan.sites if site not in self.addresses and site not in self.refused]
        why = list(self.refused.values()) + ([f"not connected: {', '.join(absent[:10])}"] if absent else [])
        return f"{len(self.addresses)} of at least {study.plan.min_sites} sites take part. " + "; ".join(why)


def call_the_roll(grid: Grid, study: SignedText, run: str, among: Iterable[int] | None = None) -> Roll:
    """Ask everybody connected (or only those `among`) who they are; only sites the plan names count, each once.

    Raises:
        StudyStopped: two of them carry the same name.
    """
    asked = frozenset(grid.get_node_ids() if among is None else among)
    call = RollCall(study.digest, run).pack()
    messages = [Message(call, address, "query") for address in sorted(asked)]
    addresses: dict[str, int] = {}
    refused: dict[str, str] = {}
    heads: dict[str, str] = {}
    for reply in grid.send_and_receive(messages, timeout=_SECONDS):
        present = _present(reply, study)
        if present is None:
            continue
        address = reply.metadata.src_node_id
        if addresses.get(present.site, address) != address:
            raise StudyStopped(f"two sites call themselves {present.site}")
        if present.refusal:
            refused[present.site] = printable(present.refusal)
            continue
        addresses[present.site] = address
        heads[present.site] = present.ledger_head
    return Roll(_in_order(study.plan, addresses), refused, heads, asked)


def with_newcomers(grid: Grid, study: SignedText, run: str, roll: Roll) -> Roll:
    """The roll with sites that connected since; a name that is taken stays with whoever is still connected under it."""
    connected = set(grid.get_node_ids())
    newcomers = connected - roll.asked
    if not newcomers:
        return roll
    late = call_the_roll(grid, study, run, newcomers)
    addresses = dict(roll.addresses)
    for site, address in late.addresses.items():
        if site in addresses and addresses[site] in connected:
            log.warning("somebody else calls itself %s while that site is connected; not asked", site)
            continue
        log.info("%s joined", site)
        addresses[site] = address
    return Roll(
        addresses=_in_order(study.plan, addresses),
        refused={site: why for site, why in (roll.refused | late.refused).items() if site not in addresses},
        ledger_heads=late.ledger_heads | roll.ledger_heads,
        asked=roll.asked | late.asked,
    )


def say_farewell(grid: Grid, study: SignedText, progress: Progress) -> dict[str, Settled]:
    """Tell the sites that the study is over, so that each gives back what it did not spend."""
    roll = call_the_roll(grid, study, progress.run)
    farewell = Farewell(study.digest, progress.run).pack()
    names = {address: site for site, address in roll.addresses.items()}
    messages = [Message(farewell, address, "query.close") for address in names]
    settled = {}
    for reply in grid.send_and_receive(messages, timeout=_SECONDS):
        site = names.get(reply.metadata.src_node_id, "")
        try:
            if reply.has_error():
                raise OrderRefused(printable(reply.error.reason))
            answer = Settled.unpack(reply.content)
        except OrderRefused as error:
            log.warning("farewell: %s: %s", site, error)
            continue
        if answer.site == site:
            settled[site] = answer
    return settled


def _present(reply: Message, study: SignedText) -> Present | None:
    """The presence of a site of this study; None for anybody else."""
    try:
        if reply.has_error():
            raise UpdateRefused(printable(reply.error.reason))
        present = Present.unpack(reply.content)
    except (OrderRefused, UpdateRefused) as error:
        log.warning("roll call: a site answered: %s", error)
        return None
    ours = present.site in study.plan.sites and present.study == study.digest
    return present if ours else None


def _in_order(plan: StudyPlan, addresses: dict[str, int]) -> dict[str, int]:
    return {site: addresses[site] for site in plan.sites if site in addresses}
