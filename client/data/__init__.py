"""Loaders: a site's files -> `Records`, checked against the task's schema. One file a format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
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
    load: Callable[[DataSource, Task], Records]


LOADERS = registry(Loader("table", load_table), Loader("arrays", load_arrays))


def open_records(source: DataSource, task: Task) -> tuple[Records, Records]:
    """Training records and held-out records of a data source; no patient is in both.

    Raises:
        DataRefused: the records do not fit the task; the detail, which stays at the site, names the file.
        ConfigError: no such loader.
    """
    records = look_up("loader", source.loader, LOADERS).load(source, task)
    order = np.random.default_rng(source.holdout_seed).permutation(records.patients)
    held_out = torch.zeros(records.patients, dtype=torch.bool)
    held_out[order[: round(source.holdout * records.patients)]] = True
    return records.of_patients(~held_out), records.of_patients(held_out)
