"""The facts of a study for its report: what the coordinator itself knows, and nothing about any record."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from wardround.common.plan import SignedText, StudyPlan
from wardround.common.privacy import Cost, spent
from wardround.common.tasks import task_of
from wardround.common.tasks.looks import NoisedLook, look_of
from wardround.common.tasks.of_plan import as_counted
from wardround.server.checkpoint import Progress, RoundRecord
from wardround.server.counts import deviation, shares
from wardround.server.sheet import sheet
from wardround.server.validation import best_round, ended_early, handed_out

_PACKAGES = ("wardround", "flwr", "torch", "opacus", "dp-accounting", "numpy", "cryptography", "pydantic")


def study_facts(study: SignedText, progress: Progress, *, stopped: str = "") -> dict[str, Any]:
    """Study, outcome, privacy and rounds as report.json wants them; `stopped` is the reason when it did not finish."""
    plan = study.plan
    steps: list[dict[str, int]] = []
    for record in progress.history:
        steps.append(steps_after(plan, steps[-1] if steps else {}, record))
    last = steps[-1] if steps else {}
    early = "" if stopped else ended_early(plan, progress.history)
    return {
        "schema": "wardround-report/1",
        "study": {
            "name": plan.name,
            "title": plan.title or plan.name,
            "task": plan.task,
            "digest": study.digest,
            "run": progress.run,
            "rounds": plan.rounds,
            "plan": study.text,
        },
        "outcome": {
            "status": "stopped" if stopped else "completed early" if early else "completed",
            "reason": stopped or early,
            "rounds_done": progress.round,
        },
        "headline": task_of(plan).headline,
        "privacy": {site: _privacy(study, progress, site, last.get(site, 0)) for site in plan.sites} if plan.privacy else {},
        "validation": _validation(plan, progress),
        "class_counts": _class_counts(plan, progress),
        "rounds": [_round(plan, progress, number, so_far) for number, so_far in enumerate(steps)],
        "versions": versions(),
        "sheet": sheet(plan, handed_out(plan, progress)),
    }


def spent_on(plan: StudyPlan, steps: int, *, counted: bool, looks: int) -> Cost:
    """What a site released of its patients by these steps and questions."""
    training, *counts = plan.cost().training
    aside = tuple(replace(part, steps=min(looks, part.steps)) for part in plan.cost().aside)
    return Cost((replace(training, steps=min(steps, training.steps)), *(counts if counted else ())), aside)


def holding(plan: StudyPlan, done: Cost) -> Cost:
    """The cost that may be claimed for what was `done`.

    Where looks decide when a study is over, its length follows from the patients. Nothing but the whole plan's cost is then
    known to hold: the study behaves as if it had gone on and the rest had been thrown away.
    """
    began = any(part.steps for part in (*done.training, *done.aside))
    open_ended = plan.validation is not None and plan.validation.patience is not None
    return plan.cost() if open_ended and began else done


def looks_of(site: str, history: Sequence[RoundRecord]) -> int:
    """At how many looks a site was asked; one whose answer was lost may have charged it all the same."""
    return sum(site in record.looked_at for record in history)


def was_counted(site: str, progress: Progress) -> bool:
    """Whether a site was asked for its classes; as `looks_of`."""
    return progress.counted is not None and site in (*progress.counted.sites, *progress.counted.missing)


def versions() -> dict[str, str]:
    """What computed this."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _validation(plan: StudyPlan, progress: Progress) -> dict[str, Any] | None:
    if plan.validation is None:
        return None
    best = best_round(plan, progress.history)
    wanted = look_of(task_of(plan), plan)
    noised = isinstance(wanted, NoisedLook)
    return {
        "metric": wanted.name,
        "share": plan.validation.share,
        "looks": sum(record.validation is not None for record in progress.history),
        "best_round": best,
        "best": None if best is None else progress.history[best - 1].validation,
        "keep": plan.validation.keep,
        "cap": plan.validation.cap if noised else None,
        "deviation": (
            wanted.deviation(plan.validation.share * sum(plan.sites.values()), len(plan.sites))
            if isinstance(wanted, NoisedLook)
            else None
        ),
    }


