"""Tables: a CSV file or a Parquet table, one line a record."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wardround.client.data.lines import Cells, owners, read_columns
from wardround.client.data.loaded import Loaded
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import TableSchema, Task


def load_table(source: DataSource, task: Task) -> Loaded:
    """Read `source.path` as the task's table; also whose each record is, where a column says so.

    With `header = false` the columns stand in the schema's order. Without a `patient_column` each record is a patient.

    Raises:
        DataRefused: the file cannot be read or does not fit; the detail names file, line and column.
    """
    schema = task.schema
    if not isinstance(schema, TableSchema):
        raise DataRefused(f"task {task.name} does not read tables", detail=f"loader = 'table' for {source.path}")
    columns = read_columns(source, schema.names)
    owner = owners(source, columns, schema.absent)
    raw = {name: _numbers(source, schema, name, columns[name]) for name in schema.names}
    patient = owner or [str(number) for number in range(len(columns[schema.label]))]
    return Loaded(schema.encode(raw, patient), owner)


def _numbers(source: DataSource, schema: TableSchema, name: str, cells: Cells) -> NDArray[np.float64]:
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
