"""The report's figures and sentences as text. Every sentence holds for the report it was made from, whatever its case.

A bound on privacy is always rounded up: a printed epsilon is never smaller than the one that holds.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from wardround.common.metrics import METRICS
from wardround.server.report.schema import Figure, Figures, Report, Sheet, Spread

MOST_NAMES = 12  # beyond, a list of hospitals says less than their number


@dataclass(frozen=True)
class Metric:
    """How a metric is written, and which direction is good."""

    label: str
    meaning: str
    better: Callable[[float, float], bool] | None = None  # None: unknown, so nothing is called better
    guess: float | None = None  # what guessing reaches, where that is known


def metric(name: str) -> Metric:
    """How `name` is written; an unknown metric is written as it is."""
    known = METRICS.get(name)
    if known is None:
        return Metric(name.replace("_", " "), "a metric of this study's task")
    return Metric(known.label, known.meaning, operator.gt if known.better == "higher" else operator.lt, known.guess)


def bound(epsilon: float) -> str:
    """An epsilon with two decimals, rounded up.

    >>> bound(2.9912), bound(3.0), bound(0.0)
    ('3.00', '3.00', '0.00')
    """
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"


def small(number: float) -> str:
    """A small probability without padding zeros.

    >>> small(1e-5), small(0.001)
    ('1e-5', '0.001')
    """
    return f"{number:g}".replace("e-0", "e-")


def chance(probability: float) -> str:
    """A small probability as one in so many, never smaller than it is.

    >>> chance(1e-5), chance(3e-4), chance(0.0)
    ('1 in 100,000', '1 in 3,333', '0')
    """
    return f"1 in {math.floor(1 / probability + 1e-6):,}" if probability else "0"


def duration(seconds: float) -> str:
    """Seconds in the unit a reader would choose.

    >>> duration(0.0213), duration(95), duration(7300)
    ('21 ms', '1 min 35 s', '2 h 1 min')
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def number(value: float | None) -> str:
    """A figure with three decimals, or words where it is not defined.

    >>> number(0.90449), number(None)
    ('0.904', 'not defined')
    """
    return "not defined" if value is None else f"{value:.3f}"


def interval(figure: Figure) -> str:
    """The interval in words; empty where there is none."""
    if figure.low is None or figure.high is None:
        return ""
    return f"{figure.low:.3f} to {figure.high:.3f}"


def spread(of: Spread) -> str:
    """Mean and standard deviation."""
    return number(of.mean) if of.sd is None else f"{number(of.mean)} ± {of.sd:.3f}"


def listing(names: Iterable[str]) -> str:
    """Names as a sentence holds them.

    >>> listing(["cleveland", "hungarian", "va"])
    'cleveland, hungarian and va'
    """
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def count(how_many: int, thing: str) -> str:
    """A number with its noun.

    >>> count(1, "hospital"), count(1200, "hospital")
    ('1 hospital', '1,200 hospitals')
    """
    return f"{how_many:,} {thing}{'' if how_many == 1 else 's'}"


def made(sheet: Sheet) -> str:
    """What the pictures of a sheet are meant to show, row by row."""
    return listing(f"{name} in row {row}" for row, name in enumerate(dict.fromkeys(sheet.names), start=1))


def summary(report: Report) -> list[str]:
    """The study in a few paragraphs, for a reader who reads nothing else."""
    paragraphs = (
        _who(report),
        _ending(report),
        validation(report),
        _quality(report),
        _at_home(report),
        _repeats(report),
        *price(report),
    )
    return [text for text in paragraphs if text]


def took_part(report: Report) -> list[str]:
    """The hospitals of which at least one update counted, in the plan's order."""
    counted = {site for round in report.rounds for site in round.sites}
    return [site for site in report.sites if site in counted]


def _who(report: Report) -> str:
    sites, active = list(report.sites), took_part(report)
    if not sites:
        return "The plan names no hospital that this report knows of."
    named = f": {listing(sites)}" if len(sites) <= MOST_NAMES else ""
    patients = sum(site.declared_patients for site in report.sites.values())
    text = f"The plan names {count(len(sites), 'hospital')}{named}. "
    text += f"Together they declared {count(patients, 'training patient')}, in rounded numbers. "
    if len(active) == len(sites):
        return text + "Each of them contributed to the model."
    if not active:
        return text + "None of them contributed to the model."
    absent = [site for site in sites if site not in set(active)]
    who = f": {listing(absent)}" if len(absent) <= MOST_NAMES else ""
    return text + f"{len(active):,} contributed to the model; {len(absent):,} never did{who}."


def _ending(report: Report) -> str:
    done, planned = report.outcome.rounds_done, report.study.rounds
    if report.outcome.status == "stopped":
        text = f"The study was stopped after {done:,} of {count(planned, 'planned round')}. "
        text += f"The reason: {report.outcome.reason.rstrip('.')}."
    elif report.outcome.status == "completed early":
        text = f"The study ended early, as its plan provides, after {done:,} of {count(planned, 'planned round')}: "
        text += f"{report.outcome.reason}."
    else:
        text = f"The study completed its {count(planned, 'planned round')}."
    lost = sum(round.lost for round in report.rounds)
    missed = sum(bool(round.dropped) and not round.lost for round in report.rounds)
    if lost:
        text += f" {count(lost, 'round')} had too few hospitals and changed nothing."
    if missed:
        text += f" In {count(missed, 'other round' if lost else 'round')} a hospital's update was missing or not accepted."
    return text


