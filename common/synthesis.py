"""A generator of images and the critic it learns from, in one network, so that both travel as one model.

A generative adversarial network (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661) of the DCGAN kind. Only the critic
is ever shown a record. What the generator learns, it learns from the critic, and an image is made of random numbers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wardround.common.models import MODELS
from wardround.common.weights import Weights

_AT_ONCE = 256  # images


class Critic(nn.Module):
    """`image` (batch, channels, side, side) -> logits (batch, kinds): is it a real image of this kind?

    The convolutions of the DCGAN's discriminator, with an answer for each kind in place of one.
    """

    def __init__(self, channels: int, side: int, width: int, kinds: int) -> None:
        super().__init__()
        known: Any = MODELS["dcgan-discriminator"]({"width": width}, channels=channels, side=side)
        self.layers = nn.Sequential(*known.layers[:-1], nn.Conv2d(4 * width, kinds, side // 8), nn.Flatten())

    def forward(self, image: Tensor) -> Tensor:
        """See above."""
        logits: Tensor = self.layers(softened(image))
        return logits


class Generator(nn.Module):
    """`noise` (batch, z) and `kind` (batch,) int64 -> softened images (batch, channels, side, side) in [-1, 1]."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.layers = MODELS["dcgan-generator"](options)

    def forward(self, noise: Tensor, kind: Tensor) -> Tensor:
        """See above."""
        return softened(self.layers(noise, kind))


def softened(image: Tensor) -> Tensor:
    """Each pixel mixed with its neighbours, in parts 1 : 2 : 1 along each side; (batch, channels, side, side)."""
    return F.avg_pool2d(F.avg_pool2d(F.pad(image, (1, 1, 1, 1), "replicate"), 2, 1), 2, 1)


class Adversaries(nn.Module):
    """`critic` and `generator`. A record goes through the critic: `image` -> logits (batch, kinds)."""

    def __init__(self, *, channels: int, side: int, classes: int, z: int = 32, width: int = 8, critic_width: int = 8) -> None:
        super().__init__()
        self.critic = Critic(channels, side, critic_width, classes)
        self.generator = Generator(channels=channels, side=side, z=z, width=width, kinds=classes)
        self.kinds, self.z = classes, z

    def forward(self, image: Tensor) -> Tensor:
        """What the critic says."""
        logits: Tensor = self.critic(image)
        return logits

    def chance(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """What `count` images are made of: noise (count, z), and kinds (count,), each as often as the others."""
        return torch.randn(count, self.z, generator=random), torch.arange(count) % self.kinds


def taken_for(logits: Tensor, kind: Tensor) -> Tensor:
    """The loss of the critic, (batch, kinds) and (batch,) -> (batch,): a real image of its kind and of no other; -1 of none.

    That an image is shown beside the kinds it is not is what teaches the kinds apart (Reed et al. 2016,
    https://arxiv.org/abs/1605.05396). The generator's loss is the same: its images are to be taken for real ones.
    """
    wanted = (kind[:, None] == torch.arange(logits.shape[1], device=kind.device)).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)


def part(weights: Mapping[str, Tensor], name: str) -> Weights:
    """The tensors of `critic` or `generator`, under its own names."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}


def images(model: Adversaries, weights: Mapping[str, Tensor], count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """`count` images (count, channels, side, side) in [-1, 1], and the kind of each, (count,).

    They follow from the weights and `seed` alone, so where the weights are private, they cost no patient anything more.
    """
    noise, kind = model.chance(count, torch.Generator().manual_seed(seed))
    generator = part(weights, "generator")
    with torch.no_grad():
        parts = [
            torch.func.functional_call(model.generator, generator, (noise[at : at + _AT_ONCE], kind[at : at + _AT_ONCE]))
            for at in range(0, count, _AT_ONCE)
        ]
    return torch.cat(parts), kind
