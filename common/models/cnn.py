"""Convolutional networks for images, with GroupNorm: no record's output depends on its neighbours in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from wardround.common.models.parts import dropout as dropping
from wardround.common.models.parts import whole


class MaxPool(nn.MaxPool2d):
    """`nn.MaxPool2d` with the channels last in memory: torch's kernel for that is nine times faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same, smaller."""
        largest: Tensor = super().forward(x if x.is_cuda else x.contiguous(memory_format=torch.channels_last))
        return largest


class CNN(nn.Module):
    """Small images -> class scores.  `image` (batch, channels, side, side) -> logits (batch, classes)."""

    def __init__(
        self, channels: int, side: int, classes: int, widths: Sequence[int] = (16, 32), hidden: int = 128, drop: float = 0.0
    ) -> None:
        super().__init__()
        whole(channels=channels, side=side, classes=classes)
        if side < 2 ** len(widths):
            raise ValueError(f"side is {side}; {len(widths)} halvings want {2 ** len(widths)} or more")
        layers: list[nn.Module] = []
        for inside, outside in pairwise((channels, *widths)):
            # the largest of four is the same before and after a ReLU, but a quarter of the work behind it
            layers += nn.Conv2d(inside, outside, 3, padding=1), MaxPool(2), nn.ReLU()
        self.features = nn.Sequential(*layers)
        self.dropout = dropping(drop)
        flat = widths[-1] * (side // 2 ** len(widths)) ** 2
        self.classifier = nn.Sequential(nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, image: Tensor) -> Tensor:
        """(batch, channels, side, side) -> (batch, classes)."""
        logits: Tensor = self.classifier(self.dropout(self.features(image).flatten(1)))
        return logits


def cnn(*, channels: int = 1, side: int = 28, classes: int = 2, dropout: float = 0.0) -> CNN:
    """Two convolutions, two linear layers; 205,890 parameters for 28 x 28 grey images and two classes."""
    return CNN(channels, side, classes, drop=dropout)


def two_conv_cnn(*, channels: int = 3, side: int = 32, classes: int = 10, dropout: float = 0.0) -> CNN:
    """Convolutions to 32 and 64 channels, then 128 features; 545,098 parameters for 3 x 32 x 32 and ten classes."""
    return CNN(channels, side, classes, (32, 64), 128, dropout)


def three_conv_cnn(*, channels: int = 3, side: int = 32, classes: int = 10, dropout: float = 0.0) -> CNN:
    """Convolutions to 32, 64 and 128 channels, then 1,000 features; 2,152,258 parameters for 3 x 32 x 32 and ten classes."""
    return CNN(channels, side, classes, (32, 64, 128), 1000, dropout)


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016), normalised over groups of channels."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(32, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(32, outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.GroupNorm(32, outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        out: Tensor = (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()
        return out


class ResNet18(nn.Module):
    """ResNet-18 with GroupNorm.  `image` (batch, channels, height, width) -> logits (batch, classes)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 64, 7, 2, 3, bias=False), nn.GroupNorm(32, 64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        self.stages = nn.Sequential(*(nn.Sequential(_Block(i, o, s), _Block(o, o, 1)) for i, o, s in widths))
        self.fc = nn.Linear(512, classes)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)."""
        logits: Tensor = self.fc(self.stages(self.stem(image)).mean((2, 3)))
        return logits


def resnet18(*, channels: int = 1, classes: int = 2) -> ResNet18:
    """ResNet-18 with GroupNorm in place of BatchNorm; 11.17 million parameters."""
    return ResNet18(channels, classes)
