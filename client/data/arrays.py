"""Ready arrays: a NumPy .npz file with one array per field, `label`, and optionally the patient column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wardround.client.data.loaded import Loaded
from wardround.client.data.npz import read_npz
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import ArraySchema, ImageSchema, Records, Task


def load_arrays(source: DataSource, task: Task) -> Loaded:
    """Read `source.path` as the task's arrays, and whose each is; nothing in it is unpickled.

    Raises:
        DataRefused: the file cannot be read or does not fit; the detail names the file.
    """
    schema = task.schema
    if not isinstance(schema, (ArraySchema, ImageSchema)):
        raise DataRefused(f"task {task.name} does not read arrays", detail=f"loader = 'arrays' for {source.path}")
    fields = ["image"] if isinstance(schema, ImageSchema) else list(schema.shapes)
    wanted = [*fields, "label", *([source.patient_column] if source.patient_column else [])]
    try:
        found = read_npz(source.path, wanted)
    except Exception as error:  # a damaged archive ends in half a dozen kinds of exceptions: zlib's, struct's, zipfile's ...
        raise DataRefused("the arrays cannot be read", detail=f"{source.path}: {error}") from None
    if odd := [name for name, array in found.items() if not isinstance(array, np.ndarray) or not array.ndim]:
        raise DataRefused("the arrays cannot be read", detail=f"{source.path}: {odd[0]} is not an array")
    if not len(found["label"]):
        raise DataRefused("the file holds no records", detail=str(source.path))
    # before anything is listed record by record: a small archive can hold hundreds of millions of labels
    if any(len(array) != len(found["label"]) for array in found.values()):
        raise DataRefused("the arrays differ in their number of records", detail=str(source.path))
    if isinstance(schema, ImageSchema) and found["image"].ndim < 3:
        raise DataRefused("field image is not one picture for each record", detail=str(source.path))
    if not source.patient_column:
        return Loaded(_encoded(schema, found, [str(number) for number in range(len(found["label"]))]))
    patient = [str(owner).strip() for owner in found[source.patient_column]]
    if not all(patient) or "nan" in patient:  # without an owner, they would count as one patient
        raise DataRefused("a record has no patient", detail=f"{source.path}, {source.patient_column}")
    return Loaded(_encoded(schema, found, patient), patient)


def _encoded(schema: ArraySchema | ImageSchema, found: Mapping[str, NDArray[Any]], patient: list[str]) -> Records:
    if isinstance(schema, ArraySchema):
        return schema.encode(found, found["label"], patient)
    return schema.encode_arrays(found["image"], found["label"], patient)
