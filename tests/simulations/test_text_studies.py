"""Studies of sequences and texts: they learn, under privacy too, and the shipped recipes reach what is promised."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from wardround.client.data import held_out_patients
from wardround.client.policy import DataSource
from wardround.common.errors import ConfigError, DataRefused
from wardround.common.plan import SignedText, two_digits
from wardround.common.studies import find_study
from wardround.common.tasks import TASKS, Records, Task
from wardround.common.weights import trainable
from wardround.simulations.baselines import train_alone
from wardround.simulations.cohorts import COHORTS, Gathered, gather
from wardround.simulations.cohorts.radiology_reports import HEADERS, REPORTS, brought
from wardround.simulations.cohorts.shares import at_home
from wardround.simulations.command import Request, run

DATA = os.environ.get("WARDROUND_DATA")
STUDIES = ("news-topics", "radiology-reports", "splice-junctions")
given = pytest.mark.skipif(DATA is None, reason="WARDROUND_DATA names no folder with the data sets that are not embedded")


def results(folder: Path, study: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / study / "report.json").read_text())
    return found


def splice() -> Gathered:
    return gather(COHORTS["splice-junctions"], TASKS["splice-junctions"], None)


# --- cohorts --------------------------------------------------------------------------------------------------------------


def test_the_embedded_sequences_are_those_of_the_data_set():
    records = splice().loaded.records
    assert Counter(records.label.tolist()) == {0: 767, 1: 768, 2: 1655}
    assert records.fields["tokens"].shape == (3190, 60)
    assert int((records.fields["tokens"] == 5).sum()) == 60  # D, N, R and S together


def test_laboratories_see_the_classes_in_different_shares():
    found = splice()
    seen = Counter(zip(found.home, found.loaded.records.label.tolist(), strict=True))
    share = {site: seen[site, 0] / sum(seen[site, label] for label in range(3)) for site in {*found.home}}
    assert len(share) == 4
    assert max(share.values()) > 2 * min(share.values())


def test_equal_sequences_of_a_class_are_in_one_laboratory_and_on_one_side_of_the_split():
    found = splice()
    source = DataSource(loader="sequences", path=Path("x"), holdout=0.25, holdout_seed=7)
    out = held_out_patients(found.loaded, source).tolist()
    places: dict[bytes, set[tuple[str, bool]]] = {}
    records = found.loaded.records
    for tokens, label, home, held_out in zip(records.fields["tokens"], records.label.tolist(), found.home, out, strict=True):
        places.setdefault(tokens.numpy().tobytes() + bytes([label]), set()).add((home, held_out))
    assert len(places) < len(records)
    assert all(len(place) == 1 for place in places.values())


def test_a_home_depends_on_the_record_alone():
    records = splice().loaded.records
    shares = [(0.5, 0.5)] * 3
    whole = at_home(records, ("a", "b"), shares)
    index = torch.arange(0, 3190, 7)
    assert at_home(records.take(index), ("a", "b"), shares) == [whole[i] for i in index.tolist()]
    assert 0.45 < whole.count("a") / len(whole) < 0.55


def a_collection(folder: Path, reports: dict[str, tuple[str, str]], makers: dict[str, str]) -> Path:
    """The two files of the collection: uid -> (findings, major); uid -> maker."""
    (folder / "iu_xray_reports").mkdir()
    with tarfile.open(folder / REPORTS, "w:gz") as archive:
        for uid, (findings, major) in reports.items():
            text = (
                f'<eCitation><uId id="{uid}" /><AbstractText Label="FINDINGS">{findings}</AbstractText>'
                f'<AbstractText Label="IMPRESSION">Seen.</AbstractText><MeSH><major>{major}</major></MeSH></eCitation>'
            ).encode()
            member = tarfile.TarInfo(f"ecgen-radiology/{uid}.xml")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    with gzip.open(folder / HEADERS, "wt", newline="") as file:
        csv.writer(file).writerows(
            [("imageid", "Private Creator"), *((f"{uid}_IM-0001-1001", maker) for uid, maker in makers.items())]
        )
    return folder


def test_reports_are_labelled_by_their_index_and_at_home_by_their_archive(tmp_path: Path):
    reports = {
        "CXR1": ("Clear lungs.", "normal"), "CXR2": ("An effusion.", "Pleural Effusion/left"), "CXR3": ("", "normal"),
        "CXR4": ("Clear.", "normal"),
    }  # fmt: skip
    folder = a_collection(tmp_path, reports, {"CXR1": "MITRA LINKED 1.0", "CXR2": "Agfa", "CXR4": "Kodak"})
    found = gather(COHORTS["radiology-reports"], TASKS["radiology-reports"], folder)
    assert found.loaded.owner == ["CXR1", "CXR2", "CXR4"]
    assert found.loaded.records.label.tolist() == [0, 1, 0]
    assert found.home == ["mitra", "agfa", "other"]


def test_equal_reports_have_one_home_and_are_on_one_side_of_the_split(tmp_path: Path):
    texts = [f"Words number {n // 3} of a template." for n in range(120)]  # each of three patients
    reports = {f"CXR{n}": (text, "normal") for n, text in enumerate(texts)}
    makers = {f"CXR{n}": ("MITRA", "Siemens", "Siemens")[n % 3] if n < 60 else ("MITRA", "Agfa")[n % 2] for n in range(120)}
    cohort = COHORTS["radiology-reports"]
    found = gather(cohort, TASKS["radiology-reports"], a_collection(tmp_path, reports, makers))
    places: dict[bytes, set[tuple[str, bool]]] = {}
    for seed in (1, 2):  # which does not move the split
        source = DataSource(loader="prepared", path=Path("x"), holdout=cohort.holdout, holdout_seed=seed)
        out = held_out_patients(found.loaded, source).tolist()
        for tokens, home, side in zip(found.loaded.records.fields["tokens"], found.home, out, strict=True):
            places.setdefault(tokens.numpy().tobytes(), set()).add((home, side))
    assert len(places) == 40
    assert all(len(place) == 1 for place in places.values())
    assert 4 <= sum(side for place in places.values() for _, side in place) <= 16
    assert {*found.home[:60]} == {"siemens"}  # what most of them name
    assert {*found.home[60:]} == {"agfa", "mitra"}


@given
def test_no_held_out_report_of_the_public_collection_has_the_words_of_a_training_report():
    plan = SignedText.load(find_study("radiology-reports")).plan
    found = gather(COHORTS["radiology-reports"], TASKS["radiology-reports"], Path(DATA or ""))
    assert found.loaded.held_out is not None
    sides: dict[bool, set[bytes]] = {False: set(), True: set()}
    training: Counter[str] = Counter()
    for row, home, side in zip(found.loaded.records.fields["tokens"], found.home, found.loaded.held_out.tolist(), strict=True):
        sides[side].add(row.numpy().tobytes())
        training[home] += not side
    assert not sides[False] & sides[True]
    assert {home: two_digits(count) for home, count in training.items()} == plan.sites


def test_a_damaged_collection_is_refused(tmp_path: Path):
    folder = a_collection(tmp_path, {"CXR1": ("Clear.", "normal")}, {"CXR1": "MITRA"})
    (folder / REPORTS).write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="are not those of the Indiana University collection"):
        gather(COHORTS["radiology-reports"], TASKS["radiology-reports"], folder)


def test_a_collection_that_a_package_has_brought_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "torchxrayvision"
    a_collection(tmp_path, {"CXR1": ("Clear.", "normal")}, {"CXR1": "MITRA"})
    package.mkdir()
    (tmp_path / "iu_xray_reports").rename(package / "data")
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = brought()
    assert folder == package / "data"
    found = COHORTS["radiology-reports"].read(folder, TASKS["radiology-reports"])
    assert found.home == ["mitra"]


def test_news_are_read_as_published(tmp_path: Path):
    (tmp_path / "ag_news").mkdir()
    rows = [(str(number % 4 + 1), f"Title {number}", "Some words, more.") for number in range(40)]
    with (tmp_path / "ag_news/test.csv").open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    found = gather(COHORTS["news-topics"], TASKS["news-topics"], tmp_path)
    assert found.loaded.records.label.tolist() == [number % 4 for number in range(40)]
    assert {*found.home} <= {"east", "north", "south", "west"}


@pytest.mark.parametrize("study", STUDIES[:2])
def test_a_study_without_its_data_says_where_to_get_them(tmp_path: Path, study: str):
    with pytest.raises(ConfigError, match=r"put (it|them) into"):
        gather(COHORTS[study], TASKS[study], tmp_path)


@pytest.mark.parametrize("study", STUDIES)
def test_a_cohort_refuses_a_task_of_another_kind(tmp_path: Path, study: str):
    folder = a_collection(tmp_path, {"CXR1": ("Clear.", "normal")}, {"CXR1": "MITRA"})
    (folder / "ag_news").mkdir()
    (folder / "ag_news/test.csv").write_text('"1","A","B"\n')
    with pytest.raises(DataRefused, match="does not read"):
        gather(COHORTS[study], TASKS["heart-disease"], folder)


# --- learning -------------------------------------------------------------------------------------------------------------


def made_up(task: Task, count: int = 64) -> Records:
    """Records of a class each: every second token is the class's own, the rest are drawn."""
    chance = torch.Generator().manual_seed(0)
    records = task.blank(count)
    label = torch.arange(count) % task.schema.classes
    tokens = torch.randint(1, 5, records.fields["tokens"].shape, generator=chance)
    tokens[:, ::2] = label[:, None] + 1
    return Records({"tokens": tokens}, label, records.patient)


