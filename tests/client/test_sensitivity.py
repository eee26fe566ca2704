"""Brute force: leave out each patient in turn, and the clipped sum moves by no more than the clip norm, layer kind by kind."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from nets import Net
from nets import losses as loss
from wardround.client.dp import clipped_sum
from wardround.client.dp.engine import engine_of, headroom
from wardround.client.dp.taps import Untappable
from wardround.common.tasks import Records
from wardround.common.weights import trainable


class Last(nn.Module):
    """A recurrent layer's last output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0][:, -1]
        return y


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return y.flatten(1)


class Packed(nn.Module):
    """Reads as many moments of a record as its first number says; packs them where one of these numbers is over `above`."""

    def __init__(self, above: float = -torch.inf) -> None:
        super().__init__()
        self.layer, self.above = nn.GRU(3, 6, batch_first=True), above

    def forward(self, x: Tensor) -> Tensor:
        says = x[:, 0, 0]
        length = torch.where(says > 0, x.shape[1], 1)
        given = pack_padded_sequence(x, length, True, enforce_sorted=False) if says.max() > self.above else x
        y: Tensor = self.layer(given)[1][-1]
        return y


class Around(nn.Module):
    """Down, up again and past each other, as a U-Net does."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 2, 2, stride=2)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(F.relu(self.norm(self.down(x)), inplace=True))
        y += x
        return y.flatten(1)


NETS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "linear": lambda: (Net(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 2)), (24,)),
    "linear over time": lambda: (Net(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)), (6, 3)),
    "convolution": lambda: (
        Net(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 32, 3, stride=4), nn.Flatten(),
            nn.Linear(128, 2)), (2, 8, 8)
    ),
    "few places": lambda: (Net(nn.Conv2d(64, 64, 3), nn.Tanh(), nn.Flatten(), nn.Linear(256, 2)), (64, 4, 4)),
    "depthwise": lambda: (Net(nn.Conv1d(4, 4, 3, groups=4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)), (4, 8)),
    "around": lambda: (Net(Around(), nn.Linear(128, 2)), (2, 8, 8)),
    "rnn": lambda: (Net(Last(nn.RNN(3, 6, 2, batch_first=True)), nn.Linear(6, 2)), (5, 3)),
    "lstm": lambda: (Net(Last(nn.LSTM(3, 6, batch_first=True, bidirectional=True)), nn.Linear(12, 2)), (5, 3)),
    "gru": lambda: (Net(Last(nn.GRU(3, 6, batch_first=True)), nn.Linear(6, 2)), (5, 3)),
    "attention": lambda: (Net(Attend(), nn.Linear(20, 2)), (5, 4)),
    "layer norm": lambda: (Net(nn.Linear(3, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(20, 2)), (5, 3)),
    "tied, record by record": lambda: (Net(*[nn.Linear(4, 4)] * 2, nn.Linear(4, 2)), (4,)),
}  # fmt: skip
PACKED: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "packed, record by record": lambda: (Net(Packed(), nn.Linear(6, 2)), (5, 3)),
    "packed and frozen, record by record": lambda: (Net(Packed().requires_grad_(False), nn.Linear(6, 2)), (5, 3)),
}
PATIENTS = {"one record each": list(range(8)), "several records": [0, 0, 0, 1, 2, 2, 3, 4]}


def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(torch.stack([(one[name].double() - other[name].double()).square().sum() for name in one]).sum().sqrt())


@pytest.mark.parametrize("kind", NETS | PACKED)
@pytest.mark.parametrize("patient", PATIENTS.values(), ids=PATIENTS)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_leaving_a_patient_out_moves_the_sum_by_at_most_the_clip_norm(kind: str, patient: list[int], scale: float):
    torch.manual_seed(2)
    net, shape = (NETS | PACKED)[kind]()
    image = scale * torch.randn(len(patient), *shape, generator=torch.Generator().manual_seed(3))
    records = Records({"image": image}, torch.arange(len(patient)) % 2, torch.tensor(patient))
    assert engine_of(net, loss, records).in_one_pass == ("record by record" not in kind)
    weights = trainable(net)
    whole = clipped_sum(net, loss, weights, records, clip_norm=0.05)
    reached = 0.0
    for left_out in range(records.patients):
        rest = records.of_patients(torch.arange(records.patients) != left_out)
        by = moved(whole, clipped_sum(net, loss, weights, rest, clip_norm=0.05))
        assert by <= 0.05 * (1 + 1e-6)
        reached = max(reached, by)
    assert reached >= 0.05 * (1 - 2 * headroom(torch.float32)), "nobody was clipped, so nothing was tested"


@pytest.mark.parametrize("kind", NETS)
def test_weights_at_the_ends_of_float32_do_not_make_one_patient_weigh_more(kind: str):
    torch.manual_seed(4)
    net, shape = NETS[kind]()
    image = torch.randn(34, *shape, generator=torch.Generator().manual_seed(5))
    records = Records({"image": image}, torch.arange(34) % 2, torch.arange(34))
    first = {n: records.take(torch.arange(n)) for n in (15, 16, 17, 32, 33)}
    for (name, tensor), power in product(trainable(net).items(), (-30, -18, 7, 18, 30)):
        weights = trainable(net) | {name: tensor.sign() * 10.0**power}
        sums = {n: clipped_sum(net, loss, weights, some, clip_norm=1e-3) for n, some in first.items()}
        for count in (15, 16, 32):
            assert moved(sums[count], sums[count + 1]) <= 1e-3 * (1 + 1e-6), (name, power)


def test_sequences_packed_only_where_a_patient_says_so_are_refused():
    """No made-up record makes this network pack; the kernels' shapes would follow from the longest sequence of a piece."""
    net = Net(Packed(above=1000.0), nn.Linear(6, 2))
    image = torch.ones(8, 5, 3)
    records = Records({"image": image}, torch.arange(8) % 2, torch.arange(8))
    assert engine_of(net, loss, records).in_one_pass
    image[3, 0, 0] = 2000.0
    with pytest.raises(Untappable, match="packed sequences"):
        clipped_sum(net, loss, trainable(net), records, clip_norm=0.05)


