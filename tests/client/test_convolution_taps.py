"""Convolutions in the private engine: each patient's gradient is that of its records alone, however it is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wardround.client.dp.taps import Groups, Taps
from wardround.client.dp.taps.kept import Built, Joined, Kept
from wardround.client.dp.taps.patches import OuterOfPatches

few = settings(max_examples=30, deadline=None, derandomize=True)
EXACT = 1e-10  # relative, in float64

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # and the shape of a record
    "3x3": (lambda: nn.Conv2d(9, 8, 3, padding=1), (9, 6, 5)),
    "few channels": (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 6, 5)),
    "stride that leaves a rest": (lambda: nn.Conv2d(9, 8, 3, stride=2), (9, 6, 8)),
    "uneven in everything": (lambda: nn.Conv2d(9, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (9, 7, 6)),
    "1x1": (lambda: nn.Conv2d(9, 4, 1), (9, 4, 3)),
    "1x1 with stride": (lambda: nn.Conv2d(9, 4, 1, stride=2), (9, 5, 4)),
    "1x1 with padding": (lambda: nn.Conv2d(9, 4, 1, padding=1), (9, 3, 4)),
    "no bias": (lambda: nn.Conv2d(9, 4, 3, bias=False), (9, 5, 5)),
    "same": (lambda: nn.Conv2d(9, 4, 3, padding="same", dilation=2), (9, 5, 6)),
    "same with an even kernel": (lambda: nn.Conv2d(9, 4, (4, 3), padding="same"), (9, 5, 6)),
    "valid": (lambda: nn.Conv2d(9, 4, 3, padding="valid"), (9, 5, 6)),
    "padded by circling": (lambda: nn.Conv2d(9, 4, 3, padding=2, padding_mode="circular"), (9, 5, 6)),
    "padded by mirroring": (lambda: nn.Conv2d(9, 4, 3, padding="same", padding_mode="reflect"), (9, 5, 6)),
    "padded by its rim": (lambda: nn.Conv1d(9, 4, 3, padding=1, padding_mode="replicate"), (9, 6)),
    "channel groups": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), (6, 5, 4)),
    "every channel alone": (lambda: nn.Conv2d(8, 8, 5, padding=2, stride=2, groups=8), (8, 7, 6)),
    "every channel twice": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), (4, 7, 6)),
    "sequence": (lambda: nn.Conv1d(9, 5, 4, stride=2, padding=2, dilation=2), (9, 12)),
    "sequence, channels alone": (lambda: nn.Conv1d(6, 6, 3, groups=6), (6, 12)),
    "volume": (lambda: nn.Conv3d(8, 3, (2, 3, 1), padding=(0, 1, 0)), (8, 3, 4, 3)),
    "volume, few channels": (lambda: nn.Conv3d(2, 3, 2, stride=2, groups=1), (2, 4, 5, 4)),
    "many places": (lambda: nn.Conv2d(8, 8, 3, padding=1), (8, 24, 23)),
    "few places, large weight": (lambda: nn.Conv2d(32, 64, 3, padding=1), (32, 3, 2)),
    "few places, large weight, no bias": (lambda: nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False), (32, 3, 4)),
    "some places, large weight": (lambda: nn.Conv2d(32, 64, 3, padding=1), (32, 6, 6)),
    "one place, large weight": (lambda: nn.Conv2d(64, 40, 3), (64, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 9, 4, stride=2, padding=1), (6, 4, 3)),
    "transposed to few channels": (lambda: nn.ConvTranspose2d(9, 3, 3, stride=2), (9, 4, 3)),
    "transposed with a rest": (lambda: nn.ConvTranspose2d(6, 9, 3, stride=3, padding=1, output_padding=(2, 1)), (6, 4, 3)),
    "transposed with a long rest": (lambda: nn.ConvTranspose2d(6, 9, 2, stride=2, dilation=4, output_padding=3), (6, 4, 3)),
    "transposed 1x1 within a rest": (lambda: nn.ConvTranspose1d(6, 9, 1, stride=4, padding=1, output_padding=3), (6, 1)),
    "transposed channel groups": (lambda: nn.ConvTranspose2d(6, 9, 3, stride=2, groups=3, output_padding=1), (6, 4, 3)),
    "transposed groups, a long rest": (lambda: nn.ConvTranspose1d(6, 9, 3, dilation=3, groups=3, output_padding=2), (6, 4)),
    "transposed sequence": (lambda: nn.ConvTranspose1d(5, 9, 4, stride=2, bias=False), (5, 6)),
    "transposed volume": (lambda: nn.ConvTranspose3d(3, 8, 2, stride=2), (3, 2, 3, 2)),
    "transposed, many places": (lambda: nn.ConvTranspose2d(8, 8, 2, stride=2), (8, 24, 23)),
    "transposed, large weight": (lambda: nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, output_padding=1), (64, 2, 2)),
}


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(layer: nn.Module, x: Tensor) -> Tensor:
    """One number a record, curved so that the gradient depends on the output."""
    return layer(x).flatten(1).sin().square().sum(1)


def alone(layer: nn.Module, x: Tensor, patient: Tensor) -> list[dict[str, Tensor]]:
    """By torch's own autograd, one record after the other, then the mean over a patient's records."""
    plain = copy.deepcopy(layer).double()
    own = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    found = []
    for one in range(int(patient.max()) + 1):
        each = [torch.autograd.grad(loss_of(plain, r[None].double()).sum(), list(own.values())) for r in x[patient == one]]
        found.append(dict(zip(own, (torch.stack(g).mean(0) for g in zip(*each, strict=True)), strict=True)))
    return found


def length(gradients: dict[str, Tensor]) -> float:
    return float(sum(g.double().square().sum() for g in gradients.values())) ** 0.5


def agrees(layer: nn.Module, x: Tensor, patient: Tensor, *, tolerance: float = EXACT) -> list[Kept]:
    """Assert that lengths, clipped sums and gradients of the input are right; what the layer kept."""
    expected = alone(layer, x, patient)
    x = x.clone().requires_grad_()
    (of_input,) = torch.autograd.grad(loss_of(layer, x).sum(), x)
    taps = Taps.on(layer)
    with taps.installed(Groups.of(patient)):
        loss_of(layer, x).sum().backward()
        kept = list(taps._taps[""].kept)
        squares = taps.squares()
        factor = normal(len(expected), seed=3).abs()
        clipped = dict(taps.clipped(factor))
    assert x.grad is not None
    assert (x.grad - of_input).norm() <= tolerance * of_input.norm()
    assert all(p.grad is None for p in layer.parameters())
    assert squares.dtype == torch.float64
    for square, g in zip(squares.tolist(), expected, strict=True):
        assert square**0.5 == pytest.approx(length(g), rel=tolerance)
    assert set(clipped) == set(expected[0])
    scale = sum(f * length(g) for f, g in zip(factor.tolist(), expected, strict=True))
    for name, total in clipped.items():
        assert total.shape == dict(layer.named_parameters())[name].shape
        wanted = torch.stack([f * g[name] for f, g in zip(factor, expected, strict=True)]).sum(0)
        assert (total - wanted).norm() <= tolerance * scale, name
    return kept


@pytest.mark.parametrize("kind", LAYERS)
def test_every_record_gets_the_gradient_it_has_alone(kind: str) -> None:
    make, shape = LAYERS[kind]
    agrees(seeded(make), normal(4, *shape), torch.arange(4))


@pytest.mark.parametrize("kind", LAYERS)
def test_every_patient_gets_the_mean_over_its_records(kind: str) -> None:
    make, shape = LAYERS[kind]
    agrees(seeded(make), normal(7, *shape), torch.tensor([0, 0, 0, 1, 2, 2, 3]))


@pytest.mark.parametrize("kind", LAYERS)
def test_in_float32_no_length_is_understated(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = seeded(make).float(), normal(5, *shape, dtype=torch.float32)
    patient = torch.tensor([0, 1, 1, 2, 3])
    expected = alone(layer, x, patient)
    taps = Taps.on(layer)
    with taps.installed(Groups.of(patient)):
        loss_of(layer, x).sum().backward()
        squares = taps.squares()
        sums = [dict(taps.clipped(one)) for one in torch.eye(4, dtype=torch.float64)]
    for square, g, total in zip(squares.tolist(), expected, sums, strict=True):
        assert length(g) ** 2 * (1 - 1e-4) <= square <= length(g) ** 2 * (1 + 1e-3)
        assert all(part.dtype == torch.float32 for part in total.values())
        assert length(total) ** 2 <= square * (1 + 1e-4)
        assert all((total[name] - g[name]).norm() <= 1e-4 * length(g) for name in g)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "kind", ["3x3", "few places, large weight", "channel groups", "transposed", "transposed, large weight"]
)
def test_a_frozen_parameter_is_neither_measured_nor_summed(kind: str, frozen: str) -> None:
    make, shape = LAYERS[kind]
    layer = seeded(make)
    getattr(layer, frozen).requires_grad_(False)
    agrees(layer, normal(5, *shape), torch.tensor([0, 0, 1, 2, 3]))


def forms(kept: list[Kept]) -> set[type]:
    return {type(part) for one in kept for part in (one._parts if isinstance(one, Joined) else [one])}


def test_few_places_under_a_large_weight_are_not_built() -> None:
    for kind in (
        "few places, large weight",
        "some places, large weight",
        "one place, large weight",
        "transposed, large weight",
    ):
        make, shape = LAYERS[kind]
        assert OuterOfPatches in forms(agrees(seeded(make), normal(3, *shape), torch.arange(3))), kind
    for kind in ("3x3", "few channels", "many places", "every channel alone", "transposed, many places"):
        make, shape = LAYERS[kind]
        kept = agrees(seeded(make), normal(3, *shape), torch.arange(3))
        assert all(issubclass(form, Built) for form in forms(kept)), kind


def test_many_records_of_one_patient_cost_no_exactness() -> None:
    make, shape = LAYERS["few places, large weight"]
    agrees(seeded(make), normal(33, *shape), torch.tensor([0] * 30 + [1, 2, 2]))


def test_a_batch_that_does_not_fit_at_once_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wardround.client.dp.taps.patches._AT_ONCE", 1)
    for kind in ("3x3", "few channels", "few places, large weight", "some places, large weight", "transposed, large weight"):
        make, shape = LAYERS[kind]
        agrees(seeded(make), normal(5, *shape), torch.tensor([0, 1, 1, 2, 3]))


def test_what_others_bring_does_not_change_a_patient() -> None:
    for kind, (make, shape) in LAYERS.items():
        layer, x = seeded(make), normal(6, *shape)
        alike = []
        for patient in (torch.arange(6), torch.tensor([0, 1, 2, 3, 3, 3])):
            taps = Taps.on(layer)
            with taps.installed(Groups.of(patient)):
                loss_of(layer, x).sum().backward()
                alike.append(taps.squares()[:3])
        assert torch.allclose(*alike, rtol=1e-13, atol=0), kind


def test_rows_folded_into_the_batch_are_summed_for_their_record() -> None:
    """As where a network looks at several slices of a record, one after the other."""

    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.look = nn.Conv2d(32, 64, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.look(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return y.sum(1)

    layer, x, patient = seeded(Slices), normal(4, 3, 32, 2, 3), torch.tensor([0, 0, 1, 2])
    expected = alone(layer, x, patient)
    taps = Taps.on(layer)
    with taps.installed(Groups.of(patient)):
        loss_of(layer, x).sum().backward()
        squares = taps.squares()
    assert squares.sqrt().tolist() == pytest.approx([length(g) for g in expected], rel=EXACT)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    dims = draw(st.integers(1, 3))
    transposed = draw(st.booleans())

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inside, outside = (groups * draw(st.integers(1, 9)) for _ in range(2))
    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding = tuple(
        draw(st.integers(0, d * (k - 1) // (2 if transposed else 1))) for k, d in zip(kernel, dilation, strict=True)
    )
    size = tuple(d * (k - 1) + 1 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilation, strict=True))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if not transposed:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        return seeded(lambda: kind(inside, outside, kernel, **options)), (inside, *size)  # type: ignore[arg-type]
    rest = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    turned = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    make = lambda: turned(inside, outside, kernel, output_padding=rest, **options)  # type: ignore[arg-type] # noqa: E731
    return seeded(make), (inside, *(max(1, n - 2) for n in size))


@given(convolutions(), st.lists(st.integers(1, 3), min_size=1, max_size=3))
@few
def test_any_convolution_is_exact(drawn: tuple[nn.Module, tuple[int, ...]], sizes: list[int]) -> None:
    layer, shape = drawn
    patient = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    agrees(layer, normal(len(patient), *shape), patient)


@given(convolutions(), st.lists(st.integers(1, 3), min_size=1, max_size=3))
@few
def test_any_convolution_is_exact_without_being_built(drawn: tuple[nn.Module, tuple[int, ...]], sizes: list[int]) -> None:
    layer, shape = drawn
    patient = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("wardround.client.dp.taps.patches._SMALL", 0)
        patched.setattr("wardround.client.dp.taps.patches._GHOST", 10**9)
        agrees(layer, normal(len(patient), *shape), patient)


LARGE = ["few places, large weight", "some places, large weight", "transposed, large weight"]


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("size", [1e18, 1e-24])
def test_extreme_numbers_are_refused_or_measured_but_not_made_small(kind: str, size: float) -> None:
    make, shape = LAYERS[kind]
    layer = seeded(make).float()
    x = normal(3, *shape, dtype=torch.float32)
    pull = torch.ones_like(layer(x))
    pull[1] *= size
    x[2] *= size
    taps = Taps.on(layer)
    with taps.installed():
        (layer(x) * pull).sum().backward()
        squares = taps.squares()
    plain = copy.deepcopy(layer).double()
    for number, square in enumerate(squares.tolist()):
        own = torch.autograd.grad((plain(x[number, None].double()) * pull[number].double()).sum(), list(plain.parameters()))
        true = float(sum(g.square().sum() for g in own)) ** 0.5
        if size > 1 and number:
            assert not square <= 1e30
        else:
            assert square**0.5 >= true * (1 - 1e-4) - 1e-18  # float32 squares nothing shorter


@pytest.mark.parametrize("kind", LARGE)
def test_numbers_too_long_to_be_of_learning_are_refused_even_where_the_product_is_short(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = seeded(make).float(), normal(2, *shape, dtype=torch.float32)
    pull = torch.ones_like(layer(x))
    x[1] *= 1e-18
    pull[1] *= 1e18
    taps = Taps.on(layer)
    with taps.installed():
        (layer(x) * pull).sum().backward()
        assert OuterOfPatches in forms(taps._taps[""].kept)
        weight = next(one for one in taps._taps[""].kept[0]._parts if isinstance(one, OuterOfPatches))  # type: ignore[attr-defined]
        assert weight.squares().isfinite().tolist() == [True, False]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("kind", [*LARGE, "3x3", "few channels", "many places", "channel groups", "transposed"])
def test_a_patient_with_unusable_numbers_is_blanked_and_spoils_nobody(kind: str, bad: float) -> None:
    make, shape = LAYERS[kind]
    layer = seeded(make).float()
    x = normal(4, *shape, dtype=torch.float32)
    patient = torch.tensor([0, 1, 1, 2])
    expected = alone(layer, x, patient)
    x[1].view(-1)[0] = bad
    taps = Taps.on(layer)
    with taps.installed(Groups.of(patient)):
        loss_of(layer, x).sum().backward()
        squares = taps.squares()
        unusable = ~squares.isfinite()
        assert unusable.tolist()[::2] == [False, False]
        if bad != 1e30:
            assert unusable[1]
        unusable[1] = True
        taps.blank(unusable)
        total = dict(taps.clipped(torch.ones(3, dtype=torch.float64)))
    for name, g in total.items():
        wanted = expected[0][name] + expected[2][name]
        assert (g - wanted).norm() <= 1e-4 * (length(expected[0]) + length(expected[2]))


@pytest.mark.parametrize("side", [2, 6])  # measured over places, and by building
@pytest.mark.parametrize("transposed", [False, True])
def test_terms_that_cancel_are_not_trusted_to_their_last_bits(transposed: bool, side: int) -> None:
    """The same patch at every place, and gradients that sum to nothing but rounding: no float sum is longer than promised."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = seeded(lambda: kind(64, 1024, 1, bias=False)).float()
    x = normal(3, 64, 1, 1, dtype=torch.float32).expand(3, 64, side, side).contiguous()
    pull = normal(3, 1024, side * side, dtype=torch.float32)
    pull[..., -1] = -pull[..., :-1].sum(2)
    taps = Taps.on(layer)
    with taps.installed():
        (layer(x) * pull.view(3, 1024, side, side)).sum().backward()
        assert forms(taps._taps[""].kept) == {OuterOfPatches}
        squares = taps.squares()
        for number, only in enumerate(torch.eye(3, dtype=torch.float64)):
            assert length(dict(taps.clipped(only))) ** 2 <= squares[number]


