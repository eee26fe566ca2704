"""The facts of a study for its report: what the coordinator itself knows, and nothing about any record."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from wardround.common.plan import SignedText, StudyPlan
from wardround.common.privacy import NoisedSteps, spent
from wardround.common.tasks import task_of
from wardround.common.tasks.looks import look_of
from wardround.server.checkpoint import Progress, RoundRecord
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
        "rounds": [_round(study, record, so_far) for record, so_far in zip(progress.history, steps, strict=True)],
        "versions": versions(),
        "sheet": sheet(plan, handed_out(progress)),
    }


def epsilon_spent(study: SignedText, steps: int) -> float:
    """What `steps` noised steps of this study cost a patient, at the plan's delta."""
    plan = study.plan
    private = plan.private()
    return spent([NoisedSteps(private.sampling_rate, plan.noise_multiplier(), steps)], private.delta)


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
    return {
        "metric": look_of(task_of(plan), plan).metric.name,
        "share": plan.validation.share,
        "looks": sum(record.validation is not None for record in progress.history),
        "best_round": best,
        "best": None if best is None else progress.history[best - 1].validation,
        "keep": plan.validation.keep,
    }


def _privacy(study: SignedText, progress: Progress, site: str, steps: int) -> dict[str, Any]:
    plan, private = study.plan, study.plan.private()
    noise = plan.noise_multiplier()
    whole = plan.noised_steps(noise)
    steps = min(steps, whole.steps)
    done = NoisedSteps(private.sampling_rate, noise, steps)
    return {
        "epsilon": spent([done], private.delta),
        "epsilon_replace_one": spent([done], private.delta, "replace-one"),
        "delta": private.delta,
        "unit": private.unit,
        "planned": spent([whole], private.delta),
        "noise_multiplier": noise,
        "sampling_rate": private.sampling_rate,
        "clip_norm": private.clip_norm,
        "steps": steps,
        "steps_planned": whole.steps,
        "lifetime_charged": None,
        "lifetime_limit": None,
        "ledger_head": progress.ledger_heads.get(site, ""),
    }


def steps_after(plan: StudyPlan, before: Mapping[str, int], record: RoundRecord) -> dict[str, int]:
    """Noised steps of each site after a round.

    A site whose reply was lost may have spent the round all the same; its next sound reply says what is true.
    """
    after = {**before, **record.steps_spent}
    for site in record.dropped.keys() - record.steps_spent.keys():
        after[site] = before.get(site, 0) + record.attempt * plan.local.steps
    return after


def _round(study: SignedText, record: RoundRecord, steps: Mapping[str, int]) -> dict[str, Any]:
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
        "epsilon": {site: epsilon_spent(study, count) for site, count in steps.items()} if study.plan.privacy else {},
    }
