"""The hospitals of a simulation: everybody's records have one home, and a data set that is not there is asked for by name."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch

from wardround.client.data import held_out_patients, load, open_records
from wardround.client.data.loaded import Loaded
from wardround.client.policy import SiteConfig
from wardround.common.errors import ConfigError
from wardround.common.plan import StudyPlan, two_digits
from wardround.common.tasks import TASKS, Records, Task
from wardround.simulations import STUDIES
from wardround.simulations.cohorts import COHORTS, Cohort, Gathered, gather
from wardround.simulations.hospitals import SimulatedHospital, dealt, of_plan
from wardround.simulations.scenario import Changes, Scenario

SPLICE = STUDIES / "splice-junctions.toml"


def a_cohort(read: object, *files: str) -> Cohort:
    return Cohort("heart-disease", "It is here.", files, read)  # type: ignore[arg-type]


def nothing(folder: Path, task: Task) -> Gathered:
    return Gathered(Loaded(task.blank(0)), [str(folder)])


@pytest.fixture
def plan() -> StudyPlan:
    return StudyPlan.load(SPLICE)


def test_every_record_of_an_embedded_data_set_is_at_one_hospital_of_the_plan(plan: StudyPlan):
    gathered = gather(COHORTS[plan.task], TASKS[plan.task], None)
    assert set(gathered.home) == set(plan.sites)
    hospitals = of_plan(SPLICE, plan, None)
    assert list(hospitals) == list(plan.sites)
    held = [hospital.records for hospital in hospitals.values()]
    assert sum(len(part.records) for part in held if part) == len(gathered.loaded.records) == len(gathered.home)


SMALLEST_PHANTOM = "chest-phantom-segmentation"  # the other ones are the same drawing, of more patients


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name.startswith("chest-phantom") and name != SMALLEST_PHANTOM))
    for name in sorted(path.stem for path in STUDIES.glob("*.toml"))
])  # fmt: skip
def test_a_shipped_study_declares_what_its_hospitals_train_on(name: str, tmp_path: Path):
    study = StudyPlan.load(STUDIES / f"{name}.toml")
    if study.task in COHORTS and COHORTS[study.task].files:
        pytest.skip("its records are not embedded")
    scenario = Scenario.prepare(STUDIES / f"{name}.toml", tmp_path / "run", Changes())
    for site, declared in study.sites.items():
        training, _ = open_records(scenario.source(site), scenario.task)
        assert abs(two_digits(training.patients) - declared) <= 0.1 * declared


def test_a_run_folder_holds_each_hospitals_own_records_and_file(tmp_path: Path):
    scenario = Scenario.prepare(SPLICE, tmp_path / "run", Changes(rounds=1))
    for site, path in scenario.sites.items():
        config = SiteConfig.load(path)
        assert config.data["splice-junctions"].path == (path.parent / "records.safetensors").resolve()
        assert len(load(config.data["splice-junctions"], scenario.task).records) > 100
        assert config.site == site


def test_a_site_that_is_nobodys_home_is_refused_with_those_there_are(tmp_path: Path):
    table = tomllib.loads(SPLICE.read_text())
    table["sites"] = {"nowhere": 100, **table["sites"]}
    (tmp_path / "s.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(ConfigError, match=r"sites.nowhere: no record of task splice-junctions is at home there; there are: "):
        Scenario.prepare(tmp_path / "s.toml", tmp_path / "run", Changes())
    assert not (tmp_path / "run").exists()


def test_records_that_are_not_embedded_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("WARDROUND_DATA", raising=False)
    cohort, task = a_cohort(nothing, "set/records.csv"), TASKS["heart-disease"]
    with pytest.raises(ConfigError, match=r"give --data DIR, or set WARDROUND_DATA, .* set/records.csv in it. It is here."):
        gather(cohort, task, None)
    with pytest.raises(ConfigError, match=r"has no set/records.csv, which task heart-disease needs. It is here."):
        gather(cohort, task, tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "records.csv").touch()
    assert gather(cohort, task, tmp_path).home == [str(tmp_path)]
    monkeypatch.setenv("WARDROUND_DATA", str(tmp_path))
    assert gather(cohort, task, None).home == [str(tmp_path)]
    with pytest.raises(ConfigError, match="has no set/records"):  # what the command line says wins
        gather(cohort, task, tmp_path / "other")


def test_an_installed_package_may_have_brought_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("WARDROUND_DATA", raising=False)
    cohort = Cohort("heart-disease", "It is here.", ("records.csv",), nothing, brought=lambda: tmp_path)
    assert gather(cohort, TASKS["heart-disease"], None).home == [str(tmp_path)]


def hospital_of(patients: list[int], held_out: list[bool] | None = None) -> SimulatedHospital:
    task = TASKS["heart-disease"]
    blank = task.blank(len(patients))
    fields = {"table": torch.arange(len(patients))[:, None] + blank.fields["table"]}
    records = Records(fields, torch.tensor(patients) % 2, torch.tensor(patients))
    source = {
        "loader": "prepared", "path": "r", "declared_patients": 4, "holdout": 0.0 if held_out else 0.25, "holdout_seed": 3,
    }  # fmt: skip
    table = {"site": "a", "data": {"heart-disease": source}, "allow": {"tasks": ["heart-disease"], "min_patients": 50}}
    config = SiteConfig.build(table, source="test")
    return SimulatedHospital(config, Loaded(records, None, torch.tensor(held_out) if held_out else None))


def heart() -> StudyPlan:
    return StudyPlan.load(STUDIES / "heart-disease.toml")


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.5", "size:1.0"])
def test_dealing_moves_whole_patients_and_their_splits(partition: str):
    patients = [0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 7]
    split = [p in (1, 5) for p in patients]
    one = hospital_of(patients, split)
    found = dealt({"a": one, "b": one}, heart(), sites=3, partition=partition, seed=0)
    assert list(found) == ["site-1", "site-2", "site-3"]
    parts = [hospital.records for hospital in found.values() if hospital.records]
    assert sum(len(part.records) for part in parts) == 2 * len(patients)
    assert sum(part.records.patients for part in parts) == 16
    for hospital in found.values():
        assert hospital.records is not None
        records, held_out = hospital.records.records, hospital.records.held_out
        assert held_out is not None
        for patient in range(records.patients):
            values = records.fields["table"][records.patient == patient, 0].long().tolist()
            assert {patients[v] for v in values} == {patients[values[0]]}
            assert len(values) == patients.count(patients[values[0]])
            assert held_out[records.patient == patient].unique().numel() == 1
        training = records.patients - int(torch.unique(records.patient[held_out]).numel())
        assert hospital.config.data["heart-disease"].declared_patients == max(1, two_digits(training))
        assert hospital.config.allow.min_patients == 1


def test_a_patient_of_two_homes_is_dealt_to_one_hospital_and_one_side_of_the_split():
    one = hospital_of(list(range(40)))
    assert one.records is not None
    homes = {
        name: replace(one, records=replace(one.records, owner=[f"p{first + n}" for n in range(40)]))
        for name, first in (("a", 0), ("b", 20))
    }
    found = dealt(homes, heart(), sites=2, partition="iid", seed=0)
    seen: dict[str, set[tuple[str, bool]]] = {}
    for name, hospital in found.items():
        assert hospital.records is not None
        assert hospital.records.owner is not None
        out = held_out_patients(hospital.records, hospital.config.data["heart-disease"])
        for owner, patient in zip(hospital.records.owner, hospital.records.records.patient.tolist(), strict=True):
            seen.setdefault(owner, set()).add((name, bool(out[patient])))
    assert len(seen) == 60
    assert all(len(place) == 1 for place in seen.values())


@pytest.mark.parametrize(("sites", "complaint"), [(0, "--sites 0: wanted at least 1"), (9, "there are only 8 patients")])
def test_patients_cannot_be_dealt_to_nobody_or_to_more_hospitals_than_there_are_patients(sites: int, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        dealt({"a": hospital_of(list(range(8)))}, heart(), sites=sites, partition="iid", seed=0)
