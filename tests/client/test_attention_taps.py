"""Attention in one pass: the same gradients, record by record and patient by patient, as torch's own."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.func import functional_call

from wardround.client.dp.taps import Groups, Taps, Untappable
from wardround.client.dp.taps.kept import prefers_outer

ALONE = torch.arange(4)
TOGETHER = torch.tensor([0, 0, 1, 2])
WIDTH, HEADS = 4, 2


def number(y: Tensor) -> Tensor:
    """(records, ...) -> one number for each record, by a function that treats all entries differently."""
    flat = y.flatten(1)
    return (flat + torch.arange(flat.shape[1], dtype=y.dtype).sin()).pow(2).sum(1)


class Attentive(nn.Module):
    """Attention from `query` to itself, to `key`, or to `key` and `value`; (records, time, features) each."""

    def __init__(self, *, ask: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.ask = ask or {}

    def forward(self, query: Tensor, *others: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """One number for each record; `mask` (records, heads, queries, keys)."""
        q, k, v = ((query, *others) + (others[-1:] or (query,)) * 2)[:3]
        if not self.layer.batch_first:
            swapped = {id(t): t.transpose(0, 1) for t in (q, k, v)}
            q, k, v = (swapped[id(t)] for t in (q, k, v))
        asked = dict(self.ask)
        if mask is not None:
            asked["attn_mask"] = mask.flatten(0, 1)
        y, seen = self.layer(q, k, v, key_padding_mask=padding, **asked)
        y = y if self.layer.batch_first else y.transpose(0, 1)
        return number(y) if seen is None else number(y) + number(seen)


def agree(net: nn.Module, inputs: tuple[Tensor, ...], patient: Tensor, fields: dict[str, Tensor] | None = None) -> None:
    twin, fields = copy.deepcopy(net), fields or {}
    groups = Groups.of(patient)
    taps = Taps.on(net)
    weights = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    with taps.installed(groups):
        losses = functional_call(net, weights, inputs, fields)
        losses.sum().backward()
        with torch.no_grad():
            squares = taps.squares()
            gradients = [dict(taps.clipped(row)) for row in torch.eye(groups.patients, dtype=torch.float64)]
    assert torch.allclose(losses, twin(*inputs, **fields), rtol=1e-10)
    learning = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    for who, found in enumerate(gradients):
        one = [slice(r, r + 1) for r in (patient == who).nonzero()[:, 0].tolist()]
        alone = [twin(*(t[r] for t in inputs), **{name: t[r] for name, t in fields.items()}).sum() for r in one]
        true = torch.autograd.grad(torch.stack(alone).mean(), list(learning.values()))
        length = torch.stack([g.square().sum() for g in true]).sum()
        assert found.keys() == learning.keys()
        for name, g in zip(learning, true, strict=True):
            assert (found[name] - g).norm() <= 1e-10 * length.sqrt(), name
        assert float(squares[who]) == pytest.approx(float(length), rel=1e-10)
        assert squares[who] >= length * (1 - 1e-14)


def drawn(time: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(4, time, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"ask": {"need_weights": False}},
    {"ask": {"average_attn_weights": False}},
    {"ask": {"need_weights": False}, "batch_first": True, "bias": False},
]


@pytest.mark.parametrize("patient", [ALONE, TOGETHER], ids=["records", "patients"])
@pytest.mark.parametrize("time", [1, 3, 8])
@pytest.mark.parametrize("options", OPTIONS)
def test_self_attention_has_the_gradients_of_each_record_alone(options: dict[str, Any], time: int, patient: Tensor):
    agree(Attentive(**options).double(), (drawn(time),), patient)


def test_the_times_above_take_both_forms():
    assert prefers_outer(3, WIDTH, WIDTH)
    assert not prefers_outer(8, WIDTH, 3 * WIDTH)


@pytest.mark.parametrize("patient", [ALONE, TOGETHER], ids=["records", "patients"])
@pytest.mark.parametrize("options", OPTIONS)
def test_attention_to_something_else_has_the_gradients_of_each_record_alone(options: dict[str, Any], patient: Tensor):
    agree(Attentive(**options).double(), (drawn(3), drawn(7, seed=1)), patient)
    agree(Attentive(**options).double(), (drawn(3), drawn(7, seed=1), drawn(7, seed=2)), patient)


@pytest.mark.parametrize("options", OPTIONS)
def test_keys_and_values_may_be_of_other_widths(options: dict[str, Any]):
    agree(Attentive(kdim=3, vdim=5, **options).double(), (drawn(3), drawn(6, 3), drawn(6, 5)), TOGETHER)
    agree(Attentive(kdim=3, vdim=3, **options).double(), (drawn(3), drawn(6, 3)), TOGETHER)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans(), st.booleans())
def test_gradients_are_right_for_any_lengths(queries: int, keys: int, first: bool, bias: bool, weights: bool):
    net = Attentive(batch_first=first, bias=bias, ask={"need_weights": weights}).double()
    agree(net, (drawn(queries), drawn(keys, seed=1)), TOGETHER)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("real", [True, False], ids=["numbers", "bools"])
def test_masks_are_torchs(weights: bool, real: bool):
    net = Attentive(batch_first=True, ask={"need_weights": weights}).double()
    mask, padding = drawn(10, HEADS).view(4, HEADS, 2, 5), drawn(5, 1)[..., 0]
    if not real:
        mask, padding = mask > 1, padding > 1
        mask[..., 0], padding[:, 0] = False, False  # something remains to be seen
    inputs = (drawn(2), drawn(5, seed=1))
    for fields in ({"mask": mask}, {"padding": padding}, {"mask": mask, "padding": padding}):
        agree(net, inputs, TOGETHER, fields)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_causal_hint_is_torchs(weights: bool, padded: bool):
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    net = Attentive(batch_first=True, ask={"need_weights": weights, "is_causal": True, "attn_mask": later}).double()
    padding = torch.arange(6)[None] >= torch.tensor([6, 4, 3, 1])[:, None]
    agree(net, (drawn(6),), TOGETHER, {"padding": padding} if padded else {})


@pytest.mark.parametrize("frozen", ["in_proj", "out_proj", "bias", "weight"])
@pytest.mark.parametrize("others", [0, 1])
def test_frozen_parameters_stay_out_of_the_lengths(frozen: str, others: int):
    net = Attentive().double()
    for name, p in net.named_parameters():
        p.requires_grad_(frozen not in name)
    agree(net, (drawn(3), drawn(4, seed=1))[: 1 + others], TOGETHER)


@pytest.mark.parametrize("weights", [True, False])
def test_dropout_is_torchs(weights: bool):
    layer = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5).double()
    x = drawn(5).transpose(0, 1)
    for training in (True, False):
        layer.train(training)
        torch.manual_seed(5)
        expected = layer(x, x, x, need_weights=weights)
        torch.manual_seed(5)
        with Taps.on(layer).installed():
            found = layer(x, x, x, need_weights=weights)
        assert torch.allclose(found[0], expected[0], rtol=1e-10)
        assert not weights or torch.allclose(found[1], expected[1], rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"kdim": 3, "vdim": 5}])
def test_gradients_of_inputs_are_torchs(options: dict[str, Any]):
    layer = nn.MultiheadAttention(WIDTH, HEADS, **options).double()
    widths = (WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    found = []
    for taps in (Taps.on(layer), None):
        inputs = [drawn(4, width).requires_grad_() for width in widths]
        if taps:
            with taps.installed():
                y, seen = layer(*inputs)
                (y.square().sum() + seen.square().sum()).backward()
        else:
            y, seen = layer(*inputs)
            (y.square().sum() + seen.square().sum()).backward()
        found.append([y.detach(), seen.detach(), *(t.grad for t in inputs)])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*found, strict=True))


class Encoder(nn.Module):
    """A layer of torch's transformers, unchanged, with a padding mask or without."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        made = nn.TransformerEncoderLayer(WIDTH, HEADS, 6, dropout=0.0, batch_first=True, **options)
        self.layer = nn.TransformerEncoder(made, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """One number for each record."""
        return number(self.layer(x, src_key_padding_mask=padding))


class Decoder(nn.Module):
    """The same with attention to itself, causal, and to a memory."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 6, dropout=0.0, batch_first=True, **options)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """One number for each record."""
        later = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return number(self.layer(x, memory, tgt_mask=later, tgt_is_causal=True))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("patient", [ALONE, TOGETHER], ids=["records", "patients"])
def test_torchs_transformers_work_unchanged(norm_first: bool, patient: Tensor):
    padding = torch.arange(5)[None] >= torch.tensor([5, 4, 3, 1])[:, None]
    encoder = Encoder(norm_first=norm_first).double().train()
    agree(encoder, (drawn(5),), patient)
    agree(encoder, (drawn(5),), patient, {"padding": padding})
    agree(Decoder(norm_first=norm_first).double().train(), (drawn(5), drawn(3, seed=1)), patient)


def test_one_sequence_without_a_batch_is_refused():
    layer = nn.MultiheadAttention(WIDTH, HEADS)
    x = torch.zeros(5, WIDTH)
    with Taps.on(layer).installed(), pytest.raises(ValueError, match="batches of sequences"):
        layer(x, x, x)


def test_masks_of_a_wrong_shape_and_a_hint_about_no_mask_are_refused():
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x = torch.zeros(2, 5, WIDTH)
    with Taps.on(layer).installed():
        with pytest.raises(ValueError, match="attn_mask"):
            layer(x, x, x, attn_mask=torch.zeros(1, 5))
        with pytest.raises(ValueError, match="key_padding_mask"):
            layer(x, x, x, key_padding_mask=torch.zeros(1, 5))
        with pytest.raises(RuntimeError, match="is_causal"):
            layer(x, x, x, is_causal=True)


def lengths(layer: nn.Module) -> Tensor:
    """Squared lengths of two records in a tapped layer."""
    taps, x = Taps.on(layer), torch.randn(2, 5, WIDTH)
    with taps.installed():
        layer(x, x, x)[0].sum().backward()
        return taps.squares()


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_entries_added_to_the_keys_are_not_covered_and_that_is_noticed(options: dict[str, Any]):
    with pytest.raises((RuntimeError, Untappable)):
        lengths(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options))


def test_an_output_layer_of_somebody_else_is_not_taken_over():
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    assert len(lengths(layer)) == 2
    layer.out_proj = nn.Linear(WIDTH, WIDTH)
    with pytest.raises((RuntimeError, Untappable)):
        lengths(layer)


def test_an_output_layer_that_two_attentions_share_is_refused():
    net = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS) for _ in range(2))
    net[1].out_proj = net[0].out_proj
    with pytest.raises(Untappable, match="shares a parameter"):
        Taps.on(net)
