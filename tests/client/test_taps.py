"""Linear, embedding, normalising and bare layers: one pass gives what plain autograd gives record by record."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nets import Net
from nets import losses as loss
from wardround.client.dp.alone import mean_gradients, squared_length
from wardround.client.dp.engine import Engine, sum_clipped
from wardround.client.dp.taps import Groups, Taps, Untappable
from wardround.client.dp.taps.kept import LONGEST, squares_of_outer
from wardround.common.tasks import Records
from wardround.common.weights import trainable


class Scale(nn.Module):
    """A learned scale of the last dimension, as residual branches of transformers have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Position(nn.Module):
    """An embedding of positions and a token in front, with a leading 1."""

    def __init__(self, time: int, width: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, time, width))
        self.token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x + self.place], 1)


class Folded(nn.Module):
    """A layer that sees every moment of every record as a row of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.flatten(0, 1))
        return y.view(*x.shape[:2], -1)


def frozen(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        getattr(layer, name).requires_grad_(False)
    return layer


def drawn(layer: nn.Module) -> nn.Module:
    """With weights that are not all one."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) / 3)
    return layer


KINDS: dict[str, Callable[[], tuple[Net, tuple[int, ...]]]] = {
    "linear": lambda: (Net(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2, bias=False)), (5,)),
    "linear over time": lambda: (Net(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)), (6, 3)),
    "linear over a long time": lambda: (Net(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(80, 2)), (40, 3)),
    "linear over two times": lambda: (Net(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)), (4, 3, 3)),
    "half frozen": lambda: (
        Net(frozen(nn.Linear(5, 7), "weight"), nn.Tanh(), frozen(nn.Linear(7, 2), "bias")), (5,)
    ),
    "folded": lambda: (Net(Folded(nn.Linear(3, 4)), nn.Tanh(), nn.Flatten(), nn.Linear(20, 2)), (5, 3)),
    "group norm": lambda: (Net(nn.Conv2d(2, 4, 1), drawn(nn.GroupNorm(2, 4)), nn.Flatten(), nn.Linear(64, 2)), (2, 4, 4)),
    "instance norm": lambda: (
        Net(nn.Conv1d(2, 4, 1), drawn(nn.InstanceNorm1d(4, affine=True)), nn.Tanh(), nn.Flatten(), nn.Linear(20, 2)), (2, 5)
    ),
    "layer norm": lambda: (Net(nn.Linear(3, 4), drawn(nn.LayerNorm(4)), nn.Flatten(), nn.Linear(20, 2)), (5, 3)),
    "layer norm of all": lambda: (Net(nn.Linear(3, 4), drawn(nn.LayerNorm((5, 4))), nn.Flatten(), nn.Linear(20, 2)), (5, 3)),
    "layer norm of a vector": lambda: (Net(nn.Linear(3, 4), drawn(nn.LayerNorm(4, bias=False)), nn.Linear(4, 2)), (3,)),
    "rms norm": lambda: (Net(nn.Linear(3, 4), drawn(nn.RMSNorm(4)), nn.Flatten(), nn.Linear(20, 2)), (5, 3)),
    "one slope": lambda: (Net(nn.Linear(5, 7), nn.PReLU(), nn.Linear(7, 2)), (5,)),
    "slopes of channels": lambda: (Net(nn.Conv2d(2, 4, 1), drawn(nn.PReLU(4)), nn.Flatten(), nn.Linear(64, 2)), (2, 4, 4)),
    "bare scale": lambda: (Net(nn.Linear(3, 4), Scale(4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 2)), (5, 3)),
    "bare scale of a vector": lambda: (Net(nn.Linear(3, 4), Scale(4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "bare position": lambda: (Net(nn.Linear(3, 4), Position(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)), (5, 3)),
}  # fmt: skip
PATIENTS = {"one record each": list(range(8)), "several records": [0, 0, 0, 1, 2, 2, 3, 4], "one patient": [0] * 8}


def some(shape: tuple[int, ...], patient: list[int], *, dtype: torch.dtype = torch.float64) -> Records:
    generator = torch.Generator().manual_seed(len(set(patient)))
    image = torch.randn(len(patient), *shape, generator=generator, dtype=torch.float64).to(dtype)
    return Records({"image": image}, torch.arange(len(patient)) % 2, torch.tensor(patient))


def assert_exact(net: nn.Module, records: Records) -> None:
    """Every patient's length and gradient, by the taps and by plain autograd."""
    weights = trainable(net)
    expected = list(mean_gradients(net, loss, weights, records))
    taps = Taps.on(net)
    groups = Groups.of(records.patient)
    with taps.installed(groups):
        torch.autograd.backward(loss(net(**records.fields), records.label).sum())
        squares = taps.squares()
        for number, mean in enumerate(expected):
            torch.testing.assert_close(squares[number], squared_length(mean), rtol=1e-10, atol=1e-20)
            alone = torch.zeros(groups.patients, dtype=torch.float64)
            alone[number] = 0.3
            found = dict(taps.clipped(alone))
            assert found.keys() == mean.keys()
            for name, g in mean.items():
                torch.testing.assert_close(found[name], 0.3 * g, rtol=1e-10, atol=1e-13)
    assert not any("forward" in layer.__dict__ for layer in net.modules()), "a layer was left tapped"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patient", PATIENTS.values(), ids=PATIENTS)
def test_one_pass_is_exact(kind: str, patient: list[int]):
    torch.manual_seed(1)
    net, shape = KINDS[kind]()
    assert_exact(net.double(), some(shape, patient))
    assert Engine.on(net, loss, some(shape, [0])).in_one_pass


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
    assert_exact(net, Records({"image": index}, torch.arange(len(patient)) % 2, numbers))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    time=st.integers(1, 20),
    inside=st.integers(1, 9),
    outside=st.integers(1, 9),
    patient=st.lists(st.integers(0, 3), min_size=1, max_size=7).map(sorted),
    bias=st.booleans(),
)
def test_a_linear_layer_is_exact_at_any_shape(time: int, inside: int, outside: int, patient: list[int], bias: bool):
    torch.manual_seed(4)
    net = Net(nn.Linear(inside, outside, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(time * outside, 2)).double()
    numbers = torch.unique(torch.tensor(patient), return_inverse=True)[1].tolist()
    assert_exact(net, some((time, inside), numbers))


@pytest.mark.parametrize("number", [20_000_000, 2**31 + 1])
def test_words_are_compared_as_whole_numbers(number: int):
    """As float32 these two would be one word."""
    from wardround.client.dp.taps.linear import Rows

    g = torch.ones(1, 2, 3)
    alone = Groups.of(torch.tensor([0]))
    for index, square in (([number, number + 1], 6), ([number, number], 12)):
        assert float(Rows(torch.tensor([index]), g, alone, 2**33).squares()[0]) == pytest.approx(square, rel=1e-6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(-12, 12))
def test_a_length_is_never_understated_where_terms_cancel(seed: int, time: int, size: float):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, time, 4, generator=generator) * 10**size
    g = torch.randn(1, time, 3, generator=generator)
    x, g = torch.cat([x, x], 1), torch.cat([g, -g * (1 + 1e-6 * torch.randn(1, time, 1, generator=generator))], 1)
    true = torch.bmm(g.double().mT, x.double()).square().sum()
    assert squares_of_outer(x.double(), g.double(), lost=1e-4)[0] >= true * (1 - 1e-12)


def test_what_is_longer_than_learning_ever_is_counts_as_infinite():
    one = torch.ones(3, 2, 4, dtype=torch.float64)
    for x, g in ((LONGEST * one, one), (one, LONGEST * one), (1e-300 * one, 1e300 * one)):
        assert squares_of_outer(x, g, lost=1e-4).isinf().all()
    assert squares_of_outer(one * 1e7, one, lost=1e-4).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_patient_that_is_not_finite_is_blanked_and_spoils_nobody(kind: str):
    torch.manual_seed(5)
    net, shape = KINDS[kind]()
    records = some(shape, PATIENTS["several records"], dtype=torch.float32)
    spoilt = records.fields["image"].clone()
    spoilt[4] = torch.inf  # one of two records of patient 2
    sums = []
    for image in (spoilt, records.fields["image"]):
        taps = Taps.on(net)
        with taps.installed(Groups.of(records.patient)):
            torch.autograd.backward(loss(net(image), records.label).sum())
            squares = taps.squares()
            factor = torch.tensor([1.0, 1, 0, 1, 1], dtype=torch.float64)
            sums.append(sum_clipped(taps, squares, factor))
        assert squares.isfinite().tolist() == [True, True, image is not spoilt, True, True]
    for name, tensor in sums[0].items():
        torch.testing.assert_close(tensor, sums[1][name])


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_not_used_exactly_once_is_named(times: int):
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.odd = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, image: Tensor) -> Tensor:
            for _ in range(times):
                image = self.odd(image)
            y: Tensor = self.once(image)
            return y

    net = Again()
    taps = Taps.on(net)
    with taps.installed():
        torch.autograd.backward(loss(net(torch.randn(3, 4)), torch.tensor([0, 1, 1])).sum())
        with pytest.raises(Untappable, match=f"layer odd was used {times} times"):
            taps.squares()
