"""A U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) with GroupNorm, for masks of lesions and organs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from wardround.common.models.parts import dropout as dropping
from wardround.common.models.parts import group_norm, whole


def twice(inside: int, outside: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with GroupNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1), group_norm(outside), nn.ReLU(),
        nn.Conv2d(outside, outside, 3, padding=1), group_norm(outside), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """`image` (batch, channels, side, side) -> logits of each pixel's class (batch, classes, side, side)."""

    def __init__(self, channels: int, classes: int, width: int, depth: int, drop: float) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth)]
        self.down = nn.ModuleList(twice(inside, outside) for inside, outside in pairwise((channels, *widths)))
        self.halve = nn.MaxPool2d(2)
        self.dropout = dropping(drop)
        upward = list(pairwise(reversed(widths)))
        self.larger = nn.ModuleList(nn.ConvTranspose2d(inside, outside, 2, 2) for inside, outside in upward)
        self.up = nn.ModuleList(twice(2 * outside, outside) for _, outside in upward)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """See above; the side is a multiple of 2 ** (depth - 1)."""
        x, seen = image, []
        for number, down in enumerate(self.down):
            x = down(self.halve(x) if number else x)
            seen.append(x)
        x = self.dropout(seen.pop())
        for larger, up in zip(self.larger, self.up, strict=True):
            x = up(torch.cat([larger(x), seen.pop()], 1))
        logits: Tensor = self.head(x)
        return logits


def unet(*, side: int, channels: int = 1, classes: int = 1, width: int = 16, depth: int = 3, dropout: float = 0.0) -> UNet:
    """`depth` resolutions, each half of the one before with twice the channels, from `width` on.

    117,393 parameters for one channel and one class as it stands.

    Raises:
        ValueError: the side cannot be halved so often.
    """
    whole(side=side, channels=channels, classes=classes, width=width, depth=depth)
    if side % 2 ** (depth - 1):
        raise ValueError(f"depth is {depth}; a side of {side} cannot be halved {depth - 1} times")
    return UNet(channels, classes, width, depth, dropout)
