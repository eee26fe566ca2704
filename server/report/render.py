"""A report into a folder: report.json and report.html, each whole or not at all.

The page loads nothing and runs nothing: its style and its figures are in it, and every text in it is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from markupsafe import Markup

from wardround.common.files import write_atomically
from wardround.common.pages import filled
from wardround.server.report import promises, story, words
from wardround.server.report.pictures import drawn
from wardround.server.report.schema import Figures, Report

_MOST_ROUNDS = 1000  # rows of the table of rounds; report.json holds all of them
_FOLDED = 15  # rows beyond which a table waits behind a click

_T = TypeVar("_T")


def write_report(folder: Path, report: Report) -> None:
    """Write `report` into `folder` as report.json and report.html.

    Both are made before either is written, and each replaces its predecessor in one move.

    Raises:
        OSError: the folder cannot be written; earlier files are intact.
    """
    data, page = to_json(report).encode(), to_html(report).encode()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", data)
    write_atomically(folder / "report.html", page)


def to_json(report: Report) -> str:
    """The report as documented in docs/report.md."""
    return json.dumps(report.model_dump(mode="json", by_alias=True), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def to_html(report: Report) -> str:
    """The report as one page that needs no other file."""
    from wardround.server.report import plots  # matplotlib takes longer to import than a short study to train

    return filled(
        Path(__file__).with_name("report.html.jinja"),
        report=report,
        words=words,
        promises=promises,
        paragraphs=story.summary(report),
        active=story.took_part(report),
        metrics=_metrics(report),
        rounds=_ends(report.rounds, _MOST_ROUNDS),
        folded=_FOLDED,
        drawn_sites=plots.largest(report),
        # our own SVG, whose texts ElementTree has escaped
        plots={
            "headline": Markup(plots.headline_by_round(report)),
            "epsilon": Markup(plots.epsilon_by_round(report)),
            "hospitals": Markup(plots.hospitals(report)),
            "sheet": drawn(report.sheet) if report.sheet else "",
        },
    )


def _metrics(report: Report) -> list[str]:
    """The metrics of all tables, the headline first."""
    results = report.results
    tables: list[Figures] = [results.federated, results.pooled, *results.local.values()]
    tables += [figures for at in results.by_site.values() for figures in (at.federated, at.local, at.pooled)]
    found = dict.fromkeys(name for figures in tables for name in figures)
    return sorted(found, key=lambda name: name != report.headline)


def _ends(rows: Sequence[_T], most: int) -> list[_T]:
    """All rows, or the first and last of too many."""
    return list(rows) if len(rows) <= most else [*rows[: most // 2], *rows[-(most // 2) :]]
