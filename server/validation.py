"""Looks at the patients that sites set aside: how well a model does there, which one is kept, and when a study is over early.

Tallies are added in the plan's order, so a look has the same bits every time. Every decision follows from the history alone,
and the history is in the checkpoint, so a resumed study decides the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from wardround.common.errors import OrderRefused, UpdateRefused, WardroundError
from wardround.common.messages import LookFacts, TallyFacts
from wardround.common.plan import SignedText, StudyPlan
from wardround.common.tasks import task_of
from wardround.common.tasks.looks import look_of
from wardround.common.weights import Weights, pack
from wardround.server.checkpoint import Progress, RoundRecord
from wardround.server.collect import Line, Mail, printable
from wardround.server.step import released

log = logging.getLogger("wardround.coordinator")


@dataclass(frozen=True)
class Seen:
    """What a look saw.

    Attributes:
        value: the metric over all patients set aside; None where fewer than `min_sites` answered, or it is undefined.
        missing: site -> why it is left out.
        asked: every site that was asked.
        ledger_heads: site -> the newest entry of its ledger, where it charged the look.
    """

    value: float | None = None
    missing: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    ledger_heads: dict[str, str] = field(default_factory=dict)


def look(grid: Grid, study: SignedText, asked: Mapping[str, LookFacts], model: Weights, addresses: Mapping[str, int]) -> Seen:
    """Have every site `asked` judge `model` on the patients it set aside, and sum up what they answer."""
    plan = study.plan
    wanted = look_of(task_of(plan), plan)
    mail = Mail[LookFacts](grid, "evaluate", pack(model), addresses, plan.deadline_seconds)
    mail.send(asked)
    total: list[Any] = []
    missing: dict[str, str] = {}
    counted: list[str] = []
    heads: dict[str, str] = {}

    def fold(site: str, sums: Any) -> None:  # a tally of classes, or noised sums: both add
        total[:] = [total[0] + sums] if total else [sums]
        counted.append(site)

    line = Line[Any](list(asked), fold)
    for site, reply in mail.replies():
        try:
            facts = _sound(reply, site, asked[site])
            sums = wanted.unpack(facts.sums)
        except WardroundError as error:
            missing[site] = str(error)
            line.skip(site)
            log.warning("round %d: %s is not looked at: %s", asked[site].round, site, error)
            continue
        heads |= {site: facts.ledger_head} if plan.privacy and facts.ledger_head else {}
        line.take(site, sums)
    for site in mail.unanswered:
        missing[site] = f"no answer within {plan.deadline_seconds:g} s"
        line.skip(site)
    value = wanted.figure(total[0]) if len(counted) >= plan.min_sites else None
    return Seen(value, missing, list(asked), heads)


def best_round(plan: StudyPlan, history: Sequence[RoundRecord]) -> int | None:
    """The round whose model did best when it was looked at, the first of equals; None before the first look."""
    values = _looked_at(history)
    if not values:
        return None
    wanted = look_of(task_of(plan), plan)
    best = next(iter(values))
    for round, value in values.items():
        if wanted.better(value, values[best]):
            best = round
    return best


def ended_early(plan: StudyPlan, history: Sequence[RoundRecord]) -> str:
    """Why the study is over before its last round; empty while it is not."""
    if plan.validation is None or plan.validation.patience is None or len(history) >= plan.rounds:
        return ""
    best = best_round(plan, history)
    since = [round for round in _looked_at(history) if best is not None and round > best]
    if len(since) < plan.validation.patience:
        return ""
    metric = look_of(task_of(plan), plan).label
    looks = "look" if len(since) == 1 else f"{len(since)} looks in a row"
    return f"after round {best}, {looks} found no better {metric} on the patients set aside for validation"


def with_best(plan: StudyPlan, history: Sequence[RoundRecord], best: Weights, current: Weights) -> Weights:
    """The model to release so far: a copy of `current` where its look was the best, else `best` as it was."""
    kept = plan.validation is not None and plan.validation.keep == "best" and history[-1].validation is not None
    if not kept or best_round(plan, history) != history[-1].round:
        return best
    return {name: tensor.clone() for name, tensor in current.items()}


def handed_out(plan: StudyPlan, progress: Progress) -> Weights:
    """The model to hand out, with what is frozen in it: the best one where validation keeps it, else that of the last round."""
    return task_of(plan).released((progress.best or released(progress.weights, progress.state)) | progress.frozen)


def _looked_at(history: Sequence[RoundRecord]) -> dict[int, float]:
    return {record.round: record.validation for record in history if record.validation is not None}


def _sound(reply: Message, site: str, asked: LookFacts) -> TallyFacts:
    if reply.has_error():
        raise UpdateRefused(printable(reply.error.reason))
    if set(reply.content.keys()) != {"facts"}:
        raise UpdateRefused("the message should hold a tally, nothing else")
    try:
        facts = TallyFacts.unpack(reply.content)
    except OrderRefused as error:
        raise UpdateRefused(str(error)) from None
    if facts.site != site:
        raise UpdateRefused("the reply carries another site's name")
    if (facts.study, facts.run, facts.round) != (asked.study, asked.run, asked.round):
        raise UpdateRefused("the reply belongs to another look")
    return facts
