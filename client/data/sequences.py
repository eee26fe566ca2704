"""Sequences: a CSV file, plain or gzip-compressed, one sequence of letters and its label a line."""

from __future__ import annotations

from wardround.client.data.lines import owners, read_columns
from wardround.client.data.loaded import Loaded
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import Task
from wardround.common.tasks.sequences import SequenceSchema


def load_sequences(source: DataSource, task: Task) -> Loaded:
    """Read `source.path` as the task's sequences; also whose each is, where a column says so.

    With `header = false` a line is sequence, label. Without a `patient_column` each record is a patient.

    Raises:
        DataRefused: the file cannot be read or does not fit; the detail names the file.
    """
    schema = task.schema
    if not isinstance(schema, SequenceSchema):
        raise DataRefused(f"task {task.name} does not read sequences", detail=f"loader = 'sequences' for {source.path}")
    columns = read_columns(source, schema.columns)
    owner = owners(source, columns)
    sequences, label = ([text for _, text in columns[name]] for name in schema.columns)
    patient = owner or [str(number) for number in range(len(sequences))]
    return Loaded(schema.encode(sequences, label, patient), owner)
