"""Studies of images: they learn, with privacy too, and the shipped recipes reach what is promised."""

from __future__ import annotations

import math
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from torch.nn import functional as F

from benchmarks.tasks import GOALS
from wardround.client.dp.engine import engine_of
from wardround.common.errors import ConfigError
from wardround.common.metrics import METRICS
from wardround.common.plan import SignedText
from wardround.common.tasks import TASKS, Records
from wardround.common.tasks.chest_phantom import box_scores, mask_loss
from wardround.common.weights import trainable
from wardround.simulations import STUDIES
from wardround.simulations.cohorts import COHORTS, Gathered, gather
from wardround.simulations.cohorts.chest_phantom import _read
from wardround.simulations.phantom import films
from wardround.simulations.run import simulate
from wardround.simulations.scenario import Changes, Scenario

DATA = os.environ.get("WARDROUND_DATA")
given = pytest.mark.skipif(DATA is None, reason="WARDROUND_DATA names no folder with the data sets that are not embedded")
PHANTOMS = ("chest-phantom", "chest-phantom-detection", "chest-phantom-segmentation")
SMALL: dict[str, dict[str, Any]] = {
    "chest-phantom": {"network": "cnn"},
    "chest-phantom-detection": {"width": 8, "depth": 2, "stride": 2},
    "chest-phantom-segmentation": {"width": 4, "depth": 2},
    "chest-xray": {"network": "cnn"},
    "colour-images": {"network": "two-conv-cnn"},
}


def some(name: str) -> Gathered:
    """Films of eight synthetic patients at each of two hospitals."""
    return _read({"alder": 8, "birch": 8}, Path(), TASKS[name])


def records_of(name: str) -> Records:
    if name in PHANTOMS:
        return some(name).loaded.records
    task, label = TASKS[name], torch.arange(24) % 2
    like = task.blank(24)
    bright = torch.rand(like.fields["image"].shape, generator=torch.Generator().manual_seed(1)) + label[:, None, None, None]
    return Records({"image": bright}, label, torch.arange(24))


