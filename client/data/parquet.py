"""Parquet tables, read as the texts that a CSV file would hold. The library that reads them is an extra of its own."""

from __future__ import annotations

import datetime
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wardround.common.errors import DataRefused


def parquet_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The names of the columns, then each row, with the number it would have as a line of a CSV file.

    Nothing stands for an absent value, 1 and 0 for yes and no, hours for a duration.

    Raises:
        DataRefused: the file cannot be read, or the library is not installed.
    """
    try:
        reader = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataRefused(
            "reading Parquet needs pyarrow: pip install wardround[parquet]", detail=f"{path} is a Parquet file"
        ) from None
    try:
        with reader.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            yield 1, names
            line = 1
            for batch in file.iter_batches():
                columns = [column.to_pylist() for column in batch.columns]
                for row in zip(*columns, strict=True):
                    line += 1
                    yield line, [_text(value) for value in row]
    except Exception as error:  # damage ends in Arrow's own exceptions, of many kinds
        raise DataRefused("the table cannot be read", detail=f"{path}: {error}") from None


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, datetime.timedelta):
        return repr(value.total_seconds() / 3600)
    return str(value)