def _class_counts(plan: StudyPlan, progress: Progress) -> dict[str, Any] | None:
    counted, found = progress.counted, shares(plan, progress)
    if counted is None or found is None:
        return None
    used = as_counted(plan.loss, found, len(found))
    return {
        "sites": counted.sites,
        "missing": counted.missing,
        "counts": counted.counts,
        "deviation": deviation(plan, counted),
        "shares": found,
        "weights": used.class_weights if plan.loss.class_weights == "counted" else None,
    }


def _privacy(study: SignedText, progress: Progress, site: str, steps: int) -> dict[str, Any]:
    plan, private = study.plan, study.plan.private()
    whole, looks = plan.cost(), looks_of(site, progress.history)
    done = spent_on(plan, steps, counted=was_counted(site, progress), looks=looks)
    return {
        **epsilons(plan, done),
        "delta": private.delta,
        "unit": private.unit,
        "planned": whole.epsilon(private.delta),
        "noise_multiplier": whole.training[0].noise_multiplier,
        "sampling_rate": private.sampling_rate,
        "clip_norm": private.clip_norm,
        "steps": done.training[0].steps,
        "steps_planned": whole.training[0].steps,
        "counts_noise_multiplier": None if (counts := plan.counts_query()) is None else counts.noise_multiplier,
        "looks_noise_multiplier": None if (asked := plan.looks_query()) is None else asked.noise_multiplier,
        "looks": looks if asked else 0,
        "looks_planned": asked.steps if asked else 0,
        "lifetime_charged": None,
        "lifetime_limit": None,
        "ledger_head": progress.ledger_heads.get(site, ""),
    }


def epsilons(plan: StudyPlan, done: Cost) -> dict[str, float | None]:
    """What `done` costs, at the plan's delta: the patient who pays more, and those on each side of the split."""
    delta, held = plan.private().delta, holding(plan, done)
    return {
        "epsilon": held.epsilon(delta),
        "epsilon_replace_one": held.epsilon(delta, "replace-one"),
        "epsilon_training": spent(held.training, delta),
        "epsilon_aside": spent(held.aside, delta) if plan.looks_query() else None,
    }


def steps_after(plan: StudyPlan, before: Mapping[str, int], record: RoundRecord) -> dict[str, int]:
    """Noised steps of each site after a round.

    A site whose reply was lost may have spent the round all the same; its next sound reply says what is true.
    """
    after = {**before, **record.steps_spent}
    for site in record.dropped.keys() - record.steps_spent.keys():
        after[site] = before.get(site, 0) + record.attempt * plan.local.steps
    return after


def epsilons_after(plan: StudyPlan, progress: Progress, rounds: int, steps: Mapping[str, int]) -> dict[str, float]:
    """Spent so far by each site after so many rounds, in which it took these `steps`; empty without [privacy]."""
    if plan.privacy is None:
        return {}
    done = {
        site: spent_on(plan, count, counted=was_counted(site, progress), looks=looks_of(site, progress.history[:rounds]))
        for site, count in steps.items()
    }
    return {site: cost.epsilon(plan.privacy.delta) for site, cost in done.items()}


def _round(plan: StudyPlan, progress: Progress, number: int, steps: Mapping[str, int]) -> dict[str, Any]:
    record = progress.history[number]
    return {
        "round": record.round,
        "attempt": record.attempt,
        "seconds": record.seconds,
        "sites": record.sites,
        "dropped": record.dropped,
        "lost": record.lost,
        "update_norm": record.update_norm,
        "metrics": record.metrics,
        "validation": record.validation,
        "not_validated": record.not_validated,
        "epsilon": epsilons_after(plan, progress, number + 1, steps),
    }