@pytest.mark.parametrize("name", SMALL)
def test_a_small_training_learns(name: str):
    task, records = TASKS[name], records_of(name)
    model = task.model(SMALL[name], seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = task.loss(model(**records.fields), records.label).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert math.isfinite(METRICS[task.headline](task.scores(model, trainable(model), records)))


@pytest.mark.parametrize("name", [*SMALL, *(f"{name}-private" for name in PHANTOMS)])
def test_private_gradients_of_the_shipped_network_take_one_pass(name: str):
    plan = SignedText.load(STUDIES / f"{name}.toml").plan
    task = TASKS[plan.task]
    assert engine_of(task.model(plan.model, seed=0), task.loss, task.blank(2)).in_one_pass


@pytest.mark.parametrize("name", SMALL)
def test_a_network_of_another_task_is_refused(name: str):
    with pytest.raises(ConfigError, match="no network of this task is called 'mlp'"):
        TASKS[name].model({"network": "mlp"}, seed=0)


@pytest.mark.parametrize("name", PHANTOMS)
def test_films_of_a_patient_are_at_one_hospital_and_the_same_in_every_run(name: str):
    found, again = some(name), some(name)
    assert torch.equal(found.loaded.records.fields["image"], again.loaded.records.fields["image"])
    assert torch.equal(found.loaded.records.label, again.loaded.records.label)
    assert found.loaded.owner is not None
    assert len(found.loaded.owner) > found.loaded.records.patients  # some have several films
    assert all(owner.startswith(home) for owner, home in zip(found.loaded.owner, found.home, strict=True))


@pytest.mark.parametrize("name", PHANTOMS)
def test_a_phantom_says_that_it_is_synthetic(name: str):
    assert "synthetic" in TASKS[name].title
    assert "ynthetic" in SignedText.load(STUDIES / f"{name}.toml").plan.title
    assert "nobody's" in COHORTS[name].origin
    assert COHORTS[name].files == ()


@pytest.mark.parametrize("name", PHANTOMS)
def test_a_phantom_study_with_privacy_is_the_same_task_at_the_same_hospitals_within_epsilon_8(name: str):
    plain, private = (SignedText.load(STUDIES / f"{each}.toml").plan for each in (name, f"{name}-private"))
    assert (private.task, private.sites) == (plain.task, plain.sites)
    assert plain.privacy is None
    assert private.privacy is not None
    assert (private.privacy.epsilon, private.privacy.delta) == (8.0, 1e-5)
    assert private.local.steps == 1
    assert GOALS[name].private_study == private.name


def test_a_phantom_study_without_privacy_has_none_to_change(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no \[privacy\] section"):
        Scenario.prepare(STUDIES / "chest-phantom.toml", tmp_path / "run", Changes(epsilon=8.0))


def test_a_right_mask_costs_less_than_an_empty_one_and_an_empty_film_can_be_right():
    mask = torch.zeros(2, 8, 8, dtype=torch.int64)
    mask[0, 2:5, 2:5] = 1
    right = torch.stack([mask == 0, mask == 1], 1) * 40.0 - 20
    nothing = torch.stack([torch.full((2, 8, 8), 20.0), torch.full((2, 8, 8), -20.0)], 1)
    assert mask_loss(right, mask).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert mask_loss(nothing, mask)[0] > 1
    assert mask_loss(nothing, mask)[1] == pytest.approx(0, abs=1e-6)


def test_a_mask_says_where_the_lungs_are_and_where_in_them_the_lesions():
    drawn = films("alder", 8, seed=0, side=48)
    mask = some("chest-phantom-segmentation").loaded.records.label[: len(drawn.patient)].numpy()
    assert np.array_equal(mask > 0, drawn.lung == 1)
    assert np.array_equal(mask == 2, drawn.mask == 1)
    assert (mask == 2).any()


def test_a_missed_lesion_costs_as_much_as_a_missed_lung_however_small_it_is():
    mask = torch.zeros(1, 16, 16, dtype=torch.int64)
    mask[:, 2:14, 2:14] = 1
    mask[:, 5:8, 5:8] = 2
    right = F.one_hot(mask, 3).permute(0, 3, 1, 2) * 40.0
    overlooked = F.one_hot(mask.clamp(max=1), 3).permute(0, 3, 1, 2) * 40.0
    assert float(mask_loss(right, mask)) == pytest.approx(0, abs=1e-6)
    pixels = F.cross_entropy(overlooked, mask)
    assert float(mask_loss(overlooked, mask) - pixels) == pytest.approx(0.5, abs=0.1)  # half of what Dice is the mean of


def test_a_masks_loss_is_the_records_own():
    random = torch.Generator().manual_seed(1)
    logits, mask = torch.randn(3, 2, 8, 8, generator=random), torch.randint(0, 2, (3, 8, 8), generator=random)
    together = mask_loss(logits, mask)
    alone = torch.cat([mask_loss(logits[i : i + 1], mask[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone)


def test_padding_is_no_box():
    output = torch.full((1, 5, 4, 4), -20.0)
    output[0, 0, 1, 2] = 20.0  # a centre in row 1, column 2
    output[0, 1:, 1, 2] = torch.tensor([1.0, 1.0, 0.5, 0.5])
    boxes = torch.zeros(1, 3, 4)
    boxes[0, 0] = torch.tensor([2.5, 1.5, 1.0, 1.0]) / 4
    found = box_scores(output, boxes)
    assert found.true.tolist() == [1]
    assert METRICS["ap50"](found) == 1


# --- studies --------------------------------------------------------------------------------------------------------------


def colour_folder(place: Path) -> Path:
    """A made-up set in CIFAR's form: each class has a brightness of its own."""
    home = place / "cifar-10-batches-bin"
    home.mkdir()
    random = np.random.default_rng(0)
    for name, count in (("data_batch_1.bin", 300), ("test_batch.bin", 100)):
        rows = random.integers(0, 30, (count, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(count) % 10
        rows[:, 1:] += (rows[:, :1] * 22).astype(np.uint8)
        (home / name).write_bytes(rows.tobytes())
    return place


def run(place: Path, study: str, data: Path | None = None, **changes: Any) -> float:
    """The headline of a study of few rounds, changed as given: sections are merged, None leaves one out."""
    table = tomllib.loads((STUDIES / f"{study}.toml").read_text())
    for key, value in changes.items():
        if value is None:
            table.pop(key, None)
        else:
            table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) and key != "sites" else value
    file = place / "small.toml"
    file.write_text(tomli_w.dumps(table))
    report = simulate(Scenario.prepare(file, place / "run", Changes(), data), baselines=False)
    found = report.results.federated[report.headline].value
    assert found is not None
    return found


def test_colour_pictures_are_learnt_from_files_brought_along(tmp_path: Path):
    local = {"steps": 8, "learning_rate": 0.05, "batch_size": 20}
    sites = {f"site-{number}": 60 for number in range(1, 6)}
    changes = {"rounds": 3, "sites": sites, "model": {"network": "two-conv-cnn"}, "local": local}
    assert run(tmp_path, "colour-images", colour_folder(tmp_path), **changes) > 0.15


def test_colour_pictures_that_are_not_there_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WARDROUND_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"--data DIR.*cifar-10-batches-bin"):
        gather(COHORTS["colour-images"], TASKS["colour-images"], None)


@pytest.mark.slow
def test_lungs_are_outlined_under_privacy_in_few_rounds(tmp_path: Path):
    changes = {"rounds": 10, "model": {"width": 4, "depth": 2}, "local": None, "step": {"learning_rate": 0.02}}
    privacy = {"epsilon": 8.0, "sampling_rate": 0.25, "records_per_patient": 1}
    assert run(tmp_path, "chest-phantom-segmentation", **changes, privacy=privacy) > 0.3


@pytest.mark.benchmark
@pytest.mark.parametrize(("name", "private", "floor"), [
    ("chest-phantom-segmentation", False, 0.85),
    ("chest-phantom-detection", False, 0.8),
    pytest.param("chest-xray", True, 0.915, marks=given),  # 0.931 measured; the noise is new in every run
    ("chest-phantom", False, 0.94),
], ids=str)  # fmt: skip
def test_the_shipped_recipe_reaches_its_floor(name: str, private: bool, floor: float, tmp_path: Path):
    changes = Changes(without_privacy=not private)
    scenario = Scenario.prepare(STUDIES / f"{name}.toml", tmp_path / "run", changes, Path(DATA) if DATA else None)
    report = simulate(scenario, baselines=False)
    reached = report.results.federated[report.headline].value
    assert reached is not None
    assert reached >= floor  # one seed; benchmarks.tasks takes three
