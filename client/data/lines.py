"""A CSV file, plain or gzip-compressed, or a Parquet table, column by column; every value keeps its line."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

from wardround.client.data.rows import LARGEST_FILE, read_rows
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused

ABSENT = ("", "?", "NA", "NaN", "nan")

Cells = list[tuple[int, str]]  # line in the file, and what stands there without blanks around it


def read_columns(source: DataSource, columns: Sequence[str]) -> dict[str, Cells]:
    """The named columns of `source.path`, and the patient column where there is one.

    With `header = false` a line is exactly `columns`, in this order.

    Raises:
        DataRefused: the file cannot be read, or a column is missing or there twice, or a line has another length; the
            detail names file, line and column.
    """
    rows = _rows(source.path)
    headed = source.header or source.path.suffix.lower() == ".parquet"  # Parquet always names its columns
    names = [name.strip() for name in rows.pop(0)[1]] if headed and rows else list(columns)
    wanted = [*columns, *([source.patient_column] if source.patient_column else [])]
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
    place = {name: names.index(name) for name in wanted}
    return {name: [(line, row[position].strip()) for line, row in rows] for name, position in place.items()}


def owners(source: DataSource, columns: dict[str, Cells], absent: Collection[str] = ABSENT) -> list[str] | None:
    """The patient of each record; None where each record is a patient. `absent` is how a file writes that it has none.

    Raises:
        DataRefused: a record without a patient.
    """
    if not source.patient_column:
        return None
    # records without an owner would count as one patient, and each of their real owners would move the sum twice as far
    for line, text in columns[source.patient_column]:
        if text in absent:
            raise DataRefused("a record has no patient", detail=f"{source.path}, line {line}, column {source.patient_column}")
    return [text for _, text in columns[source.patient_column]]


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    if path.suffix.lower() != ".gz":
        return list(read_rows(path))
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST_FILE + 1)  # and no more: a small gzip file can hold terabytes
        if len(content) > LARGEST_FILE:
            raise DataRefused("the table is too large", detail=f"{path} is larger than 1 GiB")
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        return [(reader.line_num, row) for row in reader if row]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise DataRefused("the table cannot be read", detail=f"{path}: {error}") from None
