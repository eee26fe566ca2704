"""Studies of series and signals: whose home a record is, and what the shipped recipes reach on the public data."""

from __future__ import annotations

import csv
import gzip
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wardround.client.dp import proof
from wardround.client.dp.engine import engine_of
from wardround.common.errors import ConfigError, DataRefused
from wardround.common.plan import SignedText
from wardround.common.tasks import TASKS
from wardround.simulations import STUDIES
from wardround.simulations.cohorts import COHORTS, Gathered, gather
from wardround.simulations.run import simulate
from wardround.simulations.scenario import Changes, Scenario

NAMES = ["ecg-beats", "icu-fusion", "icu-mortality", "icu-mortality-eicu"]
DATA = os.environ.get("WARDROUND_DATA")


def read(name: str, folder: Path) -> Gathered:
    return gather(COHORTS[name], TASKS[name], folder)


def public(name: str) -> Path:
    """The folder of public data, or a skip that says what is missing."""
    if DATA is None:
        pytest.skip("WARDROUND_DATA is not set: it names the folder of public data sets")
    if missing := [file for file in COHORTS[name].files if not (Path(DATA) / file).exists()]:
        pytest.skip(f"WARDROUND_DATA has no {missing[0]}")
    if any(file.endswith(".parquet") for file in COHORTS[name].files):
        pytest.importorskip("pyarrow")
    return Path(DATA)


