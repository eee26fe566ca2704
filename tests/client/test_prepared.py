"""Prepared records: what was written is what is read, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from wardround.client.data import load, open_records
from wardround.client.data.loaded import Loaded
from wardround.client.data.prepared import save_prepared
from wardround.client.policy import DataSource
from wardround.common.errors import ConfigError, DataRefused
from wardround.common.tasks import TASKS, Records

TASK = TASKS["heart-disease"]
WIDTH = TASK.blank(1).fields["table"].shape[1]


def some(patient: list[int], owner: list[str] | None = None, held_out: list[bool] | None = None) -> Loaded:
    generator = torch.Generator().manual_seed(len(patient))
    records = Records(
        {"table": torch.randn(len(patient), WIDTH, generator=generator)}, torch.tensor(patient) % 2, torch.tensor(patient)
    )
    return Loaded(records, owner, None if held_out is None else torch.tensor(held_out))


def source(path: Path, **more: Any) -> DataSource:
    return DataSource(loader="prepared", path=path, **more)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=6), owned=st.booleans(), split=st.booleans())
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, counts: list[int], owned: bool, split: bool):
    patient = [number for number, count in enumerate(counts) for _ in range(count)]
    loaded = some(patient, [f"né {p}" for p in patient] if owned else None, [p % 3 == 0 for p in patient] if split else None)
    path = tmp_path_factory.mktemp("prepared") / "records.safetensors"
    save_prepared(path, loaded)
    found = load(source(path), TASK)
    assert found.owner == loaded.owner
    assert torch.equal(found.records.fields["table"], loaded.records.fields["table"])
    assert torch.equal(found.records.label, loaded.records.label)
    assert torch.equal(found.records.patient, loaded.records.patient)
    if split:
        training, held_out = open_records(source(path), TASK)
        assert held_out.patients == sum(p % 3 == 0 for p in range(len(counts)))
        assert training.patients == len(counts) - held_out.patients


def test_a_split_of_the_files_leaves_no_room_for_another(tmp_path: Path):
    save_prepared(tmp_path / "r", some([0, 1], held_out=[True, False]))
    with pytest.raises(ConfigError, match=r"brings its own held-out records; holdout = 0\.5 must be left out"):
        open_records(source(tmp_path / "r", holdout=0.5), TASK)


def test_a_patient_on_both_sides_of_the_files_split_is_refused(tmp_path: Path):
    save_prepared(tmp_path / "r", some([0, 0, 1], held_out=[True, False, False]))
    with pytest.raises(DataRefused, match="in training and held out at once"):
        open_records(source(tmp_path / "r"), TASK)


def spoil(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(path), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"label": None}, "another task"),
        ({"field.image": torch.zeros(3, 1)}, "another task"),
        ({"field.table": torch.zeros(3, WIDTH + 1)}, "another task"),
        ({"field.table": torch.zeros(3, WIDTH, dtype=torch.float64)}, "another task"),
        ({"field.table": torch.full((3, WIDTH), torch.nan)}, "contradict themselves"),
        ({"label": torch.tensor([0, 1, 2])}, "contradict themselves"),
        ({"patient": torch.tensor([0, 2, 1000])}, "contradict themselves"),
        ({"patient": torch.tensor([-1, 0, 1])}, "contradict themselves"),
        ({"held_out": torch.tensor([True])}, "contradict themselves"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, changes: dict[str, torch.Tensor | None], complaint: str):
    save_prepared(tmp_path / "r", some([0, 1, 1]))
    spoil(tmp_path / "r", **changes)
    with pytest.raises(DataRefused, match=complaint) as refusal:
        load(source(tmp_path / "r"), TASK)
    assert str(tmp_path) not in str(refusal.value)
    assert str(tmp_path) in refusal.value.detail


@pytest.mark.parametrize(
    ("task", "name", "value"),
    [
        ("splice-junctions", "field.tokens", -1),
        ("splice-junctions", "field.tokens", TASKS["splice-junctions"].schema.codes),  # type: ignore[attr-defined]
        ("news-topics", "field.tokens", -1),
        ("news-topics", "field.tokens", TASKS["news-topics"].schema.codes),  # type: ignore[attr-defined]
        ("chest-phantom-detection", "label", -0.25),
        ("chest-phantom-detection", "label", 1.25),
        ("chest-phantom-detection", "label", torch.nan),
        ("chest-phantom-segmentation", "label", -1),
    ],
)
def test_tokens_and_labels_out_of_range_are_refused(tmp_path: Path, task: str, name: str, value: float):
    save_prepared(tmp_path / "r", Loaded(TASKS[task].blank(3)))
    assert len(load(source(tmp_path / "r"), TASKS[task]).records) == 3
    wrong = load_file(tmp_path / "r")[name]
    wrong.view(-1)[-1] = value
    spoil(tmp_path / "r", **{name: wrong})
    with pytest.raises(DataRefused, match="contradict themselves"):
        load(source(tmp_path / "r"), TASKS[task])


@pytest.mark.parametrize("owner", [["a", "a", "a"], ["a", "b"], ["a", "b", "c"], ["a", "", "b"], "abc", ["a", 1, 2]])
def test_owners_that_are_not_the_patients_are_refused(tmp_path: Path, owner: object):
    save_prepared(tmp_path / "r", some([0, 1, 1]))
    save_file(load_file(tmp_path / "r"), tmp_path / "r", metadata={"owner": json.dumps(owner)})
    with pytest.raises(DataRefused, match="contradict themselves"):
        load(source(tmp_path / "r"), TASK)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(at=st.integers(0, 10**6), cut=st.booleans())
def test_a_damaged_file_is_refused_or_still_whole(tmp_path_factory: pytest.TempPathFactory, at: int, cut: bool):
    path = tmp_path_factory.mktemp("damaged") / "r"
    save_prepared(path, some([0, 1, 1], ["x", "y", "y"]))
    content = bytearray(path.read_bytes())
    at %= len(content)
    if cut:
        del content[at:]
    else:
        content[at] ^= 0x55
    path.write_bytes(content)
    try:
        found = load(source(path), TASK)
    except DataRefused:
        return
    assert found.records.fields["table"].shape == (3, WIDTH)


def test_no_file_is_refused(tmp_path: Path):
    with pytest.raises(DataRefused, match="cannot be read"):
        load(source(tmp_path / "none"), TASK)


def test_two_hospitals_patients_stay_apart_whatever_their_ids():
    both = some([0, 1], ["7", "8"], [True, False]) + some([0, 0], ["7", "7"], [False, False])
    assert both.owner == ["0/7", "0/8", "1/7", "1/7"]
    assert both.records.patient.tolist() == [0, 1, 2, 2]
    assert both.held_out is not None
    assert both.held_out.tolist() == [True, False, False, False]
    assert (some([0], ["a"]) + some([0])).owner is None
