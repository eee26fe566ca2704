"""Recurrent layers in one pass: the same gradients, record by record and patient by patient, as torch's own."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from wardround.client.dp.taps import Groups, Taps, Untappable
from wardround.client.dp.taps.kept import prefers_outer

ALONE = torch.arange(4)
TOGETHER = torch.tensor([0, 0, 1, 2])

KINDS: list[tuple[type[nn.RNNBase], dict[str, Any]]] = [
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}),
    (nn.RNN, {"bias": False, "num_layers": 2}),
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.LSTM, {"bias": False}),
    (nn.LSTM, {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
    (nn.GRU, {}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.GRU, {"bias": False}),
]


def number(y: Tensor) -> Tensor:
    """(records, ...) -> one number for each record, by a function that treats all entries differently."""
    flat = y.flatten(1)
    return (flat + torch.arange(flat.shape[1], dtype=y.dtype).sin()).pow(2).sum(1)


class Reader(nn.Module):
    """Sequences (records, time, 3) through a recurrent layer; outputs and last states are all in the loss."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(3, 4, **options)

    def states(self, x: Tensor) -> Any:
        """What the layer begins with."""
        return None

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """One number for each record."""
        given: Any = x if self.layer.batch_first else x.transpose(0, 1)
        if lengths is not None:
            given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, last = self.layer(given, self.states(x))
        if isinstance(y, PackedSequence):
            y, _ = pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])
        elif not self.layer.batch_first:
            y = y.transpose(0, 1)
        ends = last if isinstance(last, tuple) else (last,)
        return number(y) + sum(number(end.transpose(0, 1)) for end in ends)


class Begun(Reader):
    """The same, from states that another layer learns to choose."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__(kind, **options)
        self.choose = nn.Linear(3, 16)

    def states(self, x: Tensor) -> Any:
        """What the layer begins with."""
        count = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
        first = self.choose(x[:, 0]).view(len(x), -1, 4)[:, :count].transpose(0, 1)
        return (first, first.sin()) if isinstance(self.layer, nn.LSTM) else first


def one_pass(net: nn.Module, inputs: tuple[Tensor, ...], patient: Tensor) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Losses, squared lengths, and each patient's gradient."""
    groups = Groups.of(patient)
    taps = Taps.on(net)
    weights = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    with taps.installed(groups):
        losses = functional_call(net, weights, inputs)
        losses.sum().backward()
        with torch.no_grad():
            squares = taps.squares()
            one_hot = torch.eye(groups.patients, dtype=torch.float64)
            return losses.detach(), squares, [dict(taps.clipped(row)) for row in one_hot]


def agree(net: nn.Module, inputs: tuple[Tensor, ...], patient: Tensor) -> None:
    twin = copy.deepcopy(net)
    losses, squares, gradients = one_pass(net, inputs, patient)
    assert torch.allclose(losses, twin(*inputs), rtol=1e-10)
    learning = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    for who, found in enumerate(gradients):
        own = (patient == who).nonzero()[:, 0].tolist()
        alone = torch.stack([twin(*(t[r : r + 1] for t in inputs)).sum() for r in own]).mean()
        true = torch.autograd.grad(alone, list(learning.values()))
        length = torch.stack([g.square().sum() for g in true]).sum()
        assert found.keys() == learning.keys()
        assert all((found[name] - g).norm() <= 1e-10 * length.sqrt() for name, g in zip(learning, true, strict=True)), [
            name for name, g in zip(learning, true, strict=True) if (found[name] - g).norm() > 1e-10 * length.sqrt()
        ]
        assert float(squares[who]) == pytest.approx(float(length), rel=1e-10)
        assert squares[who] >= length * (1 - 1e-14)


