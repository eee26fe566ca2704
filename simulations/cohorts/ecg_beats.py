"""ECG5000: five thousand beats of one patient, dealt out to four recorders in turn."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from wardround.client.data.arrays import load_arrays
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import Task
from wardround.simulations.cohorts.base import Cohort, Gathered

FILES = ("ucr_ecg/ECG5000_TRAIN.tsv", "ucr_ecg/ECG5000_TEST.tsv")
RECORDERS = 4


def _read(folder: Path, task: Task) -> Gathered:
    try:
        rows = np.concatenate([np.loadtxt(folder / name, ndmin=2) for name in FILES])
    except (OSError, ValueError) as error:
        raise DataRefused("the beats cannot be read", detail=str(error)) from None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "beats.npz"
        np.savez(path, signal=rows[:, None, 1:], label=rows[:, 0].astype(np.int64) - 1)  # the files count classes from 1
        loaded = load_arrays(DataSource(loader="arrays", path=path), task)
    return Gathered(loaded, [f"recorder-{position % RECORDERS + 1}" for position in range(len(rows))])


ecg_beats = Cohort(
    name="ecg-beats",
    origin=(
        "ECG5000 of the UCR time series archive (https://www.timeseriesclassification.com, free for research with citation), "
        "one patient's beats; put ECG5000_TRAIN.tsv and ECG5000_TEST.tsv into ucr_ecg/."
    ),
    files=FILES,
    read=_read,  # the archive trains on 500 beats and tests on 4,500; here both files are one, and a quarter is held out
)