@pytest.mark.parametrize("kind", ["3x3", "few places, large weight", "transposed"])
def test_under_autocast_the_output_is_what_the_layer_gives_untapped(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = seeded(make).float(), normal(3, *shape, dtype=torch.float32)
    taps = Taps.on(layer)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        with taps.installed():
            tapped = layer(x)
    assert tapped.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(tapped, plain)


def test_a_layer_whose_input_does_not_learn_computes_no_gradient_for_it() -> None:
    layer, x = seeded(lambda: nn.Conv2d(3, 4, 3)), normal(2, 3, 5, 5)
    taps = Taps.on(layer)
    tap = taps._taps[""]

    def never(*_: object) -> Tensor:
        raise AssertionError("the gradient of records themselves was computed")

    tap.pull_back = never  # type: ignore[method-assign]
    with taps.installed():
        loss_of(layer, x).sum().backward()
        assert taps.squares().shape == (2,)


def test_an_output_size_asked_for_in_passing_is_refused() -> None:
    layer = seeded(lambda: nn.ConvTranspose2d(2, 3, 3, stride=2))
    with Taps.on(layer).installed(), pytest.raises(ValueError, match="output_padding"):
        layer(normal(1, 2, 3, 3), (8, 8))


@pytest.mark.parametrize("kind", ["3x3", "few channels", "many places", "channel groups", "transposed"])
def test_what_is_built_lets_go_of_the_pass(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer = seeded(make)
    taps = Taps.on(layer)
    with taps.installed():
        loss_of(layer, normal(4, *shape)).sum().backward()
        assert taps.nbytes == 4 * sum(p.nbytes for p in layer.parameters())


@pytest.mark.parametrize("kind", LARGE)
def test_what_is_not_built_keeps_less_than_the_gradients(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer = seeded(make)
    taps = Taps.on(layer)
    with taps.installed():
        loss_of(layer, normal(4, *shape)).sum().backward()
        assert taps.nbytes < sum(p.nbytes for p in layer.parameters())
