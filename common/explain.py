"""A study plan in plain sentences."""

from __future__ import annotations

from typing import Any

from wardround.common.plan import SignedText, StudyPlan
from wardround.common.privacy import spent
from wardround.common.start import sent
from wardround.common.tasks import task_of
from wardround.common.tasks.looks import NoisedLook, look_of
from wardround.common.weights import Shapes, trainable


def facts(study: SignedText) -> dict[str, Any]:
    """The figures behind the sentences.

    Raises:
        ConfigError: no such task, or model options the task's network does not have.
    """
    plan = study.plan
    network = task_of(plan).model(plan.model, plan.seed)
    shapes = Shapes.like(trainable(network))
    look = None if plan.validation is None else look_of(task_of(plan), plan)
    found: dict[str, Any] = {
        "name": plan.name,
        "digest": study.digest,
        "task": plan.task,
        "sites": plan.sites,
        "rounds": plan.rounds,
        "min_sites": plan.min_sites,
        "min_approvals": plan.min_approvals,
        "parameters": shapes.count,
        "frozen": sum(p.numel() for p in network.parameters()) - shapes.count,
        "weights": plan.model.get("weights"),
        "bytes_per_round_and_site": {"down": Shapes.like(sent(network, plan.model)).nbytes, "up": shapes.nbytes},
        "validation": None if look is None else {"metric": look.name, "bytes_per_look_and_site": look.nbytes},
        "privacy": None,
    }
    if plan.privacy is not None:
        noise = plan.noise_multiplier()
        whole = plan.cost()
        found["privacy"] = {
            "unit": plan.privacy.unit,
            "epsilon": whole.epsilon(plan.privacy.delta),
            "epsilon_replace_one": whole.epsilon(plan.privacy.delta, "replace-one"),
            "epsilon_training": spent(whole.training, plan.privacy.delta),
            "epsilon_aside": spent(whole.aside, plan.privacy.delta) if whole.aside else None,
            "delta": plan.privacy.delta,
            "noise_multiplier": noise,
            "steps": whole.training[0].steps,
            "counts_noise_multiplier": None if (counts := plan.counts_query()) is None else counts.noise_multiplier,
            "looks_noise_multiplier": None if (looks := plan.looks_query()) is None else looks.noise_multiplier,
            "looks": plan.looks,
        }
    return found


def sentences(study: SignedText) -> list[str]:
    """The plan for somebody who has to agree to it."""
    plan, known = study.plan, facts(study)
    sites = ", ".join(f"{site} ({patients} patients)" for site, patients in list(plan.sites.items())[:20])
    more = f" and {len(plan.sites) - 20} more" if len(plan.sites) > 20 else ""
    traffic = known["bytes_per_round_and_site"]
    frozen = f", and {known['frozen']:,} that do not learn" if known["frozen"] else ""
    lines = [
        f"Study {plan.name}: {plan.title or task_of(plan).title}.",
        f"Identity (SHA-256 of the plan's text): {study.digest}",
        f"Sites: {sites}{more}.",
        f"{plan.rounds} rounds; a round with fewer than {plan.min_sites} sites changes nothing, and "
        f"{plan.lost_rounds} such rounds in a row end the study.",
        *_of_approvals(plan),
        f"The model has {known['parameters']:,} numbers{frozen}. Each round a hospital receives {traffic['down']:,} bytes and "
        f"sends {traffic['up']:,} bytes.",
        *_of_start(plan),
        f"Each round a hospital takes {plan.local.steps} local step{'s' if plan.local.steps > 1 else ''}; the coordinator "
        f"combines by {plan.combine} with {plan.weighting} weights and steps by {plan.step.rule}.",
    ]
    lines += _of_counts(plan)
    if plan.privacy is None:
        lines += [
            *_of_validation(study),
            "Privacy: none. The coordinator sees every hospital's exact update, and no bound holds for any patient.",
            "What leaves a hospital: its update each round, and the names of study, run and round. No records, no counts"
            f"{' but those of classes' if plan.loss.counts else ''}."
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
        *_of_validation(study),
        f"What it costs each patient: epsilon {cost['epsilon']:.2f} at delta {private.delta:g} over the whole study"
        f"{attempts}, comparing a world with the patient to one without; {cost['epsilon_replace_one']:.2f} if the patient "
        "is swapped for another.",
        f"How: each step draws patients with probability {private.sampling_rate:g}, takes at most "
        f"{private.records_per_patient} record{'s' if private.records_per_patient > 1 else ''} of each, clips each patient's "
        f"gradient to {private.clip_norm:g} and adds noise of {cost['noise_multiplier']:.2f} times that, at the hospital.",
        "What leaves a hospital: one noised update a round, the names of study, run and round, the number of noised steps "
        f"so far, and the hash of its ledger's newest entry. {_beside(plan)}",
    ]


def _of_counts(plan: StudyPlan) -> list[str]:
    if not plan.loss.counts:
        return []
    noised = plan.counts_query()
    how = "exact and without noise" if noised is None else f"with noise of deviation {noised.noise_multiplier:g} in each count"
    return [f"Before the first round each hospital answers how its training patients fall into classes, {how}."]


def _beside(plan: StudyPlan) -> str:
    """What else leaves a hospital in a private study."""
    questions = []
    if plan.loss.counts:
        questions.append("once the noised count of each class")
    if plan.looks_query() is not None:
        questions.append("after each look two noised sums over the patients set aside")
    if not questions:
        return "No records, no counts, no losses."
    return f"And {' and '.join(questions)}. No records, and no count or loss without noise."


def _of_approvals(plan: StudyPlan) -> list[str]:
    if not plan.min_approvals:
        return []
    return [
        f"Nothing is trained before {plan.min_approvals} of these {len(plan.sites)} hospitals have signed an approval of it."
    ]


def _of_start(plan: StudyPlan) -> list[str]:
    if "weights" not in plan.model:
        return []
    return [
        f"It starts from public weights out of the coordinator's file ({plan.model['weights']}). No epsilon of this study "
        "covers records that those were trained on."
    ]


def _of_validation(study: SignedText) -> list[str]:
    plan = study.plan
    if plan.validation is None:
        return []
    of, metric = plan.validation, look_of(task_of(plan), plan).label
    end = "" if of.patience is None else f" The study ends early after {of.patience} in a row without a new best {metric}."
    model = "that of the best look" if of.keep == "best" else "that of the last round"
    return [
        f"Validation: about {of.share:.0%} of each hospital's training patients are set aside and never trained on. They are "
        f"looked at every {of.every} rounds and after the last one, for {metric}; the released model is {model}.{end}"
        f"{_of_noise(plan)}"
    ]


def _of_noise(plan: StudyPlan) -> str:
    """What a private look costs, and how much can be seen in it."""
    wanted = look_of(task_of(plan), plan)
    if plan.privacy is None or plan.validation is None or not isinstance(wanted, NoisedLook):
        return ""
    blur = wanted.deviation(plan.validation.share * sum(plan.sites.values()), len(plan.sites))
    cost = spent(plan.cost().aside, plan.privacy.delta)
    return (
        f" Each look is a noised sum of losses, clipped at {wanted.cap:g} for each patient. All {plan.looks} looks cost a "
        f"patient set aside epsilon {cost:.2f} and a patient trained on nothing; by the declared numbers, a figure is off by "
        f"about {blur:.2g}."
    )
