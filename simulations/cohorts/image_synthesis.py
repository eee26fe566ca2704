"""PneumoniaMNIST over three hospitals, for a generator of such films: one sees more normal ones, one more pneumonia."""

from __future__ import annotations

from pathlib import Path

from wardround.client.data.medmnist import load_medmnist
from wardround.client.policy import DataSource
from wardround.common.tasks import Task
from wardround.simulations.cohorts.base import Cohort, Gathered
from wardround.simulations.cohorts.shares import at_home

_FILE = "pneumonia_mnist_balanced/pneumoniamnist.npz"
_HOSPITALS = ("east", "north", "west")
_SHARES = ((0.4, 0.33, 0.27), (0.27, 0.33, 0.4))  # of normal films, of pneumonia


def _read(folder: Path, task: Task) -> Gathered:
    loaded = load_medmnist(DataSource(loader="medmnist", path=folder / _FILE), task)
    return Gathered(loaded, at_home(loaded.records, _HOSPITALS, _SHARES))


image_synthesis = Cohort(
    name="image-synthesis",
    origin=(
        "PneumoniaMNIST of MedMNIST v2 (https://medmnist.com, CC BY 4.0), with as many normal films as pneumonia; put it into "
        "pneumonia_mnist_balanced/."
    ),
    files=(_FILE,),
    read=_read,
    holdout=0.0,  # the file's own test part
)
