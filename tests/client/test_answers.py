"""A kept answer is given again to the very same round, bit for bit, and to nothing else; what is damaged is no answer."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from rosters import a_stranger
from wardround.client.network import answers as module
from wardround.client.network.answers import Answers
from wardround.common.contents import content_digest
from wardround.common.seals import Order
from wardround.common.trust.signing import Signed
from wardround.common.weights import pack

COORDINATOR = a_stranger("coordinator")
STUDY, RUN = "a" * 64, "b" * 16


def manifest(model: str = "x") -> Signed:
    return COORDINATOR.sign("model", {"tensors": [[model]]})


FIRST = manifest()


def order(
    round: int = 1, attempt: int = 1, model: Signed | None = FIRST, *, study: str = STUDY, run: str = RUN, action: str = "train"
) -> Order:
    signed = COORDINATOR.sign("order", {"study": study, "action": action})
    return Order(signed, RecordDict(), model, run, round, attempt)


def content(value: float = 1.5) -> RecordDict:
    tensors = {"w": torch.full((2, 3), value), "b": torch.zeros(0), "s": torch.tensor(value)}
    facts = ConfigRecord({"round": 1, "site": "va", "steps": 2.5, "ok": True})
    return RecordDict({"facts": facts, "model": pack(tensors)})


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    return Answers(tmp_path / "answers")


def test_the_same_round_gets_the_same_bits(answers: Answers, tmp_path: Path):
    answers.keep(order(), content())
    found = Answers(tmp_path / "answers").again(order())
    assert found is not None
    assert content_digest(found) == content_digest(content())


@pytest.mark.parametrize("other", [
    order(2), order(1, 2), order(1, 1, manifest("another")), order(study="c" * 64), order(run="d" * 16),
    order(action="evaluate"), order(action="query", model=None), order(study=STUDY[:32] + "c" * 32),
], ids=["round", "attempt", "model", "study", "run", "look", "question", "study with the same file"])  # fmt: skip
def test_nothing_else_does(answers: Answers, other: Order):
    answers.keep(order(), content())
    assert answers.again(other) is None


@pytest.mark.parametrize("other", [order(action="evaluate"), order(action="query", model=None)], ids=["look", "question"])
def test_what_was_no_training_is_not_kept(answers: Answers, tmp_path: Path, other: Order):
    answers.keep(other, content())
    assert list((tmp_path / "answers").iterdir()) == []


def test_only_the_newest_of_a_study_is_kept(answers: Answers, tmp_path: Path):
    answers.keep(order(1), content(1.0))
    answers.keep(order(2), content(2.0))
    answers.keep(order(1, study="c" * 64), content(3.0))
    assert answers.again(order(1)) is None
    assert len(list((tmp_path / "answers").iterdir())) == 2


def test_nobody_else_can_read_it(answers: Answers, tmp_path: Path):
    answers.keep(order(), content())
    (file,) = (tmp_path / "answers").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_file_that_was_cut_or_changed_is_no_answer_and_no_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = tmp_path_factory.mktemp("answers")
    answers = Answers(folder)
    answers.keep(order(), content())
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert answers.again(order()) is None
    at = data.draw(st.integers(0, 26))  # in the magic or the length of what follows
    file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :])
    assert answers.again(order()) is None


def test_a_bit_that_fell_over_is_no_answer(answers: Answers, tmp_path: Path):
    answers.keep(order(), content())
    (file,) = (tmp_path / "answers").iterdir()
    whole = file.read_bytes()
    for at in (-1, -200, whole.index(b'"va"') + 1):
        changed = bytearray(whole)
        changed[at] ^= 1
        file.write_bytes(bytes(changed))
        assert answers.again(order()) is None


def test_a_folder_without_an_answer_has_none(answers: Answers):
    assert answers.again(order()) is None


def test_what_cannot_be_kept_whole_is_not_given_again_in_part(answers: Answers):
    answers.keep(order(), RecordDict({"m": MetricRecord({"loss": 0.5}), **content()}))
    assert answers.again(order()) is None


def test_an_answer_that_cannot_be_kept_leaves_all_the_same(
    answers: Answers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(*given: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "replace_atomically", full)
    answers.keep(order(), content())  # its cost is in the ledger already: a refusal would waste it
    assert "an answer is not kept: No space left on device" in caplog.text
    assert answers.again(order()) is None
