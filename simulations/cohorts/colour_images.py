"""A set of small colour pictures, dealt out to five hospitals that see the classes in different shares."""

from __future__ import annotations

from pathlib import Path

from wardround.client.data.cifar import load_cifar
from wardround.client.policy import DataSource
from wardround.common.tasks import Task
from wardround.simulations.cohorts.base import Cohort, Gathered
from wardround.simulations.partition import Partition

_FOLDER = "cifar-10-batches-bin"
_SITES = 5


def _read(folder: Path, task: Task) -> Gathered:
    loaded = load_cifar(DataSource(loader="cifar", path=folder / _FOLDER), task)
    home = [""] * len(loaded.records)
    for number, mine in enumerate(Partition("dirichlet", 1.0).deal(loaded.records.label.numpy(), _SITES, seed=0), start=1):
        for index in mine.tolist():
            home[index] = f"site-{number}"
    return Gathered(loaded, home)


colour_images = Cohort(
    name="colour-images",
    origin=(
        "CIFAR-10, binary version (https://www.cs.toronto.edu/~kriz/cifar.html), unpacked; or any set of 32 x 32 pictures "
        "in the same form."
    ),
    files=(_FOLDER,),
    read=_read,
    holdout=0.0,  # test_batch.bin
)
