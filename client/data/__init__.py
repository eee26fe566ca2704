"""Loaders: a site's files -> `Records`, checked against the task's schema. One file a format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from wardround.client.data.arrays import load_arrays
from wardround.client.data.table import load_table
from wardround.client.policy import DataSource
from wardround.common.registry import look_up, registry
from wardround.common.tasks import Records, Task


@dataclass(frozen=True)
class Loader:
    """A registered file format."""

    name: str
    load: Callable[[DataSource, Task], tuple[Records, list[str] | None]]  # records; who owns each, where the file says


LOADERS = registry(Loader("table", load_table), Loader("arrays", load_arrays))


def open_records(source: DataSource, task: Task) -> tuple[Records, Records]:
    """Training records and held-out records of a data source; no patient is in both.

    Raises:
        DataRefused: the records do not fit the task; the detail, which stays at the site, names the file.
        ConfigError: no such loader.
    """
    records, owner = look_up("loader", source.loader, LOADERS).load(source, task)
    held_out = torch.tensor([_share(source.holdout_seed, key) < source.holdout for key in _keys(records, owner)])
    return records.of_patients(~held_out), records.of_patients(held_out)


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


def _share(seed: int, key: bytes) -> float:
    """A number in [0, 1) that depends on this one patient and the seed alone.

    A draw over all patients at once would move others between training and test whenever one comes or goes, and so make
    one patient weigh as much as many.
    """
    return int.from_bytes(hashlib.sha256(b"%d/" % seed + key).digest()[:8], "big") / 2**64
