"""Figures of a report as inline SVG: no ids that clash, no fonts or links to fetch, the same bytes for the same report.

Colours are those of Okabe & Ito, which colour-blind readers can tell apart; nothing is said by colour alone. Each becomes
a CSS variable of the page, so that a dark page has light lines.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from wardround.server.report import words
from wardround.server.report.schema import Figure, Report

MOST_SITES = 12  # rows or lines that can be told apart
MOST_POINTS = 2000  # of one line; more cannot be seen on a page

COLOURS = {
    "ink": "#24292f",
    "faint": "#8c959f",
    "federated": "#0072b2",
    "local": "#d55e00",
    "pooled": "#009e73",
    "limit": "#cc79a7",
    "line-4": "#e69f00",
    "line-5": "#56b4e9",
}
_VARIABLES = {colour: f"var(--{name}, {colour})" for name, colour in COLOURS.items()}
_LINES = [COLOURS[name] for name in ("federated", "line-4", "pooled", "local", "line-5", "ink")]
_STYLES = ["-", "--", "-.", ":"]
_WHO = {"local": ("one hospital alone", "s"), "federated": ("federated", "o"), "pooled": ("pooled records", "D")}

_SETTINGS: dict[Any, Any] = {  # Any, because matplotlib lists every key in a type of its own
    "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
    "text.parse_math": False,  # a hospital may be called $x$
    "font.size": 9,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["faint"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["faint"],
    "grid.alpha": 0.25,
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "legend.frameon": False,
    "figure.facecolor": "none",
}


def headline_by_round(report: Report) -> str:
    """The headline metric of each round's model, where it ended, and the pooled model; empty where none was measured."""
    label = words.metric(report.headline).label
    rounds = _thinned([r for r in report.rounds if r.metrics.get(report.headline) is not None])
    if not rounds:
        return ""
    x = [r.round for r in rounds]
    y = [value for r in rounds if (value := r.metrics[report.headline]) is not None]
    final, pooled = report.results.federated.get(report.headline), report.results.pooled.get(report.headline)
    alt = f"{label} by round: {y[0]:.3f} after round {x[0]}, {y[-1]:.3f} after round {x[-1]}."
    with _drawing("headline", 7.2, 3.1) as (canvas, drawn):
        axes = canvas.add_subplot()
        if final is not None and final.low is not None and final.high is not None:
            axes.axhspan(
                final.low, final.high, color=COLOURS["federated"], alpha=0.15, lw=0, label="95 % interval, final model"
            )
            alt += f" Final model: 95 % interval {words.interval(final)}."
        if pooled is not None and pooled.value is not None:
            axes.axhline(pooled.value, color=COLOURS["pooled"], ls="--", lw=1.4, label=f"pooled records, {pooled.value:.3f}")
            alt += f" Pooled records: {pooled.value:.3f}."
        marker = "o" if len(x) <= 30 else ""
        axes.plot(x, y, color=COLOURS["federated"], lw=1.6, marker=marker, ms=3.5, label="federated, after each round")
        if report.validation is not None and report.validation.metric == report.headline:
            seen = {r.round: r.validation for r in _thinned([r for r in report.rounds if r.validation is not None])}
            if seen:
                axes.plot(
                    list(seen), list(seen.values()), color=COLOURS["line-4"], lw=1.2, ls="--", marker="^", ms=4,
                    label="patients set aside for validation",
                )  # fmt: skip
                alt += f" Patients set aside for validation: {report.validation.best:.3f} at best."
        lost = [r.round for r in _thinned([r for r in report.rounds if r.lost])]
        if lost:
            axes.plot(
                lost, [0.02] * len(lost), "x", color=COLOURS["local"], ms=4, label="round without enough hospitals",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
        _rounds_axis(axes, report, label)
        _legend(canvas, axes, columns=2)
        drawn["alt"] = alt
    return str(drawn["svg"])


def epsilon_by_round(report: Report) -> str:
    """What a patient of each hospital has paid after each round, under the line of the whole plan; empty without privacy."""
    sites = [site for site in report.privacy if any(site in r.epsilon for r in report.rounds)]
    if not sites:
        return ""
    x, paid = _paid(report, sites)
    planned = max(site.planned for site in report.privacy.values())
    alt = f"Epsilon spent by round: at most {words.bound(float(paid[-1].max()))} after round {x[-1]}. "
    alt += f"The whole plan: {words.bound(planned)}."
    with _drawing("epsilon", 7.2, 2.9) as (canvas, drawn):
        axes = canvas.add_subplot()
        axes.axhline(planned, color=COLOURS["limit"], ls="--", lw=1.4, label=f"the whole plan, {words.bound(planned)}")
        courses, first = np.unique(paid, axis=1, return_inverse=True)
        first = first.reshape(-1)
        if courses.shape[1] <= MOST_SITES:
            order = dict.fromkeys(int(course) for course in first)  # in the plan's order
            for number, course in enumerate(order):
                names = [site for site, own in zip(sites, first, strict=True) if own == course]
                axes.plot(
                    x, courses[:, course], drawstyle="steps-post", lw=1.6, label=_together(names),
                    color=_LINES[number % len(_LINES)], ls=_STYLES[number // len(_LINES) % len(_STYLES)],
                )  # fmt: skip
        else:
            axes.fill_between(
                x, paid.min(1), paid.max(1), color=COLOURS["federated"], alpha=0.2, lw=0, step="post",
                label=f"from least to most, {len(sites)} hospitals",
            )  # fmt: skip
            axes.plot(
                x, np.median(paid, axis=1), color=COLOURS["federated"], lw=1.6, drawstyle="steps-post", label="median hospital"
            )
        _rounds_axis(axes, report, "epsilon spent per patient")
        axes.set_ylim(0, max(planned, float(paid.max())) * 1.08 or 1)
        _legend(canvas, axes, columns=3)
        drawn["alt"] = alt
    return str(drawn["svg"])


def hospitals(report: Report) -> str:
    """Hospital by hospital: alone, federated and pooled, on everybody's and on its own test patients; empty without either."""
    results, name = report.results, report.headline
    sites = [site for site in largest(report) if name in results.local.get(site, {}) or site in results.by_site]
    if not sites:
        return ""
    label = words.metric(name).label
    used: dict[str, Any] = {}
    panels = {
        "on the test patients of all hospitals": _on_everybody if results.local else None,
        "on each hospital's own test patients": _on_their_own if results.by_site else None,
    }
    drawers = [(title, draw) for title, draw in panels.items() if draw]
    with _drawing("hospitals", 7.2, 1.5 + 0.36 * len(sites)) as (canvas, drawn):
        side_by_side = canvas.subplots(1, len(drawers), sharey=True, sharex=True, squeeze=False)[0]
        for axes, (title, draw) in zip(side_by_side, drawers, strict=True):
            draw(axes, used, report, sites)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel(label)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        side_by_side[0].set_yticks(range(len(sites)), [printable(site) for site in sites])
        side_by_side[0].set_ylim(len(sites) - 0.5, -0.5)
        shown = {who: used[who] for who in _WHO if who in used}
        if shown:
            names = [_WHO[who][0] for who in shown]
            canvas.legend(list(shown.values()), names, loc="outside lower center", ncols=3, fontsize=8)
        drawn["alt"] = (
            f"{label} of the models at {words.count(len(sites), 'hospital')}, {words.listing(title for title, _ in drawers)}, "
            "with 95 % intervals; the values stand in the tables."
        )
    return str(drawn["svg"])


def _on_everybody(axes: Axes, used: dict[str, Any], report: Report, sites: list[str]) -> None:
    results, name = report.results, report.headline
    for who, figure, style in (("federated", results.federated.get(name), "-"), ("pooled", results.pooled.get(name), "--")):
        if figure is not None and figure.value is not None:
            axes.axvline(figure.value, color=COLOURS[who], lw=1.4, ls=style)
            if who == "federated" and figure.low is not None and figure.high is not None:
                axes.axvspan(figure.low, figure.high, color=COLOURS[who], alpha=0.13, lw=0)
    for row, site in enumerate(sites):
        _bar(axes, used, "local", results.local.get(site, {}).get(name), row, words.metric(name).guess)


def _on_their_own(axes: Axes, used: dict[str, Any], report: Report, sites: list[str]) -> None:
    name = report.headline
    for row, site in enumerate(sites):
        at = report.results.by_site.get(site)
        if at is not None:
            for who, figures, y in (
                ("local", at.local, row - 0.24),
                ("federated", at.federated, row),
                ("pooled", at.pooled, row + 0.24),
            ):
                _bar(axes, used, who, figures.get(name), y, words.metric(name).guess)


def largest(report: Report) -> list[str]:
    """The hospitals drawn one by one: all of them, or the largest by declared patients, in the plan's order."""
    ranked = sorted(report.sites, key=lambda site: -report.sites[site].declared_patients)[:MOST_SITES]
    return [site for site in report.sites if site in set(ranked)]


def printable(name: str, most: int = 28) -> str:
    """A name as an axis can hold it: short, and without characters that no SVG may contain."""
    name = "".join(c if c.isprintable() else " " for c in name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _bar(axes: Axes, used: dict[str, Any], who: str, figure: Figure | None, y: float, start: float | None) -> None:
    """A value with its interval; a bar up to it from what guessing reaches.

    A bar from 0 would hide what matters, one from elsewhere would lie.
    """
    if figure is None or figure.value is None:
        return
    if start is not None:
        axes.barh(y, figure.value - start, left=start, height=0.2, color=COLOURS[who], alpha=0.28, lw=0)
    if figure.low is not None and figure.high is not None:
        axes.hlines(y, figure.low, figure.high, color=COLOURS[who], lw=1.4)  # the value may lie outside a bootstrap interval
    (used[who],) = axes.plot([figure.value], [y], _WHO[who][1], color=COLOURS[who], ms=4.5, ls="")


def _paid(report: Report, sites: list[str]) -> tuple[list[int], NDArray[np.float64]]:
    """(rounds, sites): the last epsilon known of each site after each round, from nothing in round 0."""
    kept = {r.round for r in _thinned(list(report.rounds))}
    now = dict.fromkeys(sites, 0.0)
    x, rows = [0], [list(now.values())]
    for r in report.rounds:
        now |= {site: epsilon for site, epsilon in r.epsilon.items() if site in now}
        if r.round in kept:
            x.append(r.round)
            rows.append(list(now.values()))
    return x, np.array(rows)


def _together(names: list[str]) -> str:
    short = [printable(name, 18) for name in names]
    return words.listing(short) if len(names) <= 4 else f"{short[0]} and {len(names) - 1} more"


def _thinned(rounds: list[Any]) -> list[Any]:
    if len(rounds) <= MOST_POINTS:
        return rounds
    return [rounds[i] for i in np.unique(np.linspace(0, len(rounds) - 1, MOST_POINTS).astype(int))]


def _rounds_axis(axes: Axes, report: Report, label: str) -> None:
    axes.set_xlabel(f"round (of {report.study.rounds:,} planned)")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.01)


def _legend(canvas: Canvas, axes: Axes, *, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


@contextmanager
def _drawing(name: str, width: float, height: float) -> Iterator[tuple[Canvas, dict[str, str]]]:
    drawn: dict[str, str] = {}
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter unknown to matplotlib's font is drawn by the reader's own
        canvas = Canvas(figsize=(width, height), layout="constrained")
        yield canvas, drawn
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    drawn["svg"] = _inline(file.getvalue(), name, drawn["alt"])


def _inline(svg: str, name: str, alt: str) -> str:
    """An SVG file as an element of a page: named, without namespaces, its ids its own, its colours the page's."""
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            if child.tag.rpartition("}")[2] in {"metadata", "style"}:  # a style in here would rule the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        found = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in found.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = value.replace("#", f"#{name}-", 1)
            elif key == "clip-path":
                value = value.replace("url(#", f"url(#{name}-")
            elif key == "style":
                value = re.sub("#[0-9a-f]{6}", lambda hit: _VARIABLES.get(hit[0], hit[0]), value)
            element.set(key, value)
    root.attrib = {"viewBox": root.get("viewBox", ""), "class": "plot", "role": "img", "aria-label": alt}
    return ElementTree.tostring(root, encoding="unicode")
