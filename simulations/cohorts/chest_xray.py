"""PneumoniaMNIST over four hospitals that see different shares of pneumonia."""

from __future__ import annotations

from pathlib import Path

from wardround.client.data.medmnist import load_medmnist
from wardround.client.policy import DataSource
from wardround.common.tasks import Task
from wardround.simulations.cohorts.base import Cohort, Gathered
from wardround.simulations.partition import Partition

_FILE = "pneumonia_mnist_balanced/pneumoniamnist.npz"
_HOSPITALS = ("east", "north", "south", "west")


def _read(folder: Path, task: Task) -> Gathered:
    loaded = load_medmnist(DataSource(loader="medmnist", path=folder / _FILE), task)
    dealt = Partition("dirichlet", 2.0).deal(loaded.records.label.numpy(), len(_HOSPITALS), seed=0)
    home = [""] * len(loaded.records)
    for hospital, mine in zip(_HOSPITALS, dealt, strict=True):
        for index in mine.tolist():
            home[index] = hospital
    return Gathered(loaded, home)


chest_xray = Cohort(
    name="chest-xray",
    origin="PneumoniaMNIST, CC BY 4.0, https://medmnist.com; the official file does as well.",
    files=(_FILE,),
    read=_read,
    holdout=0.0,  # the file's own test part
)
