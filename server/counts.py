"""How many training patients of each class there are: asked once, before the first round, and remembered ever after.

Sums are added in the plan's order, so the shares have the same bits every time. They lie in the checkpoint, so a resumed study
asks nobody again; a coordinator that was killed before it wrote them down is sent the same answers once more, for nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from wardround.common.errors import OrderRefused, StudyStopped, UpdateRefused
from wardround.common.messages import CountedFacts, CountFacts
from wardround.common.plan import SignedText, StudyPlan
from wardround.common.tasks import task_of
from wardround.common.tasks.of_plan import shares_of
from wardround.server.checkpoint import Counted, Progress
from wardround.server.collect import printable

log = logging.getLogger("wardround.coordinator")


@dataclass(frozen=True)
class _Answer:
    counts: tuple[float, ...]
    ledger_head: str


def with_counts(grid: Grid, study: SignedText, progress: Progress, addresses: Mapping[str, int]) -> Progress:
    """`progress` with the classes counted, where the plan wants that and nobody was asked yet.

    Raises:
        StudyStopped: fewer than `min_sites` answered soundly.
    """
    plan = study.plan
    if not plan.loss.counts or progress.counted is not None or progress.round >= plan.rounds:
        return progress
    asked = {site: CountFacts(study.digest, progress.run, progress.ledger_heads.get(site, "")) for site in addresses}
    messages = [Message(facts.pack(), addresses[site], "query.counts") for site, facts in asked.items()]
    site_at = {address: site for site, address in addresses.items()}
    found: dict[str, _Answer] = {}
    missing = dict.fromkeys(addresses, f"no answer within {plan.deadline_seconds:g} s")
    for reply in grid.send_and_receive(messages, timeout=plan.deadline_seconds):
        site = site_at.get(reply.metadata.src_node_id)
        if site is None:
            continue
        try:
            found[site] = _sound(reply, asked[site], site, plan)
            missing.pop(site, None)
        except (OrderRefused, UpdateRefused) as error:
            missing[site] = str(error)
            log.warning("counting classes: %s is left out: %s", site, error)
    if len(found) < plan.min_sites:
        why = "; ".join(f"{site}: {reason}" for site, reason in list(missing.items())[:5])
        raise StudyStopped(f"only {len(found)} of at least {plan.min_sites} sites counted their classes ({why})")
    in_order = [found[site] for site in plan.sites if site in found]
    total = tuple(math.fsum(column) for column in zip(*(answer.counts for answer in in_order), strict=True))
    heads = {site: answer.ledger_head for site, answer in found.items() if answer.ledger_head}
    counted = Counted([site for site in plan.sites if site in found], list(total), missing)
    return replace(progress, counted=counted, ledger_heads=progress.ledger_heads | heads)


def deviation(plan: StudyPlan, counted: Counted) -> float:
    """Standard deviation of the noise in each of the counts; 0 without [privacy]."""
    noised = plan.counts_query()
    return 0.0 if noised is None else noised.noise_multiplier * math.sqrt(len(counted.sites))


def shares(plan: StudyPlan, progress: Progress) -> tuple[float, ...] | None:
    """The share of each class, as every order carries it; None where the plan has no classes counted."""
    if progress.counted is None:
        return None
    return shares_of(tuple(progress.counted.counts), deviation(plan, progress.counted))


def _sound(reply: Message, asked: CountFacts, site: str, plan: StudyPlan) -> _Answer:
    if reply.has_error():
        raise UpdateRefused(printable(reply.error.reason))
    if set(reply.content.keys()) != {"facts"}:
        raise UpdateRefused("the message should hold counts, nothing else")
    facts = CountedFacts.unpack(reply.content)
    if (facts.site, facts.study, facts.run) != (site, asked.study, asked.run):
        raise UpdateRefused("the reply belongs to another question")
    classes = task_of(plan).schema.classes
    if len(facts.sums) != 8 * classes:
        raise UpdateRefused(f"the counts should be those of {classes} classes")
    counts = np.frombuffer(facts.sums, "<f8")
    if not np.isfinite(counts).all() or (plan.privacy is None and (counts < 0).any()):
        raise UpdateRefused("the counts are none")
    return _Answer(tuple(counts.tolist()), facts.ledger_head)
