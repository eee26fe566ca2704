"""The study in a few paragraphs. Every sentence holds for the report it was made from, whatever its case."""

from __future__ import annotations

from collections.abc import Mapping

from wardround.server.report.promises import price
from wardround.server.report.schema import Figure, Figures, Report
from wardround.server.report.words import MOST_NAMES, Metric, count, interval, listing, metric, number


def summary(report: Report) -> list[str]:
    """The study in a few paragraphs, for a reader who reads nothing else."""
    paragraphs = (
        _who(report),
        _ending(report),
        class_counts(report),
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
    if of.deviation is not None:
        text += f"Each of these figures carries noise with a standard deviation of about {of.deviation:.2g}, by the declared "
        text += "numbers of patients; looks that lie closer together cannot be told apart. "
    if of.keep == "last":
        return text + "The released model is that of the last round."
    return text + "The released model is the one that did best there; as it was chosen by that figure, the figure flatters it."


def class_counts(report: Report) -> str:
    """What hospitals answered about their classes; empty where nobody asked."""
    of = report.class_counts
    if of is None:
        return ""
    found = listing(f"{number:,.0f}" for number in of.counts)
    text = f"Before the first round {count(len(of.sites), 'hospital')} answered how the training patients fall into classes: "
    text += f"{found}"
    text += f", each with noise of standard deviation {of.deviation:.3g}." if of.deviation else ", exact and without noise."
    if of.weights is not None:
        text += f" By these, an error counts {listing(f'{weight:.2g}' for weight in of.weights)} times, class by class."
    return text


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


def _values(figures: Mapping[str, Figures], name: str) -> dict[str, float]:
    found = {site: of[name].value for site, of in figures.items() if name in of}
    return {site: value for site, value in found.items() if value is not None}


def _valued(label: str, figure: Figure) -> str:
    between = interval(figure)
    value = "a value that is not defined" if figure.value is None else number(figure.value)
    label = "an " + label if label[:1] in set("Aa") else "a " + label if label else ""
    text = f"{label} of {value}" if label else value
    return f"{text} (95 % interval {between})" if between else text
