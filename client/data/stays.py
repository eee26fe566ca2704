"""The labels of series: one line a stay, with its outcome, whose it is, and what of it does not change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from wardround.client.data.rows import read_rows
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks.series import SeriesSchema

ABSENT = ("", "?", "NA", "NaN", "nan")


@dataclass(frozen=True)
class Stay:
    """One record, as the labels tell of it.

    Attributes:
        where: the place in the labels, for a refusal's detail.
        label: the class.
        patient: the patient's id, where a column says so.
        static: columns of the schema that the labels have; NaN for absent.
    """

    where: str
    label: int
    patient: str | None
    static: Mapping[str, float]


def read_stays(source: DataSource, schema: SeriesSchema) -> dict[str, Stay]:
    """What `source.labels` says of each stay, in its order. `file_column` is the stay's id.

    Raises:
        DataRefused: there are no labels, they cannot be read, or they contradict themselves.
    """
    if source.labels is None:
        raise DataRefused("the series have no labels", detail=f"{source.path}: set `labels` to a CSV file")
    rows = read_rows(source.labels)
    names = [name.strip() for name in next(rows, (0, []))[1]]
    owner = [source.patient_column] if source.patient_column else []
    wanted = [source.file_column, source.label_column, *owner]
    static = [column.column for column in schema.static if column.column in names]
    if missing := [name for name in (*wanted, *static) if names.count(name) != 1]:
        raise DataRefused(
            "the labels lack a column", detail=f"{source.labels} must have one column {missing[0]}; it has {names}"
        )
    place = {name: names.index(name) for name in (*wanted, *static)}
    stays: dict[str, Stay] = {}
    for line, row in rows:
        where = f"{source.labels}, line {line}"
        if len(row) != len(names):
            raise DataRefused("a line of the labels has the wrong length", detail=where)
        cell = {name: row[at].strip() for name, at in place.items()}
        stay = cell[source.file_column]
        if stay in ABSENT:
            raise DataRefused("a line of the labels names no stay", detail=where)
        if stay in stays:
            raise DataRefused("the labels list a stay twice", detail=f"{stays[stay].where}; {where}")
        patient = cell[source.patient_column] if source.patient_column else None
        if patient in ABSENT:  # records without an owner would count as one patient
            raise DataRefused("a record has no patient", detail=f"{where}, column {source.patient_column}")
        numbers = {name: _number(cell[name], f"{where}, column {name}") for name in static}
        stays[stay] = Stay(where, _class(cell[source.label_column], where), patient, numbers)
    if not stays:
        raise DataRefused("the labels list no stays", detail=str(source.labels))
    return stays


def finite(text: str) -> float:
    """The number, NaN for absent.

    Raises:
        ValueError: it is no finite number.
    """
    text = text.strip()
    if text in ABSENT:
        return math.nan
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no number")
    return value


def _number(text: str, where: str) -> float:
    try:
        return finite(text)
    except ValueError as error:
        raise DataRefused("a value is no number", detail=f"{where}: {error}") from None


def _class(text: str, where: str) -> int:
    # beyond the task's classes is the schema's to refuse
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise DataRefused("a label is no class", detail=f"{where}: {text!r}; wanted 0, 1, ...")
    return int(text)
