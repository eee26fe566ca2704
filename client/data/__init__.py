"""Loaders: a site's files -> `Records`, checked against the task's schema. One file a format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wardround.client.data.arrays import load_arrays
from wardround.client.data.cifar import load_cifar
from wardround.client.data.dicom import load_dicom
from wardround.client.data.image_files import load_images
from wardround.client.data.loaded import Loaded
from wardround.client.data.medmnist import load_medmnist
from wardround.client.data.prepared import load_prepared
from wardround.client.data.sequences import load_sequences
from wardround.client.data.series import load_series
from wardround.client.data.table import load_table
from wardround.client.data.text import load_text
from wardround.client.policy import DataSource
from wardround.common.errors import ConfigError, DataRefused
from wardround.common.registry import look_up, registry
from wardround.common.tasks import Records, Task


@dataclass(frozen=True)
class Loader:
    """A registered file format."""

    name: str
    load: Callable[[DataSource, Task], Loaded]


LOADERS = registry(
    Loader("arrays", load_arrays),
    Loader("cifar", load_cifar),
    Loader("dicom", load_dicom),
    Loader("images", load_images),
    Loader("medmnist", load_medmnist),
    Loader("prepared", load_prepared),
    Loader("sequences", load_sequences),
    Loader("series", load_series),
    Loader("table", load_table),
    Loader("text", load_text),
)


def load(source: DataSource, task: Task) -> Loaded:
    """All records of a data source, and what its files say about them.

    Raises:
        DataRefused: the records do not fit the task; the detail, which stays at the site, names the file.
        ConfigError: no such loader.
    """
    return look_up("loader", source.loader, LOADERS).load(source, task)


def open_records(source: DataSource, task: Task) -> tuple[Records, Records]:
    """Training records and held-out records of a data source; no patient is in both.

    The split is the files' own, or falls by `holdout`.

    Raises:
        DataRefused: as in `load`; or a patient is on both sides of the files' split.
        ConfigError: no such loader, or a `holdout` for files that bring their own split.
    """
    loaded = load(source, task)
    held_out = held_out_patients(loaded, source)
    return loaded.records.of_patients(~held_out), loaded.records.of_patients(held_out)


def open_parted(source: DataSource, task: Task, share: float) -> tuple[Records, Records]:
    """The training records of `open_records` in two: those that are trained on, and those set aside for validation.

    Each patient is set aside with probability `share`, by an own hash, whatever study asks; a smaller share is a part of a
    larger one. So studies cannot be chosen until every patient has been looked at.

    Raises:
        DataRefused, ConfigError: as `open_records`.
    """
    loaded = load(source, task)
    keys = _keys(loaded.records, loaded.owner)
    aside = torch.tensor([_share(source.holdout_seed, key, b"validation/") < share for key in keys])
    training = ~held_out_patients(loaded, source)
    return loaded.records.of_patients(training & ~aside), loaded.records.of_patients(training & aside)


def held_out_patients(loaded: Loaded, source: DataSource) -> Tensor:
    """(patients,) bool; see `open_records`."""
    records = loaded.records
    if loaded.held_out is None:
        return torch.tensor([_share(source.holdout_seed, key) < source.holdout for key in _keys(records, loaded.owner)])
    if source.holdout:
        raise ConfigError(f"{source.path} brings its own held-out records; holdout = {source.holdout:g} must be left out")
    out, kept = (
        torch.bincount(records.patient[side], minlength=records.patients) for side in (loaded.held_out, ~loaded.held_out)
    )
    if bool((out.bool() & kept.bool()).any()):
        raise DataRefused("a patient is in training and held out at once", detail=str(source.path))
    return out.bool()


def _keys(records: Records, owner: list[str] | None) -> list[bytes]:
    """What tells each patient from the others: the id in the file, or the patient's only record itself."""
    keys: dict[int, bytes] = {}
    for position, patient in enumerate(records.patient.tolist()):
        if owner is not None:
            keys[patient] = owner[position].encode()
        else:
            parts = [*(tensor[position] for tensor in records.fields.values()), records.label[position]]
            keys[patient] = b"".join(part.numpy().tobytes() for part in parts)
    return [keys[patient] for patient in range(records.patients)]


def _share(seed: int, key: bytes, salt: bytes = b"") -> float:
    """A number in [0, 1) that depends on this one patient, the seed and what it is for.

    A draw over all patients at once would move others between training and test whenever one comes or goes, and so make
    one patient weigh as much as many.
    """
    return int.from_bytes(hashlib.sha256(salt + b"%d/" % seed + key).digest()[:8], "big") / 2**64
