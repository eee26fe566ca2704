"""Series: one table of all stays, or a file a stay in a folder or a zip archive, and a table of labels.

A table is long (time, parameter, value) or wide (time and a column a variable); one of all stays also has `file_column`, the
stay's id. Time is hours, H:MM or H:MM:SS. Parameters and stays that the task or the labels do not know are left alone.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from array import array
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from wardround.client.data.loaded import Loaded
from wardround.client.data.rows import read_rows
from wardround.client.data.stay_files import stay_files
from wardround.client.data.stays import Stay, finite, read_stays
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import Task
from wardround.common.tasks.series import Events, SeriesSchema

log = logging.getLogger("wardround.site")

Measurements = list[tuple[float, int, float]]  # hour, position of the name, value
Reader = Callable[[list[str]], Measurements]
Found = tuple[dict[str, Measurements], list[str]]  # by stay; what was passed over, in words for the site

_CLOCK = re.compile(r"(\d{1,6}):([0-5]\d)(?::([0-5]\d))?", re.ASCII)


def load_series(source: DataSource, task: Task) -> Loaded:
    """Read the stays that `source.labels` lists; also whose each is, where a column of the labels says so.

    A stay that is damaged or missing is passed over, as often as `source.unreadable` says.

    Raises:
        DataRefused: the files cannot be read or do not fit; the detail names file and line.
    """
    schema = task.schema
    if not isinstance(schema, SeriesSchema):
        raise DataRefused(f"task {task.name} does not read series", detail=f"loader = 'series' for {source.path}")
    stays = read_stays(source, schema)
    apart = source.path.is_dir() or source.path.suffix.lower() == ".zip"
    found, passed = (_one_by_one if apart else _together)(stays, source, schema)
    _count(passed, source.unreadable)
    kept = {name: stay for name, stay in stays.items() if name in found}
    if not kept:
        raise DataRefused("there are no stays", detail=str(source.path))
    given = next(iter(kept.values())).static
    static = {name: np.array([stay.static[name] for stay in kept.values()]) for name in given}
    owner = [stay.patient for stay in kept.values() if stay.patient is not None]
    label = [stay.label for stay in kept.values()]
    records = schema.encode(_events([found[name] for name in kept]), static, label, owner or list(kept))
    return Loaded(records, owner or None)


def hours(text: str) -> float:
    """Hours of "07:30", "7:30:00" or "7.5".

    >>> hours("47:30"), hours("-0.5")
    (47.5, -0.5)

    Raises:
        ValueError: it is none of them.
    """
    if clock := _CLOCK.fullmatch(text):
        return int(clock[1]) + int(clock[2]) / 60 + int(clock[3] or 0) / 3600
    value = finite(text)
    if math.isnan(value):
        raise ValueError("there is no time")
    return value


_hours = lru_cache(maxsize=1 << 16)(hours)


def reader_of(header: list[str], schema: SeriesSchema) -> Reader:
    """What turns a row under `header` into measurements; it raises `ValueError` for a row that it cannot read.

    Raises:
        ValueError: `header` is none of a series.
    """
    names = [name.strip() for name in header]
    lower = [name.lower() for name in names]
    known = schema.names
    if lower.count("time") != 1:
        raise ValueError(f"wanted one column time; there are {names}")
    time = lower.index("time")
    if lower.count("parameter") == lower.count("value") == 1:
        parameter, value = lower.index("parameter"), lower.index("value")

        def read(row: list[str]) -> Measurements:
            what = known.get(row[parameter].strip())
            if what is None:
                return []
            found = finite(row[value])
            return [] if math.isnan(found) else [(_hours(row[time].strip()), what, found)]
    else:
        columns = [(at, known[name]) for at, name in enumerate(names) if name in known]
        if not columns or len({names[at] for at, _ in columns}) < len(columns):
            raise ValueError(f"wanted columns parameter and value, or one for each of the task's variables; there are {names}")

        def read(row: list[str]) -> Measurements:
            hour = _hours(row[time].strip())
            found = [(hour, what, finite(row[at])) for at, what in columns]
            return [event for event in found if not math.isnan(event[2])]

    def checked(row: list[str]) -> Measurements:
        if len(row) != len(names):
            raise ValueError(f"{len(row)} values for {len(names)} columns")
        return read(row)

    return checked


def read_stay(content: bytes, schema: SeriesSchema) -> Measurements:
    """What one stay's own file says; raises `ValueError` (or csv's own error) if it cannot be understood."""
    rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    read = reader_of(next(rows, []), schema)
    found: Measurements = []
    for row in rows:
        if row:
            try:
                found += read(row)
            except ValueError as error:
                raise ValueError(f"line {rows.line_num}: {error}") from None
    return found


def _one_by_one(stays: dict[str, Stay], source: DataSource, schema: SeriesSchema) -> Found:
    found: dict[str, Measurements] = {}
    passed: list[str] = []
    with stay_files(source.path) as files:
        for name, stay in stays.items():
            if name not in files:
                passed.append(f"{stay.where}: {source.path} has no file of stay {name}")
                continue
            try:
                found[name] = read_stay(files[name](), schema)
            except Exception as error:  # damage ends in zlib's, zipfile's, csv's and other exceptions
                passed.append(f"{source.path}, stay {name}: {error}")
    return found, passed


def _together(stays: dict[str, Stay], source: DataSource, schema: SeriesSchema) -> Found:
    rows = read_rows(source.path)
    header = [name.strip() for name in next(rows, (0, []))[1]]
    try:
        read = reader_of(header, schema)
    except ValueError as error:
        raise DataRefused("the series cannot be read", detail=f"{source.path}: {error}") from None
    if header.count(source.file_column) != 1:
        raise DataRefused(
            "the series lack a column", detail=f"{source.path} must have one column {source.file_column}; it has {header}"
        )
    stay_at = header.index(source.file_column)
    found: dict[str, Measurements] = {}
    damaged: dict[str, str] = {}
    for line, row in rows:
        if len(row) != len(header):  # nobody can tell whose line it was
            raise DataRefused("a line of the series has the wrong length", detail=f"{source.path}, line {line}")
        stay = row[stay_at].strip()
        if stay in stays and stay not in damaged:
            try:
                found.setdefault(stay, []).extend(read(row))
            except ValueError as error:
                damaged[stay] = f"{source.path}, line {line}: {error}"
    missing = [
        f"{stay.where}: {source.path} has no stay {name}" for name, stay in stays.items() if name not in found.keys() | damaged
    ]
    return {name: events for name, events in found.items() if name not in damaged}, [*damaged.values(), *missing]


def _count(passed: list[str], allowed: int) -> None:
    if len(passed) > allowed:
        text = "more stays cannot be read than the site file allows" if allowed else "a stay cannot be read"
        raise DataRefused(text, detail="; ".join(passed[:10]))
    if passed:
        log.warning("%d stays passed over: %s", len(passed), "; ".join(passed[:10]))


def _events(stays: list[Measurements]) -> Events:
    hour, what, value = array("d"), array("q"), array("d")
    for events in stays:
        for h, w, v in events:
            hour.append(h)
            what.append(w)
            value.append(v)
    record = np.repeat(np.arange(len(stays)), [len(events) for events in stays])
    return Events(record, np.array(hour), np.array(what, dtype=np.int64), np.array(value))
