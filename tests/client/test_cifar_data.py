"""CIFAR's binary files: a picture is read as it was written, and a pickle is never opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wardround.client.data import LOADERS, open_records
from wardround.client.data.cifar import load_cifar
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import TASKS

TASK = TASKS["colour-images"]
TRAP = b"cposix\nsystem\n(S'touch TRAPPED'\ntR."  # a pickle that runs a command when it is opened


def rows(labels: list[int], seed: int = 0) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    found = random.integers(0, 256, (len(labels), 3073), dtype=np.uint8)
    found[:, 0] = labels
    return found


def folder(place: Path, **files: bytes | NDArray[np.uint8]) -> DataSource:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.tobytes()
        (place / name.replace("__", ".")).write_bytes(data)
    return DataSource(loader="cifar", path=place)


def test_the_loader_is_registered():
    assert LOADERS["cifar"].load is load_cifar


def test_red_lies_before_green_before_blue_row_by_row(tmp_path: Path):
    one = np.zeros((1, 3073), dtype=np.uint8)
    one[0, 0] = 7
    one[0, 1 + 5 * 32 + 3] = 255  # red, row 5, column 3
    one[0, 1 + 1024] = 255  # green, upper left
    one[0, 1 + 2048 + 1023] = 255  # blue, lower right
    records = load_cifar(folder(tmp_path, data_batch_1__bin=one), TASK).records
    assert records.label.tolist() == [7]
    lit = {tuple(place) for place in (records.fields["image"][0] == 1).nonzero().tolist()}
    assert lit == {(0, 5, 3), (1, 0, 0), (2, 31, 31)}


def test_the_test_batch_is_held_out_and_every_picture_is_a_patient(tmp_path: Path):
    source = folder(tmp_path, data_batch_1__bin=rows([1, 2]), data_batch_2__bin=rows([3], 1), test_batch__bin=rows([4, 5], 2))
    loaded = load_cifar(source, TASK)
    assert loaded.records.label.tolist() == [1, 2, 3, 4, 5]
    assert loaded.records.patients == 5
    assert loaded.owner is None
    training, held_out = open_records(source, TASK)
    assert training.label.tolist() == [1, 2, 3]
    assert held_out.label.tolist() == [4, 5]


def test_without_a_test_batch_nothing_is_held_out(tmp_path: Path):
    assert load_cifar(folder(tmp_path, data_batch_1__bin=rows([1])), TASK).held_out is None


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_1__bin"])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    source = folder(tmp_path, **{name: TRAP})
    with pytest.raises(DataRefused) as found:
        load_cifar(source, TASK)
    assert str(tmp_path) not in str(found.value)
    assert str(tmp_path) in found.value.detail
    assert not (tmp_path / "TRAPPED").exists()


def test_the_refusal_of_pickles_says_what_to_get_instead(tmp_path: Path):
    with pytest.raises(DataRefused, match="pickle") as found:
        load_cifar(folder(tmp_path, data_batch_1=TRAP, test_batch=TRAP), TASK)
    assert "binary version" in found.value.detail


@pytest.mark.parametrize(("content", "text"), [
    (b"", "not whole pictures"), (rows([1]).tobytes()[:-1], "not whole pictures"), (rows([1, 10]).tobytes(), "from 0 to 9"),
], ids=["empty", "cut", "an eleventh class"])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, content: bytes, text: str):
    with pytest.raises(DataRefused, match=text) as found:
        load_cifar(folder(tmp_path, data_batch_1__bin=content), TASK)
    assert "data_batch_1.bin" in found.value.detail
    assert "10" not in str(found.value)


def test_a_folder_without_pictures_is_refused(tmp_path: Path):
    with pytest.raises(DataRefused, match="there are no pictures"):
        load_cifar(DataSource(loader="cifar", path=tmp_path), TASK)
    with pytest.raises(DataRefused, match="folder is not there"):
        load_cifar(DataSource(loader="cifar", path=tmp_path / "elsewhere"), TASK)


def test_what_the_files_do_not_hold_is_refused(tmp_path: Path):
    source = folder(tmp_path, data_batch_1__bin=rows([1]))
    with pytest.raises(DataRefused, match="no patients"):
        load_cifar(source.model_copy(update={"patient_column": "mrn"}), TASK)
    with pytest.raises(DataRefused, match="does not read classes of pictures"):
        load_cifar(source, TASKS["heart-disease"])
    with pytest.raises(DataRefused, match="does not read classes of pictures"):
        load_cifar(source, TASKS["chest-phantom-segmentation"])


@given(content=st.binary(max_size=200), whole=st.integers(0, 2))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_any_bytes_are_pictures_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, content: bytes, whole: int):
    place = tmp_path_factory.mktemp("any")
    try:
        loaded = load_cifar(folder(place, data_batch_1__bin=content + bytes(3073 * whole)), TASK)
    except DataRefused:
        return
    assert torch.isfinite(loaded.records.fields["image"]).all()
    assert len(loaded.records) == whole
