"""An explanation as one page and as numbers; the page is a file that only its owner may read.

It loads nothing and runs nothing: its style and its pictures are in it, and every text in it is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wardround.client.interpret.attributions import TOLERANCE, Attribution
from wardround.client.interpret.views import View
from wardround.common.files import write_atomically
from wardround.common.pages import filled

_METHODS = {"integrated": "integrated gradients", "saliency": "saliency", "grad_cam": "Grad-CAM"}
_DIGITS = 6  # significant ones, of what is printed as JSON


@dataclass(frozen=True)
class Shown:
    """One record on the page.

    Attributes:
        number: its place in the hospital's own files, from 1.
        patient: the id in the file; empty where each record is a patient.
        why: why it was chosen.
        answer, truth: classes; empty where the label is no class.
        certainty: probability of the answer; None where the label is no class.
        loss: the task's own.
    """

    number: int
    patient: str
    why: str
    answer: str
    truth: str
    certainty: float | None
    loss: float
    attribution: Attribution
    views: list[View]


@dataclass(frozen=True)
class Explained:
    """Everything the page says.

    Attributes:
        digest: SHA-256 of the plan.
        model: SHA-256 of the weights.
        meaning: of the number that is explained.
        held_out: how many records there were to choose from.
        likeness: see `likeness.likeness`.
    """

    study: str
    title: str
    digest: str
    task: str
    site: str
    model: str
    meaning: str
    held_out: int
    likeness: dict[str, float]
    shown: list[Shown]


def page_of(explained: Explained) -> str:
    """One page that needs no other file."""
    kinds = {view.kind for shown in explained.shown for view in shown.views}
    return filled(
        Path(__file__).with_name("interpret.html.jinja"),
        explained=explained,
        kinds=kinds,
        integrated=bool(kinds - {"picture"}),
        tolerance=TOLERANCE,
        methods=_METHODS,
        curve=_points,
    )


def table_of(explained: Explained) -> dict[str, Any]:
    """The numbers of the page, as plain lists and tables."""
    return {
        "study": explained.study,
        "digest": explained.digest,
        "task": explained.task,
        "site": explained.site,
        "model": explained.model,
        "explained": explained.meaning,
        "likeness_to_unlearnt": _rounded(explained.likeness),
        "records": [_record(shown) for shown in explained.shown],
    }


def write_private(path: Path, page: str) -> Path:
    """Write `page` to `path`, whole or not at all, for the eyes of this user alone.

    Raises:
        OSError: the folder cannot be written; an earlier page is intact.
    """
    with _for_this_user():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page.encode())
    return path


@contextmanager
def _for_this_user() -> Iterator[None]:
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _record(shown: Shown) -> dict[str, Any]:
    found = shown.attribution
    return {
        "record": shown.number,
        "patient": shown.patient or None,
        "why": shown.why,
        "answer": shown.answer or None,
        "truth": shown.truth or None,
        "certainty": _rounded(shown.certainty),
        "loss": _rounded(shown.loss),
        "score": _rounded(found.score),
        "reference": _rounded(found.reference),
        "delta": _rounded(found.delta),
        "adds_up": found.adds_up,
        "fields": {view.name: _field(view) for view in shown.views},
    }


def _field(view: View) -> dict[str, Any]:
    if view.kind == "picture":
        return {"kind": "picture", "maps": {p.title: _rounded(p.numbers) for p in view.pictures if p.numbers}}
    parts = [
        {"name": part.name, "found": part.found, "attribution": _rounded(part.weight)}
        | ({"cells": _rounded(part.cells)} if part.cells else {})
        for part in view.parts
    ]
    return {"kind": view.kind, "parts": parts} | ({"columns": view.columns} if view.columns else {})


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return {key: _rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


def _points(values: list[float]) -> str:
    """A curve over moments 0, 1, ... as the points of an SVG line, 100 high."""
    low, high = min(values), max(values)
    return " ".join(f"{at + 0.5:g},{95 - 90 * (value - low) / ((high - low) or 1):.2f}" for at, value in enumerate(values))
