"""Whoever was drawn, gradients are computed in pieces of one shape, and no chosen model makes one patient show."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nets import Net
from nets import losses as loss
from wardround.client.dp import clipped_sum
from wardround.client.dp.engine import Engine, Sums, engine_of
from wardround.client.dp.pieces import Piece, pieces
from wardround.client.dp.sizes import Sizes
from wardround.client.dp.taps import Taps, Untappable
from wardround.common.tasks import TASKS, Records
from wardround.common.weights import trainable


def some(width: int, patient: list[int]) -> Records:
    table = torch.randn(len(patient), width, generator=torch.Generator().manual_seed(7))
    return Records({"table": table}, torch.arange(len(patient)) % 2, torch.tensor(patient))


def moved(model: nn.Module, weights: dict[str, Tensor], fewer: Records, more: Records, clip_norm: float) -> float:
    one, other = (clipped_sum(model, loss, weights, records, clip_norm=clip_norm) for records in (fewer, more))
    return float(torch.stack([(one[name] - other[name]).square().sum() for name in one]).sum().sqrt())


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 32, 33, 64, 100])
def test_a_piece_has_a_public_size_and_its_blank_records_count_for_nothing(count: int):
    cut = list(pieces(some(4, list(range(count))), Sizes((16, 20, 32), lambda _: True), at_most=1))
    assert {len(piece.records) for piece in cut} <= {16, 20, 32}
    assert [len(piece.records) for piece in cut[:-1]] == [32] * (len(cut) - 1)
    assert sum(int(piece.counts.sum()) for piece in cut) == count
    for piece in cut:
        blank = ~piece.counts[piece.records.patient]
        assert not piece.records.fields["table"][blank].any()
        assert piece.counts.tolist() == sorted(piece.counts.tolist(), reverse=True)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 9))
def test_pieces_hold_every_record_once_and_no_patient_is_cut(sizes: list[int], seed: int):
    patient = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    patient = patient[torch.randperm(len(patient), generator=torch.Generator().manual_seed(seed))]
    table = torch.stack([patient.float(), torch.arange(len(patient)).float()], 1)
    batch = Records({"table": table}, torch.zeros(len(patient), dtype=torch.int64), patient)
    met: list[tuple[int, list[int]]] = []
    for piece in pieces(batch, Sizes((9, 12), lambda _: True), at_most=9):
        for number in range(piece.records.patients):
            rows = piece.records.fields["table"][piece.records.patient == number]
            if piece.counts[number]:
                assert len(set(rows[:, 0].tolist())) == 1
                met.append((int(rows[0, 0]), sorted(rows[:, 1].long().tolist())))
    assert sorted(met) == [(p, torch.nonzero(patient == p).flatten().tolist()) for p in range(len(sizes))]


@pytest.mark.parametrize("task", ["heart-disease", "chest-xray"])
def test_a_records_numbers_are_the_same_bits_in_every_size(task: str):
    model = TASKS[task].model({}, seed=1)
    like = some(24, [0]) if task == "heart-disease" else Records({"image": torch.zeros(1, 1, 28, 28)}, *_one())
    engine = engine_of(model, loss, like)
    assert engine.in_one_pass
    for count in (1, 16, 17, 33, engine.sizes.largest):
        assert count <= engine.sizes.fit(count) <= engine.sizes.largest
        assert engine.sizes.fit(count) >= 16, "small batches take other kernels"


def test_a_size_in_which_numbers_have_other_bits_is_passed_over():
    class ByCount(nn.Module):
        """Rounds differently in small batches, as kernels do."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 2)

        def forward(self, table: Tensor) -> Tensor:
            logits: Tensor = self.layer(table)
            return logits if len(table) > 30 else logits * (1 + 2**-23)

    sizes = Sizes.of(ByCount(), loss, some(24, [0]))
    assert [sizes.fit(count) for count in (1, 16, 20, 30, 31, 33)] == [32, 32, 32, 32, 32, 36]

    class ByPlace(ByCount):
        def forward(self, table: Tensor) -> Tensor:
            logits: Tensor = self.layer(table)
            return logits * (1 + 2**-23 * (torch.arange(len(table)) % 2)[:, None])

    with pytest.raises(Untappable, match="place in a batch"):
        Sizes.of(ByPlace(), loss, some(24, [0]))
    engine = engine_of(ByPlace(), loss, some(24, [0]))
    assert not engine.in_one_pass
    assert engine.sizes.largest == 1


