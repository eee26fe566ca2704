"""CIFAR's binary files (Krizhevsky 2009): for each picture a byte for the class, then 32 x 32 pixels of red, green and blue.

`data_batch_*.bin` are trained on and `test_batch.bin` is held out. The "python version" of the same set is a folder of
pickles, and a pickle is a program: it is refused, never opened. Nothing is downloaded here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from wardround.client.data.loaded import Loaded
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import ImageSchema, Task

_SIDE = 32
_RECORD = 1 + 3 * _SIDE * _SIDE  # bytes
_TEST = "test_batch.bin"
_MOST = 1 << 30  # bytes of one file; the real ones have 30 million


def load_cifar(source: DataSource, task: Task) -> Loaded:
    """Read the folder `source.path`; each picture is a patient, for the files name none. Without a test file none is held out.

    Raises:
        DataRefused: the files are not there, are pickles, or do not fit; the detail names them.
    """
    schema = task.schema
    if not isinstance(schema, ImageSchema) or schema.target != "class":
        raise DataRefused(f"task {task.name} does not read classes of pictures", detail=f"loader = 'cifar' for {source.path}")
    if source.patient_column or source.labels:
        raise DataRefused("CIFAR's files name no patients", detail=f"{source.path}: leave out patient_column and labels")
    trained = _training_files(source.path)
    test = source.path / _TEST
    files = [*trained, *([test] if test.is_file() else [])]
    rows = [_rows(file, schema.classes) for file in files]
    every = np.concatenate(rows)
    try:
        image = torch.stack([schema.prepare(row.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)) for row in every[:, 1:]])
        label = torch.from_numpy(every[:, 0].astype(np.int64))
        records = schema.encode(image, label, [str(number) for number in range(len(every))])
    except DataRefused as error:
        raise DataRefused(str(error), detail=f"{source.path}: {error.detail}") from None
    if len(files) == len(trained):
        return Loaded(records)
    return Loaded(records, held_out=torch.arange(len(every)) >= len(every) - len(rows[-1]))


def _training_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataRefused("the data folder is not there", detail=str(folder))
    files = sorted(file for file in folder.glob("data_batch*.bin") if file.is_file())
    if files:
        return files
    if any(not file.suffix for file in folder.glob("data_batch*")):
        raise DataRefused(
            "pictures in pickles are not read, because opening a pickle runs whatever is written in it",
            detail=f"{folder}: wanted the binary version (data_batch_1.bin ...), not the python version",
        )
    raise DataRefused("there are no pictures", detail=f"{folder} has no data_batch_*.bin")


def _rows(file: Path, classes: int) -> NDArray[np.uint8]:
    """(records, 3073) bytes."""
    try:
        size = file.stat().st_size
        if not size or size % _RECORD or size > _MOST:
            raise DataRefused(
                "a file is not whole pictures of 32 x 32 with a class each", detail=f"{file}: {size} bytes, {_RECORD} a picture"
            )
        rows = np.frombuffer(file.read_bytes(), dtype=np.uint8).reshape(-1, _RECORD)
    except (OSError, ValueError) as error:
        raise DataRefused("the pictures cannot be read", detail=f"{file}: {error}") from None
    if (rows[:, 0] >= classes).any():
        raise DataRefused(f"the labels are not one number from 0 to {classes - 1} for each record", detail=str(file))
    return rows
