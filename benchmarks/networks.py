"""The reference networks whose private training is timed: plain torch, as anybody writes them.

Opacus refuses some of them as they are. `for_opacus` is then the same network, with parameters of the same names and shapes,
rewritten the way Opacus asks for: its own recurrent layers, or no addition in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM, DPRNN
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet, resnet18


@dataclass(frozen=True)
class Batch:
    """Records, the first dimension counts them."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str, *, floating: torch.dtype = torch.float32) -> Batch:
        """The same on `device`, numbers with a fraction in `floating`."""
        return Batch(*(t.to(device, floating if t.is_floating_point() else t.dtype) for t in (self.x, self.y)))


@dataclass(frozen=True)
class Network:
    """One network, the batch it is timed with, and what its private training may cost.

    Args:
        one: target for one physical batch a step, in times plain SGD.
        eight: target for eight physical batches a step.
        faster: how many times faster than the best mode of Opacus we want to be.
    """

    name: str
    title: str
    batch_size: int
    build: Callable[[], nn.Module]
    records: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[], nn.Module]
    one: float
    eight: float
    faster: float
    rewritten: Callable[[], nn.Module] | None = None

    def model(self, seed: int = 0) -> nn.Module:
        """The network with the starting weights of `seed`."""
        return _seeded(self.build, seed)

    def for_opacus(self, seed: int = 0) -> nn.Module | None:
        """The same network and weights, rewritten for Opacus; None where nothing can be done."""
        if self.rewritten is None:
            return None
        rewritten = self.rewritten()
        for name, layer in self.model(seed).named_children():  # one by one: Opacus' recurrent layers rename only their own
            getattr(rewritten, name).load_state_dict(layer.state_dict())
        return rewritten

    def batch(self, size: int | None = None, seed: int = 0) -> Batch:
        """Random records, `batch_size` unless said otherwise."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Batch(*self.records(self.batch_size if size is None else size))


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


class SeedCNN(nn.Module):
    """Two convolutions with pooling, two linear layers; 3 x 32 x 32."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.f1, self.f2 = nn.Linear(64 * 8 * 8, 128), nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        return self.f2(F.relu(self.f1(x.flatten(1))))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels)


def resnet18_gn() -> nn.Module:
    """ResNet-18 of torchvision with GroupNorm, otherwise untouched: in-place ReLU, `out += identity`."""
    return resnet18(num_classes=10, norm_layer=_group_norm)


class _Block(BasicBlock):
    """`BasicBlock` that adds into a new tensor: Opacus' full backward hooks raise on `out += identity`."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(out + identity)


def _resnet18_for_opacus() -> nn.Module:
    model = ResNet(_Block, [2, 2, 2, 2], num_classes=10, norm_layer=_group_norm)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


class Recurrent(nn.Module):
    """Embedding, two recurrent layers, the last hidden state into a linear layer; (batch, time) ids to two classes."""

    def __init__(self, layers: Callable[..., nn.Module], *, vocabulary: int, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.e = nn.Embedding(vocabulary, width)
        self.r = layers(width, hidden, num_layers=2, batch_first=True)
        self.o = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        states, _ = self.r(self.e(x))
        return self.o(states[:, -1])


class Discriminator(nn.Module):
    """The discriminator of a DCGAN with GroupNorm; 3 x 32 x 32 to one logit a record."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.n = nn.Sequential(
            *(nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.GroupNorm(16, 2 * width), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False), nn.GroupNorm(16, 4 * width), nn.LeakyReLU(0.2)),
            nn.Conv2d(4 * width, 1, 4, 1, 0),
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.n(x).flatten()


class UNet(nn.Module):
    """Two levels down and up again; 1 x 64 x 64 to one logit a pixel."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.d1, self.d2 = _twice(1, width), _twice(width, 2 * width)
        self.bottom = _twice(2 * width, 4 * width)
        self.u2, self.u1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.m2, self.m1 = _twice(4 * width, 2 * width), _twice(2 * width, width)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        first = self.d1(x)
        second = self.d2(F.max_pool2d(first, 2))
        bottom = self.bottom(F.max_pool2d(second, 2))
        up = self.m2(torch.cat([self.u2(bottom), second], 1))
        return self.out(self.m1(torch.cat([self.u1(up), first], 1)))


def _twice(channels: int, width: int) -> nn.Sequential:
    def one(inward: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inward, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()

    return nn.Sequential(*one(channels), *one(width))


class PixelLoss(nn.Module):
    """Cross-entropy of a mask, averaged over the pixels of each image; then over the images unless reduction is "none"."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        each = F.binary_cross_entropy_with_logits(logits, mask, reduction="none").flatten(1).mean(1)
        return each if self.reduction == "none" else each.mean()


def _images(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,))


def _large_images(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 64, 64), torch.randint(0, 10, (size,))


def _genuine(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 32, 32), torch.ones(size)


def _masks(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 1, 64, 64), torch.rand(size, 1, 64, 64).round()


def _sentences(vocabulary: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda size: (torch.randint(0, vocabulary, (size, 64)), torch.randint(0, 2, (size,)))


NETWORKS = {
    network.name: network
    for network in (
        Network(
            name="cnn",
            title="seed CNN, 3x32x32",
            batch_size=64,
            build=SeedCNN,
            records=_images,
            loss=nn.CrossEntropyLoss,
            one=1.3,
            eight=1.2,
            faster=1.5,
        ),
        Network(
            name="resnet",
            title="ResNet18-GroupNorm, 3x64x64",
            batch_size=16,
            build=resnet18_gn,
            records=_large_images,
            loss=nn.CrossEntropyLoss,
            one=1.5,
            eight=1.35,
            faster=3.0,
            rewritten=_resnet18_for_opacus,
        ),
        Network(
            name="rnn",
            title="Embedding 20k x 128 + 2-layer RNN, T=64",
            batch_size=32,
            build=lambda: Recurrent(nn.RNN, vocabulary=20_000, width=128),
            records=_sentences(20_000),
            loss=nn.CrossEntropyLoss,
            one=1.5,
            eight=1.25,
            faster=3.0,
            rewritten=lambda: Recurrent(DPRNN, vocabulary=20_000, width=128),
        ),
        Network(
            name="dcgan",
            title="DCGAN discriminator, 3x32x32",
            batch_size=64,
            build=Discriminator,
            records=_genuine,
            loss=nn.BCEWithLogitsLoss,
            one=1.5,
            eight=1.35,
            faster=3.0,
        ),
        Network(
            name="lstm",
            title="Embedding 5k x 64 + 2-layer LSTM 128, T=64",
            batch_size=32,
            build=lambda: Recurrent(nn.LSTM, vocabulary=5_000, width=64),
            records=_sentences(5_000),
            loss=nn.CrossEntropyLoss,
            one=1.6,
            eight=1.4,
            faster=3.0,
            rewritten=lambda: Recurrent(DPLSTM, vocabulary=5_000, width=64),
        ),
        Network(
            name="unet",
            title="U-Net, 2 levels, 1x64x64",
            batch_size=16,
            build=UNet,
            records=_masks,
            loss=PixelLoss,
            one=1.6,
            eight=1.4,
            faster=3.0,
        ),
    )
}
