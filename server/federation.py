"""A study, round by round: ask, combine, step, write down. Plain functions on plain values.

A round below `min_sites` changes nothing. The same round is ordered again, under the same number, only after a crash;
sites then answer from their ledgers without spending anything.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.serverapp import Grid

from wardround.common.errors import StudyStopped
from wardround.common.messages import LookFacts, OrderFacts
from wardround.common.plan import SignedText, StudyPlan
from wardround.common.start import start
from wardround.common.tasks.of_plan import packed
from wardround.common.vault import Vault
from wardround.common.weights import Shapes, Weights, norm
from wardround.server.checkpoint import Progress, RoundRecord
from wardround.server.collect import Collected, collect
from wardround.server.counts import shares, with_counts
from wardround.server.roll import Roll, call_the_roll, with_newcomers
from wardround.server.step import released, step
from wardround.server.validation import Seen, ended_early, look, with_best

log = logging.getLogger("wardround.coordinator")


@dataclass(frozen=True)
class Observer:
    """Who watches a study. In a simulation `measure` scores each round's model; a real coordinator has no records.

    Attributes:
        began: called once with the sites present and the refusals.
        measure: (round, the model that would be released now) -> metrics to write down.
        round_done: called after each round is safe on disk.
    """

    began: Callable[[list[str], dict[str, str]], None] = lambda present, refused: None
    measure: Callable[[int, Weights], dict[str, float]] = lambda round, weights: {}
    round_done: Callable[[RoundRecord], None] = lambda record: None


def opened(study: SignedText, folder: Path | None, weights: Path | None = None, vault: Vault = Vault.none()) -> Progress:
    """Where the study stands: its newest checkpoint, or a first model, from the plan's seed or the file `weights`.

    Raises:
        ConfigError: that file is not the one the plan names; see `common.start`.
    """
    if folder is not None and (found := Progress.latest(folder, study=study.digest, vault=vault)) is not None:
        log.info("going on after round %d", found.round)
        return found
    first = start(study.plan, weights)
    run = secrets.token_hex(8)
    return Progress(study.digest, run, round=0, weights=first.weights, frozen=first.frozen, start=first.notes)


def finished(plan: StudyPlan, progress: Progress) -> bool:
    """Whether nothing is left to train."""
    return progress.round >= plan.rounds or bool(ended_early(plan, progress.history))


def run(
    grid: Grid,
    study: SignedText,
    progress: Progress,
    *,
    folder: Path | None,
    every: int,
    observer: Observer,
    vault: Vault = Vault.none(),
) -> Progress:
    """Train from `progress` to the plan's last round, or until its patience is over.

    Args:
        grid: how messages reach sites.
        study: the plan.
        progress: where to start.
        folder: where checkpoints go; None keeps nothing.
        every: rounds between two checkpoints; the last round is always kept.
        observer: who watches.
        vault: what seals the checkpoints.

    Raises:
        StudyStopped: too few sites at the roll call, or to count classes, or in too many rounds in a row, or a checkpoint
            cannot be written.
    """
    plan = study.plan
    if progress.round == 0:
        _keep(progress, folder, vault)  # the run's name must survive a crash before any site reserves privacy under it
    roll = call_the_roll(grid, study, progress.run)
    observer.began(list(roll.addresses), roll.refused)
    if len(roll.addresses) < plan.min_sites and not finished(plan, progress):
        raise StudyStopped(roll.too_few(study))
    # a site's head from an earlier run of this coordinator outranks what the site says of itself today
    progress = replace(progress, ledger_heads=roll.ledger_heads | progress.ledger_heads)
    if (counted := with_counts(grid, study, progress, roll.addresses)) is not progress:
        progress = counted
        _keep(progress, folder, vault)  # what was answered must survive a crash before anything is trained with it
    shapes = Shapes.like(progress.weights)
    while not finished(plan, progress):
        roll = with_newcomers(grid, study, progress.run, roll)
        progress = one_round(grid, study, progress, shapes, roll, observer)
        if progress.round % every == 0 or finished(plan, progress):
            _keep(progress, folder, vault)
        observer.round_done(progress.history[-1])
        if progress.lost_in_a_row >= plan.lost_rounds:
            _keep(progress, folder, vault)
            raise StudyStopped(
                f"{progress.lost_in_a_row} rounds in a row had fewer than {plan.min_sites} sites ({_reasons(progress)})"
            )
    if all(record.lost for record in progress.history):
        raise StudyStopped(f"none of {plan.rounds} rounds had {plan.min_sites} sites ({_reasons(progress)})")
    return progress


def one_round(grid: Grid, study: SignedText, progress: Progress, shapes: Shapes, roll: Roll, observer: Observer) -> Progress:
    """One round: the new progress, in which the model moved or the round is written down as lost."""
    plan, number, start = study.plan, progress.round + 1, time.perf_counter()
    heads, classes = progress.ledger_heads, packed(shares(plan, progress))
    orders = {site: OrderFacts(study.digest, progress.run, number, 1, heads.get(site, ""), classes) for site in roll.addresses}
    found = collect(grid, plan, shapes, progress.weights | progress.frozen, orders, roll.addresses)
    weights, state, length = progress.weights, progress.state, None
    if found.update is not None:
        weights, state = step(weights, found.update, state, plan, number)
        length = norm(found.update)
    heads = heads | _seen(found)
    current, seen = released(weights, state), Seen()
    if found.update is not None and plan.looks_after(number):
        asked = {site: LookFacts(study.digest, progress.run, number, heads.get(site, ""), classes) for site in roll.addresses}
        seen = look(grid, study, asked, current | progress.frozen, roll.addresses)
    record = RoundRecord(
        round=number,
        attempt=found.attempt,
        seconds=time.perf_counter() - start,
        sites=found.sites,
        dropped=found.dropped,
        lost=found.update is None,
        update_norm=length,
        metrics=observer.measure(number, current | progress.frozen),
        steps_spent=found.steps_spent,
        validation=seen.value,
        not_validated=seen.missing,
        looked_at=seen.asked,
    )
    history = [*progress.history, record]
    return Progress(
        study=progress.study,
        run=progress.run,
        round=number,
        weights=weights,
        state=state,
        ledger_heads=heads | seen.ledger_heads,
        lost_in_a_row=progress.lost_in_a_row + 1 if record.lost else 0,
        history=history,
        best=with_best(plan, history, progress.best, current),
        counted=progress.counted,
        frozen=progress.frozen,
        start=progress.start,
    )


def _keep(progress: Progress, folder: Path | None, vault: Vault) -> None:
    if folder is None:
        return
    try:
        progress.save(folder, vault)
    except OSError as error:
        raise StudyStopped(f"the checkpoint of round {progress.round} cannot be written: {error.strerror}") from None


def _reasons(progress: Progress) -> str:
    return "; ".join(f"{site}: {why}" for site, why in list(progress.history[-1].dropped.items())[:5])


def _seen(found: Collected) -> dict[str, str]:
    return {site: head for site, head in found.ledger_heads.items() if head}
