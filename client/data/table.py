"""Tables: a CSV file, one line a record."""

from __future__ import annotations

import csv

import numpy as np
from numpy.typing import NDArray

from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import Records, TableSchema, Task

LARGEST_FILE = 1 << 30  # bytes


def load_table(source: DataSource, task: Task) -> tuple[Records, list[str] | None]:
    """Read `source.path` as the task's table; also whose each record is, where a column says so.

    With `header = false` the columns stand in the schema's order. Without a `patient_column` each record is a patient.

    Raises:
        DataRefused: the file cannot be read or does not fit; the detail names file, line and column.
    """
    schema = task.schema
    if not isinstance(schema, TableSchema):
        raise DataRefused(f"task {task.name} does not read tables", detail=f"loader = 'table' for {source.path}")
    try:
        if source.path.stat().st_size > LARGEST_FILE:
            raise DataRefused("the table is too large", detail=f"{source.path} is larger than 1 GiB")
        with source.path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataRefused("the table cannot be read", detail=f"{source.path}: {error}") from None
    names = [name.strip() for name in rows.pop(0)[1]] if source.header and rows else schema.names
    wanted = [*schema.names, *([source.patient_column] if source.patient_column else [])]
    if missing := [name for name in wanted if name not in names]:
        raise DataRefused("the table lacks a column of the task", detail=f"{source.path} has no column {missing[0]}")
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise DataRefused("the table holds a column twice", detail=f"{source.path} has two columns {twice[0]}")
    if not rows:
        raise DataRefused("the table holds no records", detail=f"{source.path} is empty")
    for line, row in rows:
        if len(row) != len(names):
            raise DataRefused(
                "a line of the table has the wrong length",
                detail=f"{source.path}, line {line}: {len(row)} values for {len(names)} columns",
            )

    def column(name: str) -> list[tuple[int, str]]:
        position = names.index(name)
        return [(line, row[position].strip()) for line, row in rows]

    raw = {name: _numbers(source, schema, name, column(name)) for name in schema.names}
    if not source.patient_column:
        return schema.encode(raw, [str(number) for number in range(len(rows))]), None
    owner = _patients(source, schema, column(source.patient_column))
    return schema.encode(raw, owner), owner


def _numbers(source: DataSource, schema: TableSchema, name: str, cells: list[tuple[int, str]]) -> NDArray[np.float64]:
    values = np.full(len(cells), np.nan)
    for position, (line, text) in enumerate(cells):
        if text in schema.absent:
            continue
        detail = f"{source.path}, line {line}, column {name}"
        try:
            values[position] = float(text)
        except ValueError:
            raise DataRefused(f"column {name} holds something that is no number", detail=detail) from None
        if not np.isfinite(values[position]):
            raise DataRefused(f"column {name} holds an infinite number", detail=detail)
    return values


def _patients(source: DataSource, schema: TableSchema, cells: list[tuple[int, str]]) -> list[str]:
    # records without an owner would count as one patient, and each of their real owners would move the sum twice as far
    for line, text in cells:
        if text in schema.absent:
            raise DataRefused("a record has no patient", detail=f"{source.path}, line {line}, column {source.patient_column}")
    return [text for _, text in cells]
