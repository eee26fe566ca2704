"""The UCI splice junctions, embedded, dealt out to four laboratories that see the three classes in different shares.

The files say nothing about whose DNA it is, so each sequence is taken for one patient's. The same sequence twice goes to the
same laboratory, and to the same side of the held-out split.
"""

from __future__ import annotations

from pathlib import Path

from wardround.client.data.sequences import load_sequences
from wardround.client.policy import DataSource
from wardround.common.tasks import Task
from wardround.simulations.cohorts.base import Cohort, Gathered
from wardround.simulations.cohorts.shares import at_home

LABORATORIES = ("east", "north", "south", "west")
_SHARES = (  # of each class, by laboratory
    (0.30, 0.40, 0.20, 0.10),  # EI
    (0.20, 0.15, 0.30, 0.35),  # IE
    (0.20, 0.25, 0.30, 0.25),  # N
)


def _read(folder: Path, task: Task) -> Gathered:
    source = DataSource(loader="sequences", path=folder / "splice_junctions/splice.csv.gz")
    loaded = load_sequences(source, task)
    return Gathered(loaded, at_home(loaded.records, LABORATORIES, _SHARES))


splice_junctions = Cohort(
    name="splice-junctions",
    origin="UCI Molecular Biology (Splice-junction Gene Sequences), CC BY 4.0, https://doi.org/10.24432/C5M888; embedded.",
    files=(),
    read=_read,
)