@pytest.mark.parametrize("study", STUDIES)
def test_a_few_rounds_of_the_shipped_recipe_learn(study: str):
    plan = SignedText.load(find_study(study)).plan.model_copy(update={"rounds": 20})
    task = TASKS[study]
    records, model = made_up(task), task.model(plan.model, plan.seed)
    before, after = (
        float(task.scores(model, weights, records).probability[range(64), records.label.numpy()].mean())
        for weights in (trainable(task.model(plan.model, plan.seed)), train_alone(plan, records, name="made-up"))
    )
    assert after > before + 0.2


def test_the_laboratories_learn_together(tmp_path: Path):
    run(Request("splice-junctions", rounds=10, without_privacy=True, baselines=False, out=tmp_path, json=True))
    report = results(tmp_path, "splice-junctions")
    assert {*report["sites"]} == {"east", "north", "south", "west"}
    assert report["results"]["federated"]["accuracy"]["value"] > 0.6


@pytest.mark.slow
def test_the_laboratories_learn_together_under_privacy(tmp_path: Path):
    run(Request("splice-junctions", rounds=10, epsilon=20.0, baselines=False, out=tmp_path, json=True))
    report = results(tmp_path, "splice-junctions")
    assert all(site["epsilon"] <= 20 for site in report["privacy"].values())
    assert report["results"]["federated"]["accuracy"]["value"] > 0.6


FLOORS = [  # study, metric, without privacy, at epsilon 8
    pytest.param("splice-junctions", "accuracy", 0.93, 0.85),
    pytest.param("radiology-reports", "auroc", 0.955, 0.905, marks=given),  # 0.969 and 0.936 over three seeds
]


@pytest.mark.benchmark
@pytest.mark.parametrize("private", [False, True], ids=["without privacy", "at epsilon 8"])
@pytest.mark.parametrize(("study", "metric", "plain_floor", "private_floor"), FLOORS)
def test_the_shipped_recipe_reaches_its_floor(
    tmp_path: Path, study: str, metric: str, plain_floor: float, private_floor: float, private: bool
):
    run(Request(
        study, epsilon=8.0 if private else None, without_privacy=not private, baselines=False, out=tmp_path,
        json=True, data=Path(DATA) if DATA else None,
    ))  # fmt: skip
    reached = results(tmp_path, study)["results"]["federated"][metric]["value"]
    assert reached >= (private_floor if private else plain_floor)  # one seed; benchmarks.tasks takes three
