"""The facts of a study for its report: what the coordinator itself knows, and nothing about any record."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from wardround.common.plan import SignedText, StudyPlan
from wardround.common.privacy import NoisedSteps, spent
from wardround.common.registry import look_up
from wardround.common.tasks import TASKS
from wardround.server.checkpoint import Progress, RoundRecord

_PACKAGES = ("wardround", "flwr", "torch", "opacus", "dp-accounting", "numpy", "cryptography", "pydantic")


def study_facts(study: SignedText, progress: Progress, *, stopped: str = "") -> dict[str, Any]:
    """Study, outcome, privacy and rounds as report.json wants them; `stopped` is the reason when it did not finish."""
    plan = study.plan
    steps: list[dict[str, int]] = []
    for record in progress.history:
        steps.append(steps_after(plan, steps[-1] if steps else {}, record))
    last = steps[-1] if steps else {}
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
            "status": "stopped" if stopped else "completed",
            "reason": stopped,
            "rounds_done": progress.round,
        },
        "headline": look_up("task", plan.task, TASKS).headline,
        "privacy": {site: _privacy(study, progress, site, last.get(site, 0)) for site in plan.sites} if plan.privacy else {},
        "rounds": [_round(study, record, so_far) for record, so_far in zip(progress.history, steps, strict=True)],
        "versions": versions(),
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
        "epsilon": {site: epsilon_spent(study, count) for site, count in steps.items()} if study.plan.privacy else {},
    }
