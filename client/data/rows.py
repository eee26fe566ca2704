"""Lines of a CSV file or rows of a Parquet table, one after the other."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from wardround.client.data.parquet import parquet_rows
from wardround.common.errors import DataRefused

LARGEST_FILE = 1 << 30  # bytes


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each line that is not empty. A Parquet table starts with the names of its columns.

    Raises:
        DataRefused: the file cannot be read, or is too large; the detail names it.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise DataRefused("the table is too large", detail=f"{path} is larger than 1 GiB")
        if path.suffix.lower() == ".parquet":
            yield from parquet_rows(path)
            return
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataRefused("the table cannot be read", detail=f"{path}: {error}") from None
