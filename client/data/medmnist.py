"""MedMNIST's own .npz files: small pictures, split by its makers (Yang et al. 2023, https://doi.org/10.1038/s41597-022-01721-8).

The training and validation parts are trained on, the test part is held out. Nothing is downloaded here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wardround.client.data.loaded import Loaded
from wardround.client.data.npz import read_npz
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import ImageSchema, Task

PARTS = ("train", "val", "test")
_HOW = "download it once with the medmnist package, or from https://zenodo.org/records/10519652; no loader does"


def load_medmnist(source: DataSource, task: Task) -> Loaded:
    """Read `source.path` (pneumoniamnist.npz, bloodmnist_224.npz ...); each picture is a patient, for the file names none.

    Raises:
        DataRefused: the file is not there, cannot be read or does not fit; the detail names it.
    """
    schema = task.schema
    if not isinstance(schema, ImageSchema):
        raise DataRefused(f"task {task.name} does not read pictures", detail=f"loader = 'medmnist' for {source.path}")
    if source.patient_column or source.labels:
        raise DataRefused("MedMNIST names no patients", detail=f"{source.path}: leave out patient_column and labels")
    images, labels, held_out = _parts(source)
    try:
        records = schema.encode_arrays(images, labels, [str(number) for number in range(len(images))])
    except DataRefused as error:
        raise DataRefused(str(error), detail=f"{source.path}: {error.detail}") from None
    return Loaded(records, held_out=held_out)


def _parts(source: DataSource) -> tuple[NDArray[Any], NDArray[Any], torch.Tensor]:
    """All pictures (records, height, width[, 3]), labels (records,), and which are the test part."""
    if not source.path.is_file():
        raise DataRefused("the data file is not there", detail=f"{source.path}: {_HOW}")
    try:
        names = {(part, kind): f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")}
        arrays = read_npz(source.path, list(names.values()))
    except Exception as error:  # a damaged archive ends in half a dozen kinds of exceptions: zlib's, struct's, zipfile's ...
        raise DataRefused("the pictures cannot be read", detail=f"{source.path}: {error}") from None
    found = {key: arrays[name] for key, name in names.items()}
    for part in PARTS:
        images, labels = found[part, "images"], found[part, "labels"]
        picture = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
        if not picture or labels.shape != (len(images), 1) or labels.dtype.kind not in "biu" or images.dtype.kind not in "biuf":
            raise DataRefused(
                "the file does not hold single pictures with one label each",
                detail=f"{source.path}, {part}: images {images.shape}, labels {labels.shape}",
            )
    if len({images.shape[1:] for (_, kind), images in found.items() if kind == "images"}) != 1:
        raise DataRefused("the file's parts differ in the size of their pictures", detail=str(source.path))
    images = np.concatenate([found[part, "images"] for part in PARTS])
    labels = np.concatenate([found[part, "labels"][:, 0] for part in PARTS])
    if not len(images):
        raise DataRefused("there are no pictures", detail=str(source.path))
    return images, labels, torch.arange(len(images)) >= len(images) - len(found["test", "images"])
