"""Published networks, as they are but for GroupNorm: their private gradients are those of plain autograd, record by record."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock, conv1x1

from wardround.client.dp import preflight
from wardround.client.dp.engine import Engine, headroom
from wardround.client.dp.sizes import Sizes
from wardround.client.dp.taps import Groups, Taps
from wardround.common.models.group_norm import with_group_norm
from wardround.common.tasks import TASKS, Records
from wardround.common.weights import Weights, trainable

Sums = dict[str, Tensor]

AS_PATIENTS = {"record": [0, 1, 2], "patient": [0, 0, 1]}


def losses(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, reduction="none")


class Films(nn.Module):
    """A network that takes its input by position, under the field's name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image)
        return logits


def films(patient: list[int], *shape: int, dtype: torch.dtype = torch.float64) -> Records:
    image = torch.randn(len(patient), *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Records({"image": image.to(dtype)}, torch.arange(len(patient)) % 2, torch.tensor(patient))


def published(name: str) -> Films:
    torch.manual_seed(3)
    return drawn(getattr(torchvision.models, name)(weights=None, num_classes=2))


def drawn(network: nn.Module) -> Films:
    """In float64, with scales of residual branches that matter: some start at zero or a millionth."""
    model = Films(with_group_norm(network).double())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layer_scale" in name or "norm" in name or "bn" in name or "token" in name:
                p.add_(torch.randn_like(p) / 4)
    return model.eval()  # GroupNorm knows no modes, and plain autograd is to meet the same network as the engine


def small_convnext() -> ConvNeXt:
    return ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], stochastic_depth_prob=0.5, num_classes=2)


def plain_gradients(model: nn.Module, records: Records) -> list[Sums]:
    """Each patient's mean gradient, one record after the other."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    means: list[Sums] = []
    for patient in range(records.patients):
        own = records.take(torch.nonzero(records.patient == patient).flatten())
        total = [torch.zeros_like(p) for p in parameters]
        for at in range(len(own)):
            one = own.take(torch.tensor([at]))
            value = losses(model(**one.fields), one.label).sum()
            found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            total = [t + f / len(own) for t, f in zip(total, found, strict=True)]
        means.append(dict(zip(names, total, strict=True)))
    return means


def length(gradient: Sums) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


def assert_same(found: Sums, expected: Sums, *, relative: float = 1e-10) -> None:
    whole = length(expected)
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert found[name].shape == g.shape, name
        assert float((found[name] - g).norm()) <= relative * float(g.norm()) + relative / 1000 * whole, name


def assert_clipped(engine: Engine, weights: Weights, records: Records, means: list[Sums]) -> None:
    """The engine's sum is the one by hand, where some are clipped and some are not."""
    lengths = sorted(length(mean) for mean in means)
    clip = (lengths[0] + lengths[-1]) / 2 if len(lengths) > 1 else lengths[0] / 2
    expected = {name: torch.zeros_like(g) for name, g in means[0].items()}
    for mean in means:
        factor = min(1.0, clip * (1 - headroom(torch.float64)) / length(mean))
        for name, g in mean.items():
            expected[name] += factor * g
    found = engine.clipped_sum(weights, records, clip_norm=clip, records_per_patient=2)
    assert_same(found, expected)


def assert_exact(model: nn.Module, *shape: int) -> None:
    """One pass, through taps and through the engine, for records and for patients of several."""
    engine = Engine.on(model, losses, films([0], *shape))
    assert engine.in_one_pass
    weights = trainable(model)
    for patient in AS_PATIENTS.values():
        records = films(patient, *shape)
        means = plain_gradients(model, records)
        taps = Taps.on(model)
        groups = Groups.of(records.patient)
        with taps.installed(groups):
            losses(
                torch.func.functional_call(model, weights, args=(), kwargs=dict(records.fields)), records.label
            ).sum().backward()
            squares = taps.squares()
            each = [dict(taps.clipped(row)) for row in torch.eye(groups.patients, dtype=torch.float64)]
        for mean, found, square in zip(means, each, squares.tolist(), strict=True):
            assert math.sqrt(square) == pytest.approx(length(mean), rel=1e-10)
            assert_same(found, mean)
        assert_clipped(engine, weights, records, means)


