"""Ready arrays: a NumPy .npz file with one array per field, `label`, and optionally the patient column."""

from __future__ import annotations

import numpy as np

from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import ArraySchema, Records, Task


def load_arrays(source: DataSource, task: Task) -> tuple[Records, list[str] | None]:
    """Read `source.path` as the task's arrays, and whose each is; nothing in it is unpickled.

    Raises:
        DataRefused: the file cannot be read or does not fit; the detail names the file.
    """
    schema = task.schema
    if not isinstance(schema, ArraySchema):
        raise DataRefused(f"task {task.name} does not read arrays", detail=f"loader = 'arrays' for {source.path}")
    wanted = [*schema.shapes, "label", *([source.patient_column] if source.patient_column else [])]
    try:
        with source.path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found = {name: archive[name] for name in wanted}
    except Exception as error:  # a damaged archive ends in half a dozen kinds of exceptions: zlib's, struct's, zipfile's ...
        raise DataRefused("the arrays cannot be read", detail=f"{source.path}: {error}") from None
    if odd := [name for name, array in found.items() if not isinstance(array, np.ndarray) or not array.ndim]:
        raise DataRefused("the arrays cannot be read", detail=f"{source.path}: {odd[0]} is not an array")
    if not len(found["label"]):
        raise DataRefused("the file holds no records", detail=str(source.path))
    if not source.patient_column:
        return schema.encode(found, found["label"], [str(number) for number in range(len(found["label"]))]), None
    patient = [str(owner).strip() for owner in found[source.patient_column]]
    if not all(patient) or "nan" in patient:  # without an owner, they would count as one patient
        raise DataRefused("a record has no patient", detail=f"{source.path}, {source.patient_column}")
    return schema.encode(found, found["label"], patient), patient
