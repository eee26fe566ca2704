"""The eICU demo: hourly findings as YAIB prepared them, the APACHE table, and the region of each patient's hospital as home."""

from __future__ import annotations

import csv
import gzip
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from wardround.client.data.rows import read_rows
from wardround.client.data.series import load_series
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import Task
from wardround.common.tasks.icu_fusion import APACHE
from wardround.simulations.cohorts.base import Cohort, Gathered

HOURLY = "yaib_icu_demo/demo_data/mortality24/eicu_demo"
TABLES = "eicu_demo/csv"
_SERIES = (f"{HOURLY}/dyn.parquet", f"{HOURLY}/outc.parquet", f"{TABLES}/patient.csv.gz", f"{TABLES}/hospital.csv.gz")
_APACHE = (f"{TABLES}/apacheapsvar.csv.gz", f"{TABLES}/apachepredvar.csv.gz")
_ORIGIN = (
    "The eICU Collaborative Research Database Demo 2.0 (https://physionet.org/content/eicu-crd-demo, Open Database License), "
    "hourly as in demo_data of https://github.com/rvandewater/YAIB, below yaib_icu_demo/ and eicu_demo/csv/."
)
_STAY, _PATIENT, _LABEL = "patientunitstayid", "uniquepid", "died"

Row = dict[str, str]


def _gather(folder: Path, task: Task, outcome: Mapping[str, str], static: Mapping[str, Row], columns: list[str]) -> Gathered:
    """Stays with an outcome, through the loader that a hospital would use."""
    stays = _table(folder / TABLES / "patient.csv.gz", _STAY)
    region = {name: row["region"].lower() for name, row in _table(folder / TABLES / "hospital.csv.gz", "hospitalid").items()}
    with tempfile.TemporaryDirectory() as scratch:
        labels = Path(scratch) / "labels.csv"
        rows = [
            [stay, died, stays[stay][_PATIENT], *(static.get(stay, {}).get(name, "") for name in columns)]
            for stay, died in outcome.items()
        ]
        with labels.open("w", newline="") as file:
            csv.writer(file).writerows([["stay_id", _LABEL, _PATIENT, *columns], *rows])
        source = DataSource(
            loader="series", path=folder / HOURLY / "dyn.parquet", labels=labels, file_column="stay_id", label_column=_LABEL,
            patient_column=_PATIENT,
        )  # fmt: skip
        loaded = load_series(source, task)
    return Gathered(loaded, [region.get(stays[stay]["hospitalid"]) or "unknown" for stay in outcome])


def _hourly(folder: Path, task: Task) -> Gathered:
    return _gather(folder, task, _outcome(folder), {}, [])


def _both(folder: Path, task: Task) -> Gathered:
    stays = _table(folder / TABLES / "patient.csv.gz", _STAY)
    known = {"Alive": "0", "Expired": "1"}
    died = {stay: known.get(stays[stay]["hospitaldischargestatus"]) for stay in _outcome(folder)}
    scores, predictors = (_table(folder / name, _STAY) for name in _APACHE)
    return _gather(
        folder, task, {stay: died for stay, died in died.items() if died is not None},
        {stay: predictors.get(stay, {}) | row for stay, row in scores.items()}, [column.column for column in APACHE],
    )  # fmt: skip


def _outcome(folder: Path) -> Row:
    rows = read_rows(folder / HOURLY / "outc.parquet")
    names = next(rows)[1]
    stay, label = names.index("stay_id"), names.index("label")
    return {row[stay]: row[label] for _, row in rows}


def _table(path: Path, key: str) -> dict[str, Row]:
    try:
        with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
            rows: Iterable[Row] = csv.DictReader(file)
            return {row[key]: row for row in rows}
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise DataRefused("the table cannot be read", detail=f"{path}: {error}") from None


icu_fusion = Cohort("icu-fusion", _ORIGIN, (*_SERIES, *_APACHE), _both)
icu_mortality_eicu = Cohort("icu-mortality-eicu", _ORIGIN, _SERIES, _hourly)
