"""A small network for films with standardised weights (Qiao et al. 2019, https://arxiv.org/abs/1903.10520) and GroupNorm.

De et al. 2022 (https://arxiv.org/abs/2204.13650) found the pair to learn well under patient-level noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wardround.common.models.parts import dropout as dropping
from wardround.common.models.parts import group_norm, whole


class StandardisedConv(nn.Module):
    """A 3x3 convolution whose weight has mean 0 and variance 1 / fan-in for each channel that comes out.

    (batch, inside, height, width) -> (batch, outside, height, width). A GroupNorm behind it does without a bias.
    """

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        # the records are in front, one weight for all of them: the private engine puts one for each record there
        self.weight = nn.Parameter(torch.empty(1, outside, inside, 3, 3))
        nn.init.kaiming_uniform_(self.weight[0], a=5**0.5)  # torch's own for convolutions

    def forward(self, x: Tensor) -> Tensor:
        """See above."""
        flat = self.weight.flatten(2)
        variance, mean = torch.var_mean(flat, 2, correction=0, keepdim=True)
        weight = ((flat - mean) * torch.rsqrt(variance * flat.shape[2] + 1e-8)).view_as(self.weight)
        if len(weight) == 1:
            return F.conv2d(x, weight[0], padding=1)
        return (weight.flatten(2) @ F.unfold(x, 3, padding=1)).view(len(x), -1, *x.shape[2:])


class StandardisedCNN(nn.Module):
    """`image` (batch, channels, side, side) -> logits (batch, classes)."""

    def __init__(self, channels: int, classes: int, width: int, drop: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            StandardisedConv(channels, width), group_norm(width), nn.ReLU(), nn.MaxPool2d(2),
            StandardisedConv(width, 2 * width), group_norm(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            StandardisedConv(2 * width, 4 * width), group_norm(4 * width), nn.ReLU(),
        )  # fmt: skip
        self.dropout = dropping(drop)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, channels, side, side) -> (batch, classes)."""
        logits: Tensor = self.head(self.dropout(self.features(image).mean((2, 3))))
        return logits


def ws_cnn(*, channels: int = 1, classes: int = 2, width: int = 16, dropout: float = 0.0) -> StandardisedCNN:
    """Three standardised convolutions and the mean over places; 23,538 parameters for grey images and two classes."""
    whole(channels=channels, classes=classes, width=width)
    return StandardisedCNN(channels, classes, width, dropout)
