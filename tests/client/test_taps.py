"""One pass gives what going record by record gives, for every layer kind, and steps aside where it cannot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from wardround.client.dp import clipping
from wardround.client.dp.clipping import clipped_sum
from wardround.client.dp.taps import Taps, squares_over_time
from wardround.common.tasks import Records
from wardround.common.weights import trainable


class Net(nn.Module):
    """`image` through layers in a row."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layers(image)
        return logits


def loss(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, reduction="none")


class Residual(nn.Module):
    """x + layer(x), added in place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        out += x
        return out


NETS = {
    "linear": lambda: (Net(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2, bias=False)), (5,)),
    "linear over time": lambda: (Net(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)), (6, 3)),
    "long time": lambda: (Net(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(80, 2)), (40, 3)),
    "convolution": lambda: (
        Net(nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 16, 2)), (2, 8, 8)
    ),
    "dilated": lambda: (Net(nn.Conv2d(2, 3, 3, dilation=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)), (2, 8, 8)),
    "group norm": lambda: (Net(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 2)), (2, 4, 4)),
    "layer norm": lambda: (Net(nn.Linear(3, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(20, 2)), (5, 3)),
    "layer norm of all": lambda: (Net(nn.Linear(3, 4), nn.LayerNorm((5, 4)), nn.Flatten(), nn.Linear(20, 2)), (5, 3)),
    "residual in place": lambda: (
        Net(nn.Conv2d(2, 2, 3, padding=1), Residual(nn.Conv2d(2, 2, 3, padding=1)), nn.ReLU(inplace=True), nn.Flatten(),
            nn.Linear(32, 2)), (2, 4, 4)
    ),
}  # fmt: skip
PATIENTS = {"one record each": list(range(8)), "several records": [0, 0, 0, 1, 2, 2, 3, 4], "one patient": [0] * 8}


def some(shape: tuple[int, ...], patient: list[int], *, dtype: torch.dtype = torch.float64) -> Records:
    generator = torch.Generator().manual_seed(len(set(patient)))
    image = torch.randn(len(patient), *shape, generator=generator, dtype=dtype)
    return Records({"image": image}, torch.arange(len(patient)) % 2, torch.tensor(patient))


def slowly(net: nn.Module, weights: dict[str, Tensor], records: Records, clip_norm: float) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    for piece in clipping._pieces(records, 64):
        for name, found in clipping._record_by_record(net, loss, weights, piece, clip_norm).items():
            total[name] += found
    return total


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("patient", PATIENTS.values(), ids=PATIENTS)
@pytest.mark.parametrize("clip_norm", [1e-2, 0.5, 1e6])
def test_one_pass_is_exact(kind: str, patient: list[int], clip_norm: float):
    torch.manual_seed(1)
    net, shape = NETS[kind]()
    net, records = net.double(), some(shape, patient)
    weights = {name: w.clone() for name, w in trainable(net).items()}
    assert Taps.on(net) is not None
    found = clipped_sum(net, loss, weights, records, clip_norm=clip_norm)
    assert clipping._TAPS[net] is not None, "it went the slow way"
    for name, expected in slowly(net, weights, records, clip_norm).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    words=st.integers(2, 9),
    time=st.integers(1, 12),
    width=st.integers(1, 5),
    patient=st.lists(st.integers(0, 3), min_size=1, max_size=7).map(sorted),
    padding=st.booleans(),
)
def test_an_embedding_is_exact_at_any_shape(words: int, time: int, width: int, patient: list[int], padding: bool):
    torch.manual_seed(2)
    table = nn.Embedding(words, width, padding_idx=0 if padding else None)
    net = Net(table, nn.Flatten(), nn.Linear(time * width, 2)).double()
    numbers = torch.unique(torch.tensor(patient), return_inverse=True)[1]
    index = torch.randint(words, (len(patient), time), generator=torch.Generator().manual_seed(time))
    records = Records({"image": index}, torch.arange(len(patient)) % 2, numbers)
    weights = {name: w.clone() for name, w in trainable(net).items()}
    found = clipping.clipped_sum(net, loss, weights, records, clip_norm=0.1)
    assert clipping._TAPS[net] is not None
    for name, expected in slowly(net, weights, records, 0.1).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0, 6))
def test_a_length_is_never_understated_where_terms_cancel(seed: int, time: int, size: float):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, time, 4, generator=generator) * 10**size
    g = torch.randn(1, time, 3, generator=generator)
    x, g = torch.cat([x, x], 1), torch.cat([g, -g * (1 + 1e-6 * torch.randn(1, time, 1, generator=generator))], 1)
    true = torch.bmm(g.double().mT, x.double()).square().sum()
    assert squares_over_time(x, g)[0] >= true * (1 - 1e-6)


@pytest.mark.parametrize("patient", PATIENTS.values(), ids=PATIENTS)
def test_no_patient_moves_the_sum_further_than_the_clip_norm_in_float32(patient: list[int]):
    torch.manual_seed(3)
    net, shape = NETS["residual in place"]()
    records = some(shape, patient, dtype=torch.float32)
    records = Records({"image": 1e3 * records.fields["image"]}, records.label, records.patient)
    weights = {name: w.clone() for name, w in trainable(net).items()}
    whole = clipped_sum(net, loss, weights, records, clip_norm=0.3)
    for left_out in range(records.patients):
        rest = records.of_patients(torch.arange(records.patients) != left_out)
        without = clipped_sum(net, loss, weights, rest, clip_norm=0.3)
        moved = torch.stack([(whole[name] - without[name]).square().sum() for name in whole]).sum().sqrt()
        assert moved <= 0.3 * (1 + 1e-6)


def test_a_patient_whose_gradient_is_not_finite_counts_as_zero_and_spoils_nobody():
    net, shape = NETS["linear"]()
    records = some(shape, list(range(8)), dtype=torch.float32)
    weights = {name: w.clone() for name, w in trainable(net).items()}
    clipped_sum(net, loss, weights, records, clip_norm=0.5)
    spoilt = records.fields["image"].clone()
    spoilt[3] = torch.inf
    found = clipped_sum(net, loss, weights, Records({"image": spoilt}, records.label, records.patient), clip_norm=0.5)
    others = records.of_patients(torch.arange(8) != 3)
    for name, expected in clipped_sum(net, loss, weights, others, clip_norm=0.5).items():
        torch.testing.assert_close(found[name], expected)


class Twice(Net):
    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layers[1](self.layers[0](self.layers[0](image)))
        return logits


class Aside(Net):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) + image @ self.layers[0].weight.T


class Coupled(Net):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image - image.mean(0))


def tied() -> Net:
    net = Net(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net.layers[1].weight = net.layers[0].weight
    return net


OUTSIDE = {
    "used twice": lambda: Twice(nn.Linear(4, 4), nn.Linear(4, 2)),
    "used outside its layer": lambda: Aside(nn.Linear(4, 2)),
    "records see each other": lambda: Coupled(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
    "tied weights": tied,
    "half frozen": lambda: half_frozen(),
    "unknown kind": lambda: Net(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2)),
    "a subclass": lambda: Net(type("Mine", (nn.Linear,), {})(4, 2)),
}


def half_frozen() -> Net:
    net = Net(nn.Linear(4, 4), nn.Linear(4, 2))
    net.layers[0].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_one_pass_cannot_do_exactly_goes_record_by_record(kind: str):
    torch.manual_seed(4)
    net = OUTSIDE[kind]()
    records = some((4,), [0, 1, 1, 2, 3, 4, 5, 6], dtype=torch.float32)
    weights = {name: w.clone() for name, w in trainable(net).items()}
    found = clipped_sum(net, loss, weights, records, clip_norm=0.5)
    assert clipping._TAPS[net] is None
    for name, expected in slowly(net, weights, records, 0.5).items():
        assert torch.equal(found[name], expected)


def test_a_network_is_left_as_it_was():
    net, shape = NETS["convolution"]()
    records = some(shape, list(range(4)), dtype=torch.float32)
    weights = {name: w.clone() for name, w in trainable(net).items()}
    before = {name: w.clone() for name, w in weights.items()}
    clipped_sum(net, loss, weights, records, clip_norm=0.5)
    assert all("forward" not in layer.__dict__ for layer in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    gradient = torch.autograd.grad(loss(net(**records.fields), records.label).sum(), list(net.parameters()))
    assert all(g.abs().sum() > 0 for g in gradient)  # ordinary training goes on as if nothing had been


@pytest.mark.parametrize("count", [1, 2, 3, 4, 63, 64, 100])
def test_every_piece_has_the_same_shape_whoever_was_drawn(count: int):
    pieces = clipping._pieces(some((4,), list(range(count))), 64)
    assert {len(piece.records) for piece in pieces} == {64}
    assert sum(int(piece.counts.sum()) for piece in pieces) == count
    assert all(not piece.counts[-1] and piece.counts[:-1].all() for piece in pieces)


@pytest.mark.parametrize("kind", ["one pass", "record by record"])
def test_a_model_chosen_for_its_rounding_does_not_show_who_else_is_there(kind: str):
    """Huge weights in the null space of some patients leave only rounding; another patient must not change how it falls."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        net = Net(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 2))
        if kind == "record by record":
            clipping._TAPS[net] = None
        x = torch.randn(70, 24, generator=generator)
        rows = torch.randn(16, 24, generator=generator, dtype=torch.float64)
        known = x[:3].double()
        rows -= rows @ torch.linalg.pinv(known) @ known
        weights = {name: w.clone() for name, w in trainable(net).items()}
        weights["layers.0.weight"] = (1e7 * rows).float()
        label = torch.arange(70) % 2
        for fewer, more in [(3, 4), (62, 63), (66, 67)]:
            sums = [
                clipped_sum(net, loss, weights, Records({"image": x[:n]}, label[:n], torch.arange(n)), clip_norm=0.5)
                for n in (fewer, more)
            ]
            moved = torch.stack([(sums[0][name] - sums[1][name]).square().sum() for name in weights]).sum().sqrt()
            assert moved <= 0.5 * (1 + 1e-6)


def test_more_records_of_a_patient_than_announced_are_refused():
    net, shape = NETS["linear"]()
    weights = {name: w.clone() for name, w in trainable(net).items()}
    with pytest.raises(ValueError, match="more than 63 records"):
        clipped_sum(net, loss, weights, some(shape, [0] * 64, dtype=torch.float32), clip_norm=0.5)
