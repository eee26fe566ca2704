"""The PhysioNet/Computing in Cardiology Challenge 2012, set c: four kinds of intensive care unit stand in for hospitals."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

from wardround.client.data.series import load_series
from wardround.client.policy import DataSource
from wardround.common.tasks import Task
from wardround.simulations.cohorts.base import Cohort, Gathered

UNITS = {"1": "ccu", "2": "csru", "3": "micu", "4": "sicu"}  # coronary, cardiac surgery, medical, surgical


def _read(folder: Path, task: Task) -> Gathered:
    series, outcomes = folder / "physionet2012/set-c.zip", folder / "physionet2012/Outcomes-c.txt"
    source = DataSource(
        loader="series", path=series, labels=outcomes, file_column="RecordID", label_column="In-hospital_death",
        patient_column="RecordID",
    )  # fmt: skip
    loaded = load_series(source, task)
    assert loaded.owner is not None
    with zipfile.ZipFile(series) as archive:
        unit = {Path(name).stem: _unit(archive.read(name)) for name in archive.namelist() if name.endswith(".txt")}
    return Gathered(loaded, [unit[record] for record in loaded.owner])


def _unit(content: bytes) -> str:
    rows = csv.reader(content.decode().splitlines())
    return next(UNITS[value.strip()] for _, name, value in rows if name == "ICUType")


icu_mortality = Cohort(
    name="icu-mortality",
    origin=(
        "PhysioNet/Computing in Cardiology Challenge 2012, set-c.zip and Outcomes-c.txt "
        "(https://physionet.org/content/challenge-2012, Open Data Commons Attribution); put both into physionet2012/."
    ),
    files=("physionet2012/set-c.zip", "physionet2012/Outcomes-c.txt"),
    read=_read,
)