@pytest.mark.parametrize("size", [65, 101, 103])
def test_a_piece_for_many_records_of_a_patient_is_proved_too(size: int):
    """A kernel for matrices with one column gives the last rows of some sizes other bits; 2^30 times them is a sign."""
    net = Net(nn.Linear(64, 1), nn.Tanh(), nn.Linear(1, 2))
    sizes = engine_of(net, loss, some(64, [0])).sizes.at_least(size)
    if sizes is None:
        return  # such a network goes record by record
    assert sizes.largest % 16 == 0
    row, weight = torch.randn(64), torch.randn(1, 64)
    y = F.linear(row.expand(sizes.largest, 64).contiguous(), weight)
    assert bool((y == y[0]).all())


def _one() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(("fewer", "more"), [(3, 4), (15, 16), (16, 17), (31, 32), (32, 33), (66, 67)])
def test_a_model_chosen_for_its_rounding_does_not_show_who_else_is_there(fewer: int, more: int):
    """Huge weights in the null space of some patients leave only rounding; another patient must not change how it falls."""
    records, net = some(24, list(range(70))), Net(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 2))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(16, 24, generator=generator, dtype=torch.float64)
        known = records.fields["table"][:3].double()
        rows -= rows @ torch.linalg.pinv(known) @ known
        head = torch.randn(2, 16, generator=generator) / 4
        weights = trainable(net) | {"layers.0.weight": (1e7 * rows).float(), "layers.2.weight": head}
        few, many = (records.take(torch.arange(n)) for n in (fewer, more))
        assert moved(net, weights, few, many, 0.5) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e19, 3e19, 1e30, 1e38])
@pytest.mark.parametrize("clip_norm", [1e-6, 1.0])
def test_weights_at_the_ends_of_float32_do_not_make_one_patient_weigh_more(scale: float, clip_norm: float):
    task = TASKS["heart-disease"]
    model = task.model({"hidden": [16]}, seed=1)
    records = some(24, list(range(65)))
    for name in ("layers.0.weight", "layers.2.weight", "layers.2.bias"):
        weights = {n: w.clone() for n, w in trainable(model).items()}
        weights[name] = weights[name].sign() * scale
        for count in (15, 19, 31, 32, 64):
            few, many = (records.take(torch.arange(n)) for n in (count, count + 1))
            assert moved(model, weights, few, many, clip_norm) <= clip_norm * (1 + 1e-6)


def test_a_patient_whose_gradient_is_not_finite_counts_as_zero_and_spoils_nobody():
    net, records = Net(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)), some(5, list(range(8)))
    weights = {name: w.clone() for name, w in trainable(net).items()}
    spoilt = records.fields["table"].clone()
    spoilt[3] = torch.inf
    found = clipped_sum(net, loss, weights, Records({"table": spoilt}, records.label, records.patient), clip_norm=0.5)
    others = records.of_patients(torch.arange(8) != 3)
    for name, expected in clipped_sum(net, loss, weights, others, clip_norm=0.5).items():
        torch.testing.assert_close(found[name], expected)


def test_more_records_of_a_patient_than_announced_are_refused():
    net = Net(nn.Linear(5, 2))
    weights = {name: w.clone() for name, w in trainable(net).items()}
    for bound in (1, 63):
        with pytest.raises(ValueError, match=f"more than {bound} records"):
            clipped_sum(net, loss, weights, some(5, [0] * 64), clip_norm=0.5, records_per_patient=bound)
    clipped_sum(net, loss, weights, some(5, [0] * 64), clip_norm=0.5, records_per_patient=64)


