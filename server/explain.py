"""A study plan in plain sentences."""

from __future__ import annotations

from typing import Any

from wardround.common.plan import SignedText
from wardround.common.privacy import spent
from wardround.common.tasks import task_of
from wardround.common.tasks.looks import look_of
from wardround.common.weights import Shapes, trainable


def facts(study: SignedText) -> dict[str, Any]:
    """The figures behind the sentences.

    Raises:
        ConfigError: no such task, or model options the task's network does not have.
    """
    plan = study.plan
    shapes = Shapes.like(trainable(task_of(plan).model(plan.model, plan.seed)))
    look = None if plan.validation is None else look_of(task_of(plan), plan)
    found: dict[str, Any] = {
        "name": plan.name,
        "digest": study.digest,
        "task": plan.task,
        "sites": plan.sites,
        "rounds": plan.rounds,
        "min_sites": plan.min_sites,
        "parameters": shapes.count,
        "bytes_per_round_and_site": {"down": shapes.nbytes, "up": shapes.nbytes},
        "validation": None if look is None else {"metric": look.metric.name, "bytes_per_look_and_site": look.nbytes},
        "privacy": None,
    }
    if plan.privacy is not None:
        noise = plan.noise_multiplier()
        whole = [plan.noised_steps(noise)]
        found["privacy"] = {
            "unit": plan.privacy.unit,
            "epsilon": spent(whole, plan.privacy.delta),
            "epsilon_replace_one": spent(whole, plan.privacy.delta, "replace-one"),
            "delta": plan.privacy.delta,
            "noise_multiplier": noise,
            "steps": whole[0].steps,
        }
    return found


def sentences(study: SignedText) -> list[str]:
    """The plan for somebody who has to agree to it."""
    plan, known = study.plan, facts(study)
    sites = ", ".join(f"{site} ({patients} patients)" for site, patients in list(plan.sites.items())[:20])
    more = f" and {len(plan.sites) - 20} more" if len(plan.sites) > 20 else ""
    up = known["bytes_per_round_and_site"]["up"]
    lines = [
        f"Study {plan.name}: {plan.title or task_of(plan).title}.",
        f"Identity (SHA-256 of the plan's text): {study.digest}",
        f"Sites: {sites}{more}.",
        f"{plan.rounds} rounds; a round with fewer than {plan.min_sites} sites changes nothing, and "
        f"{plan.lost_rounds} such rounds in a row end the study.",
        f"The model has {known['parameters']:,} numbers. Each round a hospital receives {up:,} bytes and sends {up:,} bytes.",
        f"Each round a hospital takes {plan.local.steps} local step{'s' if plan.local.steps > 1 else ''}; the coordinator "
        f"combines by {plan.combine} with {plan.weighting} weights and steps by {plan.step.rule}.",
    ]
    if plan.privacy is None:
        lines += [
            *_of_validation(study),
            "Privacy: none. The coordinator sees every hospital's exact update, and no bound holds for any patient.",
            "What leaves a hospital: its update each round, and the names of study, run and round. No records, no counts."
            if plan.validation is None
            else "What leaves a hospital: its update each round, the names of study, run and round, and after each look the "
            "sums over the patients set aside, exact and without noise: counts by class, by answer and by predicted "
            "probability, and total losses. No records.",
        ]
        return lines
    private, cost = plan.privacy, known["privacy"]
    attempts = f", counting {private.max_attempts} attempts a round" if private.max_attempts > 1 else ""
    return [
        *lines,
        f"What it costs each patient: epsilon {cost['epsilon']:.2f} at delta {private.delta:g} over the whole study"
        f"{attempts}, comparing a world with the patient to one without; {cost['epsilon_replace_one']:.2f} if the patient "
        "is swapped for another.",
        f"How: each step draws patients with probability {private.sampling_rate:g}, takes at most "
        f"{private.records_per_patient} record{'s' if private.records_per_patient > 1 else ''} of each, clips each patient's "
        f"gradient to {private.clip_norm:g} and adds noise of {cost['noise_multiplier']:.2f} times that, at the hospital.",
        "What leaves a hospital: one noised update a round, the names of study, run and round, the number of noised steps "
        "so far, and the hash of its ledger's newest entry. No records, no counts, no losses.",
    ]


def _of_validation(study: SignedText) -> list[str]:
    plan = study.plan
    if plan.validation is None:
        return []
    of, metric = plan.validation, look_of(task_of(plan), plan).metric.label
    end = "" if of.patience is None else f" The study ends early after {of.patience} in a row without a new best {metric}."
    model = "that of the best look" if of.keep == "best" else "that of the last round"
    return [
        f"Validation: about {of.share:.0%} of each hospital's training patients are set aside and never trained on. They are "
        f"looked at every {of.every} rounds and after the last one, for {metric}; the released model is {model}.{end}"
    ]
