"""Texts: a CSV file, plain or gzip-compressed, one text (in one column or several) and its label a line."""

from __future__ import annotations

from wardround.client.data.lines import owners, read_columns
from wardround.client.data.loaded import Loaded
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import Task
from wardround.common.tasks.text import TextSchema


def load_text(source: DataSource, task: Task) -> Loaded:
    """Read `source.path` as the task's texts; also whose each is, where a column says so.

    With `header = false` the columns stand in the schema's order. Without a `patient_column` each record is a patient.

    Raises:
        DataRefused: the file cannot be read or does not fit; the detail names the file.
    """
    schema = task.schema
    if not isinstance(schema, TextSchema):
        raise DataRefused(f"task {task.name} does not read texts", detail=f"loader = 'text' for {source.path}")
    columns = read_columns(source, schema.columns)
    owner = owners(source, columns)
    parts = zip(*([text for _, text in columns[name]] for name in schema.texts), strict=True)
    label = [text for _, text in columns[schema.label]]
    patient = owner or [str(number) for number in range(len(label))]
    return Loaded(schema.encode(["\n".join(part) for part in parts], label, patient), owner)