@pytest.fixture
def of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which sizes of a piece give the same bits is another question, and takes long for a large network."""
    monkeypatch.setattr(Sizes, "of", lambda *_: Sizes((3,), lambda _: True))


# --- published networks ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("of_one_size")
@pytest.mark.parametrize("name", [
    pytest.param("resnet18", marks=pytest.mark.slow),  # in-place ReLU, `out += identity`
    "mobilenet_v3_small",  # in-place hardswish, squeeze-excitation
    pytest.param("resnet50", marks=pytest.mark.slow),
    pytest.param("mobilenet_v3_large", marks=pytest.mark.slow),
    pytest.param("efficientnet_b0", marks=pytest.mark.slow),  # stochastic depth
    pytest.param("densenet121", marks=pytest.mark.slow),  # features of all earlier layers, joined
    pytest.param("convnext_tiny", marks=pytest.mark.slow),  # bare layer_scale, LayerNorm over channels
])  # fmt: skip
def test_a_published_network_is_exact_in_one_pass(name: str):
    assert_exact(published(name), 3, 32, 32)


def small_resnet() -> nn.Module:
    downsample = nn.Sequential(conv1x1(8, 16, 2), nn.BatchNorm2d(16))
    blocks = BasicBlock(8, 8), BasicBlock(8, 16, 2, downsample), BasicBlock(16, 16)
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))


def small_mobilenet() -> nn.Module:
    row = InvertedResidualConfig
    settings = [row(8, 3, 16, 8, True, "RE", 2, 1, 1.0), row(8, 5, 24, 8, True, "HS", 1, 1, 1.0)]
    return torchvision.models.MobileNetV3(settings, 16, num_classes=2)


def small_densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2), 16, bn_size=2, num_classes=2)


def small_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 12, 20, num_classes=2)


@pytest.mark.usefixtures("of_one_size")
@pytest.mark.parametrize("build", [small_resnet, small_mobilenet, small_densenet, small_convnext, small_transformer])
def test_a_small_network_of_published_parts_is_exact_in_one_pass(build: Callable[[], nn.Module]):
    torch.manual_seed(4)
    assert_exact(drawn(build()), 3, 16, 16)


@pytest.mark.usefixtures("of_one_size")
@pytest.mark.parametrize("build", [
    pytest.param(lambda: torchvision.models.efficientnet_b0(weights=None, num_classes=2), marks=pytest.mark.slow),
    small_convnext,
])  # fmt: skip
def test_what_a_network_draws_in_training_leaves_it_in_one_pass_and_bounded(build: Callable[[], nn.Module]):
    model = drawn(build()).train()
    assert any(isinstance(m, torchvision.ops.StochasticDepth) and m.p > 0 for m in model.modules())
    engine = Engine.on(model, losses, films([0], 3, 32, 32))
    assert engine.in_one_pass
    records = films([0, 1, 2], 3, 32, 32)
    found = engine.clipped_sum(trainable(model), records, clip_norm=0.01, records_per_patient=1)
    assert 0 < length(found) <= 0.03


@pytest.mark.parametrize("build", [
    pytest.param(lambda: torchvision.models.resnet18(weights=None, num_classes=2), marks=pytest.mark.slow),
    small_resnet, small_mobilenet, small_densenet, small_convnext, small_transformer,
])  # fmt: skip
def test_a_published_network_is_admitted_with_group_norm(build: Callable[[], nn.Module]):
    preflight(Films(with_group_norm(build())), losses, films([0], 3, 16, 16, dtype=torch.float32))


@pytest.mark.usefixtures("of_one_size")
def test_the_clipped_sum_of_a_published_network_is_that_of_opacus():
    torch.manual_seed(2)
    model = Films(with_group_norm(torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=2)))
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # Opacus cannot
    records = films([0, 1, 2, 3, 4], 3, 64, 64, dtype=torch.float32)
    engine = Engine.on(model, losses, records)
    assert engine.in_one_pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule

        hooked = GradSampleModule(model, loss_reduction="sum")
        losses(hooked(**records.fields), records.label).sum().backward()
    each = {name: p.grad_sample for name, p in model.named_parameters()}
    hooked.remove_hooks()
    lengths = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
    clip = float(lengths.median())
    factor = (clip * (1 - headroom(torch.float32)) / lengths).clamp(max=1.0)
    expected = {name: torch.tensordot(factor, g, 1) for name, g in each.items()}
    found = engine.clipped_sum(trainable(model), records, clip_norm=clip, records_per_patient=1)
    assert length({name: found[name] - g for name, g in expected.items()}) <= 1e-4 * length(expected)


@pytest.mark.usefixtures("of_one_size")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * ("resnet" in n)) for n in sorted(TASKS)])
def test_every_shipped_network_goes_in_one_pass(name: str):
    task = TASKS[name]
    assert Engine.on(task.private_part(task.model({}, seed=0)), task.loss, task.blank(1)).in_one_pass


# --- parameters outside of known layers -----------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Patches, a class token and learned positions, mixed by linear layers over places and over features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.scale = nn.Parameter(torch.randn(1, 1, 8))
        self.over_places, self.over_features = nn.Linear(5, 5), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        x = x + self.over_places(x.mT).mT.tanh()
        x = x + self.scale * self.over_features(x).tanh()
        logits: Tensor = self.fc(x[:, 0])
        return logits


class Scaled(nn.Module):
    """A residual branch with a bare scale for each channel, and a learned image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.layer_scale = nn.Parameter(torch.randn(3, 1, 1))
        self.shift = nn.Parameter(torch.randn(1, 3, 4, 4))
        self.fc = nn.Linear(48, 2)

    def forward(self, image: Tensor) -> Tensor:
        y = self.layer_scale * self.conv(image).relu_()
        y += image
        logits: Tensor = self.fc((y + self.shift).flatten(1))
        return logits