def lines(*rows: list[Any]) -> str:
    return "".join(",".join(map(str, row)) + "\n" for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_study_is_of_its_own_task_and_its_network_goes_through_the_engine_in_one_pass(name: str):
    plan = SignedText.load(STUDIES / f"{name}.toml").plan
    task = TASKS[plan.task]
    assert plan.task == name == COHORTS[name].name
    model = task.model(plan.model, seed=0)
    blank = proof.made_up(task.blank(1), torch.arange(4))
    assert engine_of(model, task.loss, blank).in_one_pass


@pytest.mark.parametrize("name", NAMES)
def test_without_its_files_a_cohort_says_what_to_get(name: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"https://"):
        read(name, tmp_path)


def test_a_unit_of_intensive_care_is_a_home(tmp_path: Path):
    (tmp_path / "physionet2012").mkdir()
    with zipfile.ZipFile(tmp_path / "physionet2012/set-c.zip", "w") as archive:
        for number, unit in enumerate((3, 1, 4, 2)):
            said = [
                ["Time", "Parameter", "Value"],
                ["00:00", "RecordID", number],
                ["00:00", "ICUType", unit],
                ["01:00", "HR", 105],
            ]
            archive.writestr(f"set-c/{number}.txt", lines(*said, ["02:00", "", 7]))
    (tmp_path / "physionet2012/Outcomes-c.txt").write_text(
        lines(["RecordID", "SOFA", "In-hospital_death"], *([number, 1, number % 2] for number in range(4)))
    )
    gathered = read("icu-mortality", tmp_path)
    assert gathered.home == ["micu", "ccu", "sicu", "csru"]
    assert gathered.loaded.records.label.tolist() == [0, 1, 0, 1]
    assert gathered.loaded.records.fields["series"][:, :, 0].unique().tolist() == [1.0]


def test_beats_are_dealt_to_recorders_in_turn_and_classes_counted_from_zero(tmp_path: Path):
    (tmp_path / "ucr_ecg").mkdir()
    for part in ("TRAIN", "TEST"):
        rows = [[label, *[0.5] * 140] for label in (1, 2, 5)]
        np.savetxt(tmp_path / f"ucr_ecg/ECG5000_{part}.tsv", np.array(rows), delimiter="\t")
    gathered = read("ecg-beats", tmp_path)
    assert gathered.home == [f"recorder-{number}" for number in (1, 2, 3, 4, 1, 2)]
    assert gathered.loaded.records.label.tolist() == [0, 1, 4, 0, 1, 4]
    assert gathered.loaded.owner is None
    (tmp_path / "ucr_ecg/ECG5000_TEST.tsv").write_text("1\tno number\n")
    with pytest.raises(DataRefused, match="beats cannot be read"):
        read("ecg-beats", tmp_path)


def made_up_eicu(folder: Path) -> None:
    """Three stays of two patients; the third has neither a region nor an end, and nobody of it was scored."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    hourly, tables = folder / "yaib_icu_demo/demo_data/mortality24/eicu_demo", folder / "eicu_demo/csv"
    hourly.mkdir(parents=True)
    tables.mkdir(parents=True)
    stays = arrow.array([11, 12, 13], arrow.int32())
    seconds = arrow.array([0, 3600, 0], arrow.duration("s"))
    parquet.write_table(arrow.table({"stay_id": stays, "time": seconds, "hr": [105.0, 65.0, None]}), hourly / "dyn.parquet")
    parquet.write_table(arrow.table({"stay_id": stays, "label": arrow.array([0, 1, 0])}), hourly / "outc.parquet")
    scores = ["patientunitstayid", *(column.column for column in TASKS["icu-fusion"].schema.static if column.column != "age")]  # type: ignore[attr-defined]
    for name, rows in {
        "patient": [["patientunitstayid", "hospitalid", "uniquepid", "hospitaldischargestatus"],
                    [11, 1, "a", "Alive"], [12, 1, "a", "Expired"], [13, 2, "b", ""]],
        "hospital": [["hospitalid", "region"], [1, "Midwest"], [2, ""]],
        "apacheapsvar": [scores, [11, *[-1] * (len(scores) - 1)]],
        "apachepredvar": [["patientunitstayid", "age", "diedinhospital"], [11, 80, 1]],
    }.items():  # fmt: skip
        with gzip.open(tables / f"{name}.csv.gz", "wt", newline="") as file:
            csv.writer(file).writerows(rows)


def test_stays_of_one_patient_stay_together_at_home_in_their_region(tmp_path: Path):
    made_up_eicu(tmp_path)
    gathered = read("icu-mortality-eicu", tmp_path)
    assert gathered.home == ["midwest", "midwest", "unknown"]
    assert gathered.loaded.owner == ["a", "a", "b"]
    assert gathered.loaded.records.patient.tolist() == [0, 0, 1]
    assert gathered.loaded.records.label.tolist() == [0, 1, 0]
    assert gathered.loaded.records.fields["series"][1, :, 0].tolist() == [-1.0] * 12


def test_the_table_stands_beside_the_series_and_a_stay_without_an_end_is_left_out(tmp_path: Path):
    made_up_eicu(tmp_path)
    gathered = read("icu-fusion", tmp_path)
    assert gathered.home == ["midwest", "midwest"]
    assert gathered.loaded.records.label.tolist() == [0, 1]
    table = gathered.loaded.records.fields["table"]
    assert table[:, :2].tolist() == [[1, 0], [0, 1]]  # age; the second stay was never scored


@pytest.mark.parametrize(
    ("name", "hidden"), [("ecg-beats", {}), ("ecg-beats", {"network": "rnn"}), ("icu-fusion", {"hidden": 8})]
)
def test_a_small_training_learns(name: str, hidden: dict[str, Any]):
    task = TASKS[name]
    records = proof.made_up(task.blank(1), torch.arange(24))
    fields = {field: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for field, t in records.fields.items()}
    model = task.model(hidden, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = task.loss(model(**fields), torch.arange(24) % 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("name", "option"), [("ecg-beats", "network"), ("icu-fusion", "branches")])
def test_a_network_that_is_not_there_is_refused(name: str, option: str):
    with pytest.raises(ConfigError, match=f"model.{option}: 'oracle'; there are"):
        TASKS[name].model({option: "oracle"}, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_study_names_the_homes_of_the_public_data(name: str):
    gathered = read(name, public(name))
    assert set(SignedText.load(STUDIES / f"{name}.toml").plan.sites) <= set(gathered.home)


@pytest.mark.benchmark
@pytest.mark.parametrize(("name", "metric", "without", "private"), [
    ("icu-mortality", "auroc", 0.83, 0.78),
    ("ecg-beats", "accuracy", 0.93, 0.90),
])  # fmt: skip
def test_the_shipped_recipe_reaches_its_floors(name: str, metric: str, without: float, private: float, tmp_path: Path):
    data, floors = public(name), {"without": (True, without), "private": (False, private)}
    for kind, (open_study, floor) in floors.items():
        reached = []
        for seed in (7, 8, 9):
            changes = Changes(without_privacy=open_study, seed=seed)
            scenario = Scenario.prepare(STUDIES / f"{name}.toml", tmp_path / f"{kind}-{seed}", changes, data)
            report = simulate(scenario, baselines=False)
            reached.append(report.results.federated[metric].value)
        assert float(np.mean(reached)) >= floor, reached
