"""The generator and the discriminator of a DCGAN (Radford et al. 2016, https://arxiv.org/abs/1511.06434), with GroupNorm.

The discriminator alone sees patients' images, so it alone is trained privately; what the generator learns through it costs
nothing more. With `kinds`, both are told which kind of image is meant (Mirza and Osindero 2014, https://arxiv.org/abs/1411.1784).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from wardround.common.models.parts import group_norm, whole


class _Kind(nn.Module):
    """A learned map for each kind, as one more channel.  (batch,) int64 -> (batch, 1, side, side)."""

    def __init__(self, kinds: int, side: int) -> None:
        super().__init__()
        self.maps = nn.Embedding(kinds, side * side)
        self.side = side

    def forward(self, kind: Tensor) -> Tensor:
        maps: Tensor = self.maps(kind).view(-1, 1, self.side, self.side)
        return maps


class Generator(nn.Module):
    """`noise` (batch, z) and, with kinds, `kind` (batch,) int64 -> images (batch, channels, side, side) in [-1, 1]."""

    def __init__(self, channels: int, side: int, z: int, width: int, kinds: int) -> None:
        super().__init__()
        sides = [side // 8, side // 4, side // 2, side]
        self.kind = nn.Embedding(kinds, z) if kinds else None
        first = 2 * z if kinds else z
        odd = [large - 2 * small for small, large in pairwise(sides)]  # 3 -> 7 wants one more
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(first, 4 * width, sides[0], bias=False), group_norm(4 * width), nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, odd[0], bias=False), group_norm(2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, odd[1], bias=False), group_norm(width), nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, 2, 1, odd[2]), nn.Tanh(),
        )  # fmt: skip

    def forward(self, noise: Tensor, kind: Tensor | None = None) -> Tensor:
        """See above."""
        if self.kind is not None:
            noise = torch.cat([noise, self.kind(kind)], 1)
        image: Tensor = self.layers(noise[..., None, None])
        return image


class Discriminator(nn.Module):
    """`image` (batch, channels, side, side) and, with kinds, `kind` (batch,) int64 -> logits of being real (batch,)."""

    def __init__(self, channels: int, side: int, width: int, kinds: int) -> None:
        super().__init__()
        self.kind = _Kind(kinds, side) if kinds else None
        self.layers = nn.Sequential(
            nn.Conv2d(channels + bool(kinds), width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), group_norm(2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False), group_norm(4 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, side // 8),
        )  # fmt: skip

    def forward(self, image: Tensor, kind: Tensor | None = None) -> Tensor:
        """See above."""
        if self.kind is not None:
            image = torch.cat([image, self.kind(kind)], 1)
        logits: Tensor = self.layers(image).flatten()
        return logits


def _checked(**sizes: int) -> None:
    whole(**{name: size for name, size in sizes.items() if name != "kinds" or size})
    if sizes["side"] % 4 or sizes["side"] < 16:
        raise ValueError(f"side is {sizes['side']}; a multiple of 4 from 16 on is wanted")


def generator(*, channels: int = 3, side: int = 32, z: int = 100, width: int = 64, kinds: int = 0) -> Generator:
    """From `z` random numbers to an image; 1,068,931 parameters as it stands.

    Args:
        channels: 1 for grey images, 3 for colour.
        side: of the image, a multiple of 4 from 16 on.
        z: how many random numbers an image is made of.
        width: channels before the last layer; those before have two and four times as many.
        kinds: how many kinds of images there are to choose from; 0 for no choice.
    """
    _checked(channels=channels, side=side, z=z, width=width, kinds=kinds)
    return Generator(channels, side, z, width, kinds)


def discriminator(*, channels: int = 3, side: int = 32, width: int = 64, kinds: int = 0) -> Discriminator:
    """Four convolutions, to `width`, twice, four times as many channels and one number; 663,361 parameters as it stands."""
    _checked(channels=channels, side=side, width=width, kinds=kinds)
    return Discriminator(channels, side, width, kinds)