@pytest.mark.usefixtures("of_one_size")
def test_bare_parameters_that_meet_the_batch_by_broadcasting_go_in_one_pass():
    torch.manual_seed(6)
    assert_exact(Tokens().double(), 4, 6)
    assert_exact(Scaled().double(), 3, 4, 4)


# --- what one pass does not cover -----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.other.weight = self.one.weight

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.other(self.one(image).tanh()).tanh())
        return logits


class Reused(nn.Module):
    """One layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fc = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.layer(self.layer(image).tanh()).tanh())
        return logits


class Borrowed(nn.Module):
    """A layer's weight, used outside of the layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fc = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.layer(image).tanh() @ self.layer.weight)
        return logits


class Matrix(nn.Module):
    """A layer of somebody's own, whose parameter does not meet the batch by broadcasting."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Doubling(nn.Linear):
    """No `nn.Linear`, although it is one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def in_a_row(*layers: nn.Module) -> Films:
    return Films(nn.Sequential(*layers, nn.Tanh(), nn.Linear(6, 2)))


def frozen_and_reused() -> nn.Module:
    model = Reused()
    model.fc.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("build", [
    Tied, Reused, Borrowed, frozen_and_reused,
    pytest.param(lambda: in_a_row(Matrix()), id="matrix"),
    pytest.param(lambda: in_a_row(Doubling(6, 6)), id="subclass"),
    pytest.param(lambda: in_a_row(parametrizations.weight_norm(nn.Linear(6, 6))), id="weight_norm"),
    pytest.param(lambda: in_a_row(parametrizations.orthogonal(nn.Linear(6, 6))), id="orthogonal"),
    pytest.param(lambda: in_a_row(torch.nn.utils.weight_norm(nn.Linear(6, 6))), id="hook"),  # cannot even be copied
])  # fmt: skip
def test_what_one_pass_does_not_cover_is_exact_record_by_record(build: Callable[[], nn.Module]):
    torch.manual_seed(7)
    model = build().double()
    engine = Engine.on(model, losses, films([0], 6))
    assert not engine.in_one_pass
    for patient in AS_PATIENTS.values():
        records = films(patient, 6)
        assert_clipped(engine, trainable(model), records, plain_gradients(model, records))


