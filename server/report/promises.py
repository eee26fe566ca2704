"""What a patient paid, what the guarantee does not say, and what left a hospital."""

from __future__ import annotations

import math

from wardround.server.report.schema import Report
from wardround.server.report.words import bound, chance, small


def price(report: Report) -> list[str]:
    """What a patient paid, and what that means."""
    if not report.private:
        return [
            "This study ran without differential privacy. No mathematical guarantee limits what the updates or the model "
            "reveal about a patient. Federated training leaves the records where they are, and that alone is known not to "
            "be enough."
        ]
    if not report.privacy:
        return ["The plan asks for differential privacy for each patient. No hospital is on record as having spent any."]
    dearest = max(report.privacy.values(), key=lambda site: site.epsilon)
    delta = max(site.delta for site in report.privacy.values())
    each = all(bound(site.epsilon) == bound(dearest.epsilon) for site in report.privacy.values())
    where = "at each hospital" if each else "at the hospital that spent most"
    text = f"Each patient is protected by differential privacy. A patient paid at most epsilon {bound(dearest.epsilon)} at "
    text += f"delta {small(delta)} {where}; the whole plan may cost {bound(dearest.planned)}."
    twin = max(site.epsilon_replace_one for site in report.privacy.values())
    sides = [site for site in report.privacy.values() if site.epsilon_aside is not None]
    if sides:
        trained, aside = (max(getattr(site, f"epsilon_{side}") or 0.0 for site in sides) for side in ("training", "aside"))
        text += f" The patients trained on paid at most {bound(trained)}, those set aside for validation at most "
        text += f"{bound(aside)}; nobody is both, so the larger of the two is the study's."
    return [
        text,
        f"This means: whatever is concluded from all the updates of a hospital is at most {_times(dearest.epsilon)} times as "
        f"likely with the patient's records as without them (e to the power of epsilon), apart from a probability of "
        f"{chance(delta)} (delta). It holds against the coordinator, against the other hospitals and against everybody who "
        "gets the model. Smaller is better; 0 would mean that nothing can be learnt about the patient.",
        "The two worlds compared here are one with the patient and one without: the relation is called add-or-remove. Some "
        "texts compare with a world in which another patient takes the place (replace-one); by that count, the same study "
        f"costs at most epsilon {bound(twin)}. A figure from elsewhere can only be compared under the same relation.",
    ]


def not_covered(report: Report) -> list[str]:
    """What the guarantee does not say."""
    lines = [
        "A patient who was treated at several of these hospitals pays at each of them; the costs add up.",
        "The plan, the names of the hospitals and the rounded numbers of patients in the plan are public.",
        "What the model teaches about patients in general, it also teaches about a patient who took no part.",
        "The guarantee rests on every hospital running the published software unchanged, and on Gaussian noise computed "
        "with floating-point numbers.",
    ]
    if report.results.federated:
        lines.append(
            "The figures on test patients in this report are exact and not noised. Test patients were not trained on, and "
            "epsilon says nothing about them."
        )
    if report.results.local or report.results.pooled:
        lines.append(
            "The models of the hospitals alone and of the pooled records were trained without noise on the very patients who "
            "are protected here, so the figures of those models are not covered by epsilon. Leave them out (--no-baselines) "
            "where the training records must not be looked at."
        )
    return lines


def what_left(report: Report) -> list[str]:
    """What a hospital sends, message by message."""
    steps = "the number of noised steps so far, which follows from the plan and the rounds taken part in"
    update = "one model update, neither clipped nor noised"
    if report.private:
        norms = sorted({site.clip_norm for site in report.privacy.values()})
        sigmas = sorted({site.noise_multiplier for site in report.privacy.values()})
        amount = ""
        if len(norms) == 1 and len(sigmas) == 1:
            amount = f" (clip norm {norms[0]:g}; standard deviation of the noise {norms[0] * sigmas[0]:.4g})"
        update = (
            "one model update. Each step in it is a sum to which no patient adds more than the clip norm, and to which the "
            f"hospital added Gaussian noise before it left{amount}"
        )
    of = report.validation
    lines = [
        f"In each round it takes part in: {update}.",
        "With the update: the hospital's name, the study, the run, the round and the attempt it belongs to"
        + (f"; the newest hash of its privacy ledger; {steps}." if report.private else "."),
        "When the study is opened: its name, the study, and whether it takes part; if not, a short refusal.",
    ]
    if report.class_counts is not None:
        deviation = report.class_counts.deviation / max(1, len(report.class_counts.sites)) ** 0.5
        how = f"with Gaussian noise of standard deviation {deviation:.4g} in each" if deviation else "exact and without noise"
        lines.append(f"Once, before the first round: how many training patients are of each class, {how}.")
    if of is not None and of.deviation is not None:
        lines.append(
            f"After some rounds, as the plan says: two sums over the patients set aside for validation (about {of.share:.0%}), "
            f"of their losses (at most {of.cap:g} each) and of their number, to which no patient adds a vector longer than 1, "
            "with Gaussian noise that the hospital added before they left."
        )
    elif of is not None:
        lines.append(
            f"After some rounds, as the plan says: sums over the patients set aside for validation (about {of.share:.0%}), "
            "exact and without noise: how many are of each class, how many are called so, how often each range of predicted "
            "probabilities came up, and total losses. A hospital with few such patients sends none."
        )
    settled = "; the newest hash of its ledger; the number of noised steps spent" if report.private else ""
    lines.append(f"When the study is over: its name and the study{settled}.")
    lines.append("Where it refuses or fails in a round: a short text in the software's own words, never a patient's value.")
    return lines


def _times(epsilon: float) -> str:
    # rounded up, as every bound; beyond a million a number says less than the formula
    if epsilon > 13:
        return f"e^{bound(epsilon)}"
    odds = math.exp(epsilon)
    return f"{math.ceil(odds * 100) / 100:.2f}" if odds < 10 else f"{math.ceil(odds):,}"
