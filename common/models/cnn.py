"""Convolutional networks for images, with GroupNorm: no record's output depends on its neighbours in the batch."""

from __future__ import annotations

from torch import Tensor, nn


class CNN(nn.Module):
    """Small images -> class scores.  `image` (batch, channels, side, side) -> logits (batch, classes)."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(32 * (side // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, classes))

    def forward(self, image: Tensor) -> Tensor:
        """(batch, channels, side, side) -> (batch, classes)."""
        logits: Tensor = self.classifier(self.features(image).flatten(1))
        return logits


def cnn(*, channels: int = 1, side: int = 28, classes: int = 2) -> CNN:
    """Two convolutions, two linear layers; 205,890 parameters for 28 x 28 grey images and two classes."""
    return CNN(channels, side, classes)


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