# --- GroupNorm in place of BatchNorm --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "groups"), [
    (nn.BatchNorm2d(64), 32),
    (nn.BatchNorm2d(48), 16),
    (nn.BatchNorm2d(7), 1),
    (nn.BatchNorm3d(96), 32),
    (nn.SyncBatchNorm(64), 32),
    (nn.BatchNorm1d(512), 32),
    (nn.BatchNorm1d(64), 8),
    (nn.BatchNorm1d(5), 1),
])  # fmt: skip
def test_a_batch_norm_becomes_a_group_norm_of_at_most_32_groups(layer: nn.Module, groups: int):
    norm = with_group_norm(layer)
    assert type(norm) is nn.GroupNorm
    assert (norm.num_groups, norm.num_channels, norm.affine) == (groups, layer.num_features, True)
    assert bool((norm.weight == 1).all())
    assert not norm.bias.any()


def test_names_stay_what_they_were_and_no_statistics_are_left():
    network = torchvision.models.resnet18(weights=None, num_classes=2)
    before = {name: p.shape for name, p in network.named_parameters()}
    kept = network.fc
    assert with_group_norm(network) is network
    assert {name: p.shape for name, p in network.named_parameters()} == before
    assert not list(network.buffers())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    assert network.fc is kept


def test_a_group_norm_is_as_the_batch_norm_was():
    with torch.device("meta"):
        assert with_group_norm(nn.Sequential(nn.BatchNorm2d(8)))[0].weight.is_meta
    assert with_group_norm(nn.BatchNorm2d(8, affine=False)).weight is None
    assert with_group_norm(nn.BatchNorm2d(8).double()).weight.dtype == torch.float64
    assert not with_group_norm(nn.BatchNorm2d(8).eval()).training
    frozen = with_group_norm(nn.BatchNorm2d(8).requires_grad_(False))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_what_a_batch_norm_had_learned_is_not_taken_over():
    layer = nn.BatchNorm2d(8)
    nn.init.constant_(layer.weight, 5.0)
    nn.init.constant_(layer.bias, 3.0)
    norm = with_group_norm(layer)
    assert bool((norm.weight == 1).all())
    assert not norm.bias.any()


def test_one_batch_norm_in_two_places_becomes_one_group_norm_and_other_layers_stay():
    shared, other = nn.BatchNorm2d(8), nn.InstanceNorm2d(8)
    model = with_group_norm(nn.Sequential(nn.Sequential(shared, other), nn.Sequential(shared)))
    assert model[0][0] is model[1][0]
    assert model[0][1] is other


@pytest.mark.parametrize("channels", [2, 8, 16, 32, 64])
def test_behind_a_linear_layer_a_group_norm_still_lets_something_through(channels: int):
    norm = with_group_norm(nn.BatchNorm1d(channels))
    x = torch.randn(40, channels, generator=torch.Generator().manual_seed(1))
    different = len(torch.unique(norm(x).round(decimals=3)))
    assert different > (40 if channels > 2 else 1)


def test_a_lazy_batch_norm_is_refused():
    with pytest.raises(ValueError, match="does not know its channels"):
        with_group_norm(nn.Sequential(nn.LazyBatchNorm2d()))