# --- terms that cancel ----------------------------------------------------------------------------------------------------


def summed(outputs: Tensor, label: Tensor) -> Tensor:
    """A loss whose gradient is one everywhere: a layer's gradient is then its inputs, summed over time."""
    return outputs.flatten(1).sum(1)


@pytest.mark.parametrize("big", [2048.0, 4096.0, 8192.0])
@pytest.mark.parametrize("clip_norm", [0.6, 0.7])
def test_a_patient_whose_terms_cancel_does_not_round_the_others_up(big: float, clip_norm: float):
    """Between `big` and `-big` the sum keeps only multiples of big's last bit; whoever stands before is rounded to one."""
    net = Net(nn.Linear(16, 16, bias=False))
    plain, cancelling = torch.zeros(2, 16), torch.full((2, 16), big)
    plain[0], cancelling[1] = 4.0, -big
    x = torch.stack([*[plain, cancelling] * 31, plain])
    records = Records({"x": x}, torch.zeros(63), torch.arange(63))
    assert engine_of(net, summed, records).in_one_pass
    weights = trainable(net)
    whole = clipped_sum(net, summed, weights, records, clip_norm=clip_norm)
    reached = 0.0
    for left_out in range(63):
        rest = records.of_patients(torch.arange(63) != left_out)
        by = moved(whole, clipped_sum(net, summed, weights, rest, clip_norm=clip_norm))
        assert by <= clip_norm
        reached = max(reached, by)
    assert reached >= 0.99 * clip_norm, "nobody was clipped, so nothing was tested"


@pytest.mark.parametrize("seed", range(8))
def test_in_float64_too_a_length_is_not_lost_where_terms_cancel(seed: int):
    """Squared terms of 1e18 leave nothing of a squared length of a few hundreds."""
    generator = torch.Generator().manual_seed(seed)
    net = Net(nn.Linear(16, 16, bias=False, dtype=torch.float64))
    large, rest = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    records = Records({"x": torch.stack([1e9 * large, rest - 1e9 * large])[None]}, torch.zeros(1), torch.tensor([0]))
    assert engine_of(net, summed, records).in_one_pass
    alone = clipped_sum(net, summed, trainable(net), records, clip_norm=1.0)
    assert 0 < moved(alone, {name: torch.zeros_like(g) for name, g in alone.items()}) <= 1.0
