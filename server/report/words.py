"""The report's figures as text.

A bound on privacy is always rounded up: a printed epsilon is never smaller than the one that holds.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from wardround.common.metrics import METRICS
from wardround.server.report.schema import Figure, Sheet, Spread

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
