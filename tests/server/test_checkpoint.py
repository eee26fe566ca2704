"""A checkpoint is whole, or it is not there."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import resource
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.errors import CheckpointBroken
from wardround.common.key_sources import new_key_file
from wardround.common.plan import StudyPlan
from wardround.common.vault import Vault
from wardround.server import checkpoint
from wardround.server.app import write_model
from wardround.server.checkpoint import Progress, RoundRecord

STUDY = "a" * 64


def at(round: int, study: str = STUDY) -> Progress:
    random = torch.Generator().manual_seed(round)
    weights = {"layers.0.weight": torch.randn(4, 3, generator=random), "scale": torch.randn((), generator=random)}
    record = RoundRecord(round, 1, 0.25, ["va"], {"cork": 'æøå "quoted"'}, False, 1.5, {"auroc": 0.8}, {"va": round})
    return Progress(study, "b" * 16, round, weights, {"m/scale": torch.ones(())}, {"va": "c" * 64}, 1, [record] * round)


def equal(a: Progress, b: Progress) -> bool:
    plain = all(
        getattr(a, f.name) == getattr(b, f.name) for f in dataclasses.fields(Progress) if f.name not in ("weights", "state")
    )
    return plain and all(
        x.keys() == y.keys() and all(x[n].shape == y[n].shape and torch.equal(x[n], y[n]) for n in x)
        for x, y in ((a.weights, b.weights), (a.state, b.state))
    )


def test_what_was_saved_is_what_is_found(tmp_path: Path):
    assert Progress.latest(tmp_path / "nowhere", study=STUDY) is None
    for round in (0, 1, 2):
        at(round).save(tmp_path)
        found = Progress.latest(tmp_path, study=STUDY)
        assert found is not None
        assert equal(found, at(round))


def test_the_two_newest_files_are_kept_and_no_draft(tmp_path: Path):
    for round in range(12):
        at(round).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000010.safetensors", "round-000011.safetensors"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, bytes]:
    """Two checkpoints in one folder, and what they hold."""
    folder = tmp_path_factory.mktemp("run")
    at(1).save(folder)
    at(2).save(folder)
    return {path: path.read_bytes() for path in sorted(folder.iterdir())}


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_one_changed_byte_anywhere_and_the_file_before_is_used(two: dict[Path, bytes], place: int, by: int):
    for path, content in two.items():
        path.write_bytes(content)
    folder = next(iter(two)).parent
    spoil(folder / "round-000002.safetensors", place, by)
    found = Progress.latest(folder, study=STUDY)
    assert found is not None
    assert equal(found, at(1))
    spoil(folder / "round-000001.safetensors", place, by)
    with pytest.raises(CheckpointBroken, match="none of the 2 checkpoints is whole"):
        Progress.latest(folder, study=STUDY)


def spoil(path: Path, place: int, by: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] = (data[place % len(data)] + by) % 256
    path.write_bytes(data)


@pytest.mark.parametrize("cut", [0, 1, 31, 32, 33, 100, -1])
def test_a_file_that_was_cut_off_is_not_whole(tmp_path: Path, cut: int):
    at(1).save(tmp_path)
    path = tmp_path / "round-000001.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointBroken, match="none of the 1 checkpoints is whole"):
        Progress.latest(tmp_path, study=STUDY)


def test_a_checkpoint_of_another_study_is_refused(tmp_path: Path):
    at(1).save(tmp_path)
    at(2, "f" * 64).save(tmp_path)
    with pytest.raises(CheckpointBroken, match=r"round-000002\.safetensors belongs to another study plan"):
        Progress.latest(tmp_path, study=STUDY)


FOREIGN = {
    "nothing": b"",
    "a pickle": b"\x80\x04cposix\nsystem\n.",
    "a header of 2^64 bytes": b"\xff" * 64,
    "no progress": safetensors.serialize({}, {}),
    "progress without keys": safetensors.serialize({}, {"progress": "{}"}),
    "a round of another version": safetensors.serialize({}, {"progress": '{"history": [{}]}'}),
}


@pytest.mark.parametrize("body", FOREIGN.values(), ids=FOREIGN)
def test_a_well_sealed_file_of_another_kind_is_refused(tmp_path: Path, body: bytes):
    (tmp_path / "round-000001.safetensors").write_bytes(body + hashlib.sha256(body).digest())
    with pytest.raises(CheckpointBroken):
        Progress.latest(tmp_path, study=STUDY)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path):
    at(1).save(tmp_path)
    for name in (".round-000009.safetensors.draft", "round-9.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"half")
    found = Progress.latest(tmp_path, study=STUDY)
    assert found is not None
    assert found.round == 1


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_failure_at_any_step_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    at(1).save(tmp_path)

    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    target = {"fsync": (os, "fsync"), "replace": (Path, "replace"), "open": (os, "open")}[step]
    with monkeypatch.context() as broken:
        broken.setattr(*target, fails)
        with pytest.raises(OSError, match="Input/output error"):
            at(2).save(tmp_path)
    found = Progress.latest(tmp_path, study=STUDY)
    assert found is not None
    assert equal(found, at(1))
    assert [p.name for p in tmp_path.iterdir()] == ["round-000001.safetensors"]


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (steps.append("name"), replace(a, b))[1])
    at(1).save(tmp_path)
    assert steps == ["sync", "name", "sync"]


def test_a_disk_that_fills_up_leaves_the_earlier_file(tmp_path: Path):
    at(1).save(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))  # Python ignores the signal that goes with it
    try:
        with pytest.raises(OSError, match="File too large"):
            at(2).save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = Progress.latest(tmp_path, study=STUDY)
    assert found is not None
    assert equal(found, at(1))


def test_nothing_in_a_checkpoint_is_pickled():
    assert "pickle" not in Path(checkpoint.__file__).read_text().replace("without pickle", "")
    assert "torch.load" not in Path(checkpoint.__file__).read_text().replace("safetensors.torch.load", "")


# ---- sealed


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    new_key_file(tmp_path / "vault.key")
    return Vault.open(str(tmp_path / "vault.key"))


def test_a_sealed_checkpoint_is_found_by_its_key_and_says_nothing_without(tmp_path: Path, vault: Vault):
    folder = tmp_path / "run"
    for round in range(4):
        at(round).save(folder, vault)
        found = Progress.latest(folder, study=STUDY, vault=vault)
        assert found is not None
        assert equal(found, at(round))
    assert sorted(p.name for p in folder.iterdir()) == ["round-000002.sealed", "round-000003.sealed"]
    for word in (b"weights", b"cork", STUDY.encode()):
        assert word not in (folder / "round-000003.sealed").read_bytes()
    new_key_file(tmp_path / "other.key")
    with pytest.raises(
        CheckpointBroken, match=r"none of the 2 checkpoints is whole \(round-000002\.sealed is sealed with another"
    ):
        Progress.latest(folder, study=STUDY, vault=Vault.open(str(tmp_path / "other.key")))


HARM = {
    "a flipped bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "a flipped bit of the header": lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
    "a cut": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\0",
    "nothing left": lambda data: b"",
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_if_the_newest_sealed_file_is_damaged_the_one_before_is_used(tmp_path: Path, vault: Vault, harm):
    for round in (1, 2):
        at(round).save(tmp_path, vault)
    newest, before = tmp_path / "round-000002.sealed", tmp_path / "round-000001.sealed"
    newest.write_bytes(harm(newest.read_bytes()))
    found = Progress.latest(tmp_path, study=STUDY, vault=vault)
    assert found is not None
    assert equal(found, at(1))
    before.write_bytes(harm(before.read_bytes()))
    with pytest.raises(CheckpointBroken, match="none of the 2 checkpoints is whole"):
        Progress.latest(tmp_path, study=STUDY, vault=vault)


def test_an_older_checkpoint_under_a_newer_name_is_refused(tmp_path: Path, vault: Vault):
    at(1).save(tmp_path, vault)
    (tmp_path / "round-000001.sealed").rename(tmp_path / "round-000009.sealed")
    with pytest.raises(CheckpointBroken, match=r"is sealed as 'round-000001\.sealed', not as 'round-000009\.sealed'"):
        Progress.latest(tmp_path, study=STUDY, vault=vault)


def test_a_sealed_checkpoint_of_another_study_is_refused(tmp_path: Path, vault: Vault):
    at(1, "f" * 64).save(tmp_path, vault)
    with pytest.raises(CheckpointBroken, match=r"round-000001\.sealed belongs to another study plan"):
        Progress.latest(tmp_path, study=STUDY, vault=vault)


def test_plain_and_sealed_checkpoints_are_not_taken_for_one_another(tmp_path: Path, vault: Vault):
    at(1).save(tmp_path)
    with pytest.raises(CheckpointBroken, match=r"round-000001\.safetensors is not sealed"):
        Progress.latest(tmp_path, study=STUDY, vault=vault)
    (tmp_path / "round-000001.safetensors").unlink()
    at(1).save(tmp_path, vault)
    with pytest.raises(CheckpointBroken, match=r"round-000001\.sealed is sealed, and no key was given"):
        Progress.latest(tmp_path, study=STUDY)


def test_the_released_model_is_sealed_too(tmp_path: Path, vault: Vault, study_file: Path):
    plan = StudyPlan.parse(study_file.read_text())
    write_model(tmp_path, plan, at(1))
    plain = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    write_model(tmp_path, plan, at(1), vault)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.sealed", "vault.key"]
    assert vault.read(tmp_path / "model.sealed", label="model.sealed") == plain