def validation(report: Report) -> str:
    """What the patients set aside decided; empty where the plan sets none aside."""
    of = report.validation
    if of is None:
        return ""
    aside = f"About {of.share:.0%} of each hospital's training patients were set aside for validation and never trained on. "
    if of.best_round is None:
        return aside + "No look at them came about, so the released model is that of the last round."
    label = metric(of.metric).label
    text = f"{aside}Over {count(of.looks, 'look')} at them, the best {label} was {number(of.best)}, after round "
    text += f"{of.best_round:,}. "
    if of.keep == "last":
        return text + "The released model is that of the last round."
    return text + "The released model is the one that did best there; as it was chosen by that figure, the figure flatters it."


def _quality(report: Report) -> str:
    known = metric(report.headline)
    figure = report.results.federated.get(report.headline)
    if figure is None:
        return "This report holds no figures on how good the model is: nobody tested it where the report was written."
    tested = sum(site.test_patients for site in report.results.by_site.values())
    patients = f"the {count(tested, 'test patient')} of all hospitals" if tested else "the test patients of all hospitals"
    text = f"On {patients}, whom the model was not trained on, the federated model reaches "
    text += f"{_valued(known.label, figure)}; {known.label} is {known.meaning}."
    text += _against_local(report, known, figure)
    pooled = report.results.pooled.get(report.headline)
    if pooled is not None:
        text += f" A model trained on all records in one place reaches {_valued('', pooled)} on the same patients."
    if not report.results.local and not report.results.pooled:
        text += " It was not compared with hospitals training alone or with pooled records, because that was skipped."
    return text


def _against_local(report: Report, known: Metric, federated: Figure) -> str:
    alone = _values(report.results.local, report.headline)
    if not alone:
        return ""
    lowest, highest = min(alone, key=alone.__getitem__), max(alone, key=alone.__getitem__)
    if len(alone) == 1:
        text = f" The model that {lowest} trained alone reaches {number(alone[lowest])} on the same patients."
    else:
        text = f" Hospitals that trained alone reach {number(alone[lowest])} ({lowest}) to {number(alone[highest])} "
        text += f"({highest}) on the same patients."
    if known.better is None or federated.value is None:
        return text
    beaten = sum(known.better(federated.value, value) for value in alone.values())
    if beaten == len(alone):
        return text + " The federated value is better than each of these."
    return text + f" The federated value is better than {beaten:,} of these {len(alone):,}."


def _at_home(report: Report) -> str:
    known = metric(report.headline)
    pairs = {}
    for site, at in report.results.by_site.items():
        federated, local = at.federated.get(report.headline), at.local.get(report.headline)
        if federated and local and federated.value is not None and local.value is not None:
            pairs[site] = federated.value, local.value
    if not pairs or known.better is None:
        return ""
    better = [site for site, (federated, local) in pairs.items() if known.better(federated, local)]
    worse = [site for site, (federated, local) in pairs.items() if known.better(local, federated)]
    text = f"Judged on each hospital's own test patients, the federated {known.label} is better than that of the "
    where = " where both are defined" if len(pairs) < len(report.results.by_site) else ""
    text += f"hospital's own model at {len(better):,} of {count(len(pairs), 'hospital')}{where}"
    if not worse:
        return f"{text} and worse at none."
    shown = [f"{site} ({number(pairs[site][0])} against {number(pairs[site][1])})" for site in worse]
    where = f": {listing(shown)}" if len(worse) <= MOST_NAMES else ""
    return f"{text} and worse at {len(worse):,}{where}."


def _repeats(report: Report) -> str:
    seeds = report.seeds
    if seeds is None:
        return ""
    text = f"The study was repeated with {count(len(seeds.values), 'seed')}."
    of = seeds.federated.get(report.headline)
    if of is not None and of.mean is not None:
        text += f" Over these, the federated {metric(report.headline).label} has a mean of {number(of.mean)}"
        text += "" if of.sd is None else f" and a standard deviation of {of.sd:.3f}"
        text += "."
    if report.private:
        text += " The privacy cost below is that of the one run described here; on the same patients, every repetition "
        text += "whose model or figures are handed out costs as much again."
    return text


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
    if of is not None:
        lines.append(
            f"After some rounds, as the plan says: sums over the patients set aside for validation (about {of.share:.0%}), "
            "exact and without noise: how many are of each class, how many are called so, how often each range of predicted "
            "probabilities came up, and total losses. A hospital with few such patients sends none."
        )
    settled = "; the newest hash of its ledger; the number of noised steps spent" if report.private else ""
    lines.append(f"When the study is over: its name and the study{settled}.")
    lines.append("Where it refuses or fails in a round: a short text in the software's own words, never a patient's value.")
    return lines


def _values(figures: Mapping[str, Figures], name: str) -> dict[str, float]:
    found = {site: of[name].value for site, of in figures.items() if name in of}
    return {site: value for site, value in found.items() if value is not None}


def _valued(label: str, figure: Figure) -> str:
    between = interval(figure)
    value = "a value that is not defined" if figure.value is None else number(figure.value)
    label = "an " + label if label[:1] in set("Aa") else "a " + label if label else ""
    text = f"{label} of {value}" if label else value
    return f"{text} (95 % interval {between})" if between else text


def _times(epsilon: float) -> str:
    # rounded up, as every bound; beyond a million a number says less than the formula
    if epsilon > 13:
        return f"e^{bound(epsilon)}"
    odds = math.exp(epsilon)
    return f"{math.ceil(odds * 100) / 100:.2f}" if odds < 10 else f"{math.ceil(odds):,}"