def drawn(time: int, seed: int = 0) -> Tensor:
    return torch.randn(4, time, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("patient", [ALONE, TOGETHER], ids=["records", "patients"])
@pytest.mark.parametrize("time", [1, 2, 9])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_gradients_are_those_of_each_record_alone(kind: Any, options: dict[str, Any], time: int, patient: Tensor):
    agree(Reader(kind, **options).double(), (drawn(time),), patient)


def test_the_times_above_take_both_forms():
    for gates in (4, 12, 16):
        assert prefers_outer(2, 7, gates)
        assert not prefers_outer(9, 7, gates)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 8),
)
def test_gradients_are_right_for_any_stack(kind: Any, layers: int, both: bool, first: bool, bias: bool, time: int):
    net = Reader(kind, num_layers=layers, bidirectional=both, batch_first=first, bias=bias).double()
    agree(net, (drawn(time),), TOGETHER)


@pytest.mark.parametrize("patient", [ALONE, TOGETHER], ids=["records", "patients"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_sequences_of_different_lengths_may_come_packed(kind: Any, options: dict[str, Any], patient: Tensor):
    agree(Reader(kind, **options).double(), (drawn(5), torch.tensor([2, 5, 1, 3])), patient)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("lengths", [None, [2, 5, 1, 3]])
def test_what_chose_the_first_states_learns(kind: Any, lengths: list[int] | None):
    net = Begun(kind, num_layers=2, bidirectional=True, batch_first=True).double()
    agree(net, (drawn(5),) if lengths is None else (drawn(5), torch.tensor(lengths)), TOGETHER)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("frozen", ["bias", "ih", "hh", "l0", "reverse", "weight_ih_l1"])
def test_frozen_parameters_stay_out_of_the_lengths(kind: Any, frozen: str):
    net = Reader(kind, num_layers=2, bidirectional=True).double()
    for name, p in net.named_parameters():
        p.requires_grad_(frozen not in name)
    agree(net, (drawn(3),), TOGETHER)


class LastOnly(nn.Module):
    """Reads one of the last states and nothing else of what a layer gives."""

    def __init__(self, kind: type[nn.RNNBase], which: int) -> None:
        super().__init__()
        self.layer, self.which = kind(3, 4, bidirectional=True, batch_first=True), which

    def forward(self, x: Tensor) -> Tensor:
        """One number for each record."""
        _, last = self.layer(x)
        return number((last[1] if isinstance(last, tuple) else last)[self.which])


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize(("which", "suffix"), [(0, "_l0"), (1, "_l0_reverse")])
def test_a_loss_may_read_one_last_state_alone(kind: Any, which: int, suffix: str):
    net = LastOnly(kind, which).double()
    twin = copy.deepcopy(net)
    _, squares, gradients = one_pass(net, (drawn(4),), ALONE)
    own = {name: p for name, p in twin.named_parameters() if name.endswith(suffix)}
    for r in range(4):
        true = torch.autograd.grad(twin(drawn(4)[r : r + 1]).sum(), list(own.values()))
        assert float(squares[r]) == pytest.approx(float(sum(g.square().sum() for g in true)), rel=1e-10)
        assert all(torch.allclose(gradients[r][name], g) for name, g in zip(own, true, strict=True))
        assert not any(g.any() for name, g in gradients[r].items() if name not in own)


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("lengths", [None, [2, 5, 1, 3], [5, 3, 2, 2]])
def test_outputs_states_and_gradients_of_inputs_are_torchs(
    kind: Any, options: dict[str, Any], batch_first: bool, lengths: list[int] | None
):
    layer = kind(3, 4, batch_first=batch_first, **options).double()
    twin = copy.deepcopy(layer)
    found = []
    for one, tapped in ((layer, Taps.on(layer).installed()), (twin, contextlib.nullcontext())):
        x = (drawn(5) if batch_first else drawn(5).transpose(0, 1)).requires_grad_()
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        widths = (layer.proj_size or 4, 4)[: 2 if kind is nn.LSTM else 1]
        hx = tuple(drawn(8, 1).reshape(-1)[: count * 4 * w].view(count, 4, w).clone().requires_grad_() for w in widths)
        given_x: Any = x
        if lengths is not None:
            in_order = lengths == sorted(lengths, reverse=True)
            given_x = pack_padded_sequence(x, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=in_order)
        with tapped:
            found.append(watched(*one(given_x, hx if kind is nn.LSTM else hx[0]), x, hx))
    for ours, torchs in zip(*found, strict=True):
        assert ours.shape == torchs.shape
        assert torch.allclose(ours, torchs, rtol=1e-10, atol=1e-12)


def watched(y: Any, last: Any, x: Tensor, hx: tuple[Tensor, ...]) -> list[Tensor]:
    """Everything a layer gave, and the gradients it handed back."""
    order = []
    if isinstance(y, PackedSequence):
        order = [t for t in (y.batch_sizes, y.sorted_indices, y.unsorted_indices) if t is not None]
        y = y.data
    outputs = [y, *(last if isinstance(last, tuple) else (last,))]
    torch.stack([number(t.reshape(1, -1)) for t in outputs]).sum().backward()
    assert x.grad is not None
    return [t.detach().clone() for t in (*outputs, *order, x.grad, *(s.grad for s in hx if s.grad is not None))]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_dropout_between_layers_is_torchs(kind: Any):
    layer = kind(3, 4, num_layers=3, dropout=0.5, batch_first=True).double()
    for training in (True, False):
        layer.train(training)
        torch.manual_seed(5)
        expected, _ = layer(drawn(6))
        torch.manual_seed(5)
        with Taps.on(layer).installed():
            found, _ = layer(drawn(6))
        assert torch.allclose(found, expected, rtol=1e-10)


def test_one_sequence_without_a_batch_is_refused():
    layer = nn.GRU(3, 4)
    with Taps.on(layer).installed(), pytest.raises(ValueError, match="batches of sequences"):
        layer(torch.zeros(5, 3))


def test_states_of_a_wrong_shape_are_refused():
    layer = nn.RNN(3, 4)
    with Taps.on(layer).installed(), pytest.raises(RuntimeError, match="hidden size"):
        layer(torch.zeros(5, 2, 3), torch.zeros(1, 1, 4))


def test_a_layer_used_twice_is_noticed():
    layer = nn.LSTM(3, 3, batch_first=True)
    taps = Taps.on(layer)
    with taps.installed():
        layer(layer(torch.randn(2, 4, 3))[0])[0].sum().backward()
        with pytest.raises(Untappable, match="used 2 times"):
            taps.squares()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_second_backward_through_one_pass_is_noticed(kind: Any):
    layer = kind(3, 3, batch_first=True)
    with Taps.on(layer).installed():
        y, _ = layer(torch.randn(2, 4, 3))
        y.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="inplace"):
            y.sum().backward()


def test_a_state_that_explodes_behind_the_end_of_a_short_sequence_does_not_reach_it():
    net = Reader(nn.RNN, nonlinearity="relu")
    with torch.no_grad():
        net.layer.weight_hh_l0.copy_(1e12 * torch.eye(4))
        net.layer.weight_ih_l0.copy_(torch.rand(4, 3))
    x, lengths = torch.rand(2, 9, 3), torch.tensor([1, 9])
    _, squares, gradients = one_pass(net, (x, lengths), torch.arange(2))
    assert squares[0].isfinite()
    assert not squares[1].isfinite()
    _, alone, _ = one_pass(net, (x[:1, :1], lengths[:1]), torch.arange(1))
    assert float(squares[0]) == pytest.approx(float(alone), rel=1e-5)
    assert gradients[0].keys() == dict(net.named_parameters()).keys()


@pytest.mark.parametrize(("ours", "theirs"), [(nn.RNN, "DPRNN"), (nn.LSTM, "DPLSTM"), (nn.GRU, "DPGRU")])
@pytest.mark.parametrize("time", [2, 30])
def test_lengths_agree_with_opacus(ours: Any, theirs: str, time: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule, layers

        mine = Reader(ours, num_layers=2, batch_first=True)
        other = Reader(ours)
        other.layer = getattr(layers, theirs)(3, 4, num_layers=2, batch_first=True)
        other.layer.load_state_dict(mine.layer.state_dict())
        x = drawn(time).float()
        watched = GradSampleModule(other, loss_reduction="sum")
        watched(x).sum().backward()
        expected = sum(p.grad_sample.square().flatten(1).sum(1) for p in watched.parameters())
    _, squares, _ = one_pass(mine, (x,), ALONE)
    assert torch.allclose(squares.float(), expected, rtol=1e-4)
