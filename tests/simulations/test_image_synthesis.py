"""Synthetic films from a study file to a report: the shipped cohort on phantom films, which are nobody's."""

from __future__ import annotations

import base64
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from wardround.client.hospital import Hospital
from wardround.common.messages import RollCall
from wardround.common.synthesis import Adversaries
from wardround.server.checkpoint import Progress, RoundRecord
from wardround.server.report import Report
from wardround.server.sheet import sheet
from wardround.simulations import STUDIES
from wardround.simulations.command import Request, run
from wardround.simulations.phantom import films
from wardround.simulations.run import Watch, simulate
from wardround.simulations.scenario import Changes, Scenario

STUDY = """
name = "few-films"
task = "image-synthesis"
rounds = 3
min_sites = 3
seed = 1
[sites]
east = 20
north = 20
west = 20
[model]
z = 4
width = 4
critic_width = 4
[local]
steps = 2
[step]
rule = "adam"
learning_rate = 0.003
average_last = 0.5
[privacy]
epsilon = 8.0
delta = 1e-5
sampling_rate = 0.5
records_per_patient = 1
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with PneumoniaMNIST's layout and phantom films in it."""
    folder = tmp_path_factory.mktemp("data")
    arrays = {}
    for part, count in (("train", 50), ("val", 10), ("test", 24)):
        drawn = films(part, count, seed=3, side=32, records_per_patient=(1.0,), prevalence=0.5)
        arrays |= {f"{part}_images": drawn.image, f"{part}_labels": drawn.label[:, None]}
    (folder / "pneumonia_mnist_balanced").mkdir()
    np.savez(folder / "pneumonia_mnist_balanced" / "pneumoniamnist.npz", **arrays)
    return folder


@pytest.fixture
def quick_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers of less care, where their figures do not matter."""
    module = importlib.import_module("wardround.common.tasks.image_synthesis")
    monkeypatch.setattr(module, "_FILMS", 64)
    monkeypatch.setattr(module, "_EPOCHS", 1)


@pytest.fixture
def study(tmp_path: Path, data: Path, quick_readers: None) -> Callable[..., Scenario]:
    def prepare(name: str = "run", **changes: object) -> Scenario:
        (tmp_path / "few-films.toml").write_text(STUDY)
        return Scenario.prepare(tmp_path / "few-films.toml", tmp_path / name, Changes(**changes), data)  # type: ignore[arg-type]

    return prepare


def test_a_private_study_ends_in_a_report_with_its_sheet(study: Callable[..., Scenario]):
    scenario = study()
    report = simulate(scenario)
    assert {site.steps for site in report.privacy.values()} == {6}  # a generator's step is no noised step
    assert all(0 < site.epsilon <= 8.0 for site in report.privacy.values())
    assert set(report.results.federated) == set(scenario.task.metrics)
    assert set(report.results.local) == {"east", "north", "west"}
    assert report.sheet is not None
    assert report.sheet.names == ("normal",) * 8 + ("pneumonia",) * 8
    values = np.frombuffer(base64.b64decode(report.sheet.pixels), dtype=np.uint8)
    assert values.size == 16 * 28 * 28
    assert len(np.unique(values)) > 16
    page = (scenario.folder / "report.html").read_text()
    assert "Made pictures, row by row: 8 of normal, 8 of pneumonia." in page
    assert any("nearest training image" in note for note in report.notes)
    assert any("no epsilon covers" in note for note in report.notes)


def test_without_baselines_no_training_image_is_looked_at_without_noise(study: Callable[..., Scenario]):
    report = simulate(study(), baselines=False)
    assert report.sheet is not None
    assert not any("training image" in note for note in report.notes)


def test_without_privacy_the_same_study_gives_the_same_films(study: Callable[..., Scenario]):
    one, two = (study(name, without_privacy=True, rounds=2) for name in ("one", "two"))
    sheets = [simulate(scenario, baselines=False).sheet for scenario in (one, two)]
    assert sheets[0] == sheets[1]


def test_a_sheet_follows_from_the_released_model_alone(study: Callable[..., Scenario]):
    scenario = study()
    plan = scenario.study.plan
    weights = {name: p.detach() for name, p in scenario.task.model(plan.model, 9).named_parameters()}
    critic_apart = {name: torch.zeros_like(w) if name.startswith("critic") else w for name, w in weights.items()}
    assert sheet(plan, weights) == sheet(plan, critic_apart)


def test_the_generator_is_handed_out_and_the_critic_stays_in_the_checkpoint(study: Callable[..., Scenario]):
    whole, cut = (study(name, without_privacy=True) for name in ("whole", "cut"))
    report = simulate(whole, baselines=False)

    def fall(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(cut, baselines=False, watch=Watch(round_done=fall))
    assert simulate(Scenario.reopen(cut.folder), baselines=False).sheet == report.sheet
    for scenario in (whole, cut):
        network = scenario.task.model(scenario.study.plan.model, 0)
        released = safetensors.torch.load_file(scenario.folder / "model.safetensors")
        assert released.keys() == {name for name, _ in network.named_parameters() if name.startswith("generator.")}
        kept = Progress.latest(scenario.folder / "checkpoints", study=scenario.study.digest)
        assert kept is not None
        assert kept.weights.keys() == {name for name, _ in network.named_parameters()}


def test_a_hospital_refuses_a_critic_that_mixes_patients(study: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch):
    scenario = study()

    def mixing(*given: object) -> Adversaries:
        pair = scenario.task.model({}, 0)
        assert isinstance(pair, Adversaries)
        pair.critic.layers.insert(0, torch.nn.BatchNorm2d(1))
        return pair

    monkeypatch.setattr("wardround.client.hospital.working_model", mixing)
    hospital = Hospital(scenario.sites["east"])
    answer = hospital.present(scenario.study, RollCall(scenario.study.digest, "run"))
    assert "mixes the patients" in answer.refusal
    hospital.close()


@pytest.mark.benchmark
@pytest.mark.parametrize(("private", "floor"), [(True, 0.75), (False, 0.85)])
def test_a_classifier_taught_by_the_shipped_studys_films_reads_real_ones(private: bool, floor: float, tmp_path: Path):
    if "WARDROUND_DATA" not in os.environ:
        pytest.skip("WARDROUND_DATA, the folder of public data, is not set")
    study = str(STUDIES / "image-synthesis.toml")
    run(Request(study=study, without_privacy=not private, seeds=3, baselines=False, out=tmp_path, quiet=True))
    report = Report.model_validate_json((tmp_path / "image-synthesis" / "report.json").read_text())
    assert report.seeds is not None
    mean = report.seeds.federated["auroc"].mean
    assert mean is not None
    assert mean >= floor