# --- memory ---------------------------------------------------------------------------------------------------------------


def small_memory(monkeypatch: pytest.MonkeyPatch, room: int) -> list[int]:
    """A device with room for pieces of up to `room` records, whose second piece fails; sizes of those that were done."""
    done: list[int] = []
    real = Engine._piece

    def piece(engine: Engine, taps: Taps, weights: Mapping[str, Tensor], piece: Piece, clip_norm: float) -> Sums:
        if len(piece.records) > room and done:
            raise torch.OutOfMemoryError("made up")
        done.append(len(piece.records))
        return real(engine, taps, weights, piece, clip_norm)

    monkeypatch.setattr(Engine, "_piece", piece)
    return done


@pytest.mark.parametrize("part", [2, 4])
def test_where_memory_runs_out_smaller_pieces_give_the_same_sum(monkeypatch: pytest.MonkeyPatch, part: int):
    records, twins = some(24, list(range(100))), [Net(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 2)) for _ in range(2)]
    weights = trainable(twins[0])
    expected = clipped_sum(twins[0], loss, weights, records, clip_norm=0.5)
    room = engine_of(twins[1], loss, records).sizes.largest // part
    done = small_memory(monkeypatch, room)
    found = clipped_sum(twins[1], loss, weights, records, clip_norm=0.5)
    assert done[0] > room, "a piece was added up before memory ran out"
    assert 1 < engine_of(twins[1], loss, records).sizes.largest <= room
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    done.clear()
    clipped_sum(twins[1], loss, weights, records, clip_norm=0.5)
    assert 1 < max(done) <= room, "the next step does not try again what did not fit"


def test_where_no_piece_fits_into_memory_gradients_come_record_by_record(monkeypatch: pytest.MonkeyPatch):
    records, net = some(24, list(range(20))), Net(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 2))
    weights = trainable(net)
    expected = clipped_sum(net, loss, weights, records, clip_norm=0.5)
    small_memory(monkeypatch, 0).append(0)
    for name, found in clipped_sum(net, loss, weights, records, clip_norm=0.5).items():
        torch.testing.assert_close(found.float(), expected[name])
    assert engine_of(net, loss, records).sizes.largest == 1


# --- a patient is the mean of its records ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("views", [2, 5])
def test_views_of_a_patients_records_cost_no_privacy(views: int, dtype: torch.dtype):
    """The same record `views` times is the same mean, and so the same share of the sum."""
    net = Net(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)
    once = some(24, [0, 1, 1, 2, 3, 3, 3, 4])
    once = Records({"table": once.fields["table"].to(dtype)}, once.label, once.patient)
    many = once.take(torch.arange(8).repeat(views))
    for clip_norm in (0.1, 100.0):
        expected = clipped_sum(net, loss, trainable(net), once, clip_norm=clip_norm)
        for name, found in clipped_sum(net, loss, trainable(net), many, clip_norm=clip_norm).items():
            torch.testing.assert_close(found, expected[name])


@pytest.mark.parametrize("views", [1, 2, 5])
def test_however_many_views_a_patient_moves_the_sum_by_at_most_the_clip_norm(views: int):
    net = Net(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 2))
    images = some(24, list(range(6)))
    drawn = torch.Generator().manual_seed(9)
    table = 100 * torch.cat([images.fields["table"] + torch.randn(6, 24, generator=drawn) / 4 for _ in range(views)])
    records = Records({"table": table}, images.label.repeat(views), images.patient.repeat(views))
    for left_out in range(6):
        rest = records.of_patients(torch.arange(6) != left_out)
        assert moved(net, trainable(net), rest, records, 0.05) <= 0.05 * (1 + 1e-6)
