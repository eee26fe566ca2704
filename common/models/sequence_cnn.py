"""A convolutional network along time, for signals such as the beats of an electrocardiogram."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from wardround.common.models.parts import dropout as dropping
from wardround.common.models.parts import group_norm, whole


class SequenceCNN(nn.Module):
    """`signal` (batch, channels, length) -> logits (batch, classes); any length from 2 ** len(widths) on."""

    def __init__(self, channels: int, classes: int, widths: Sequence[int], kernel: int, drop: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in pairwise((channels, *widths)):
            layers += nn.Conv1d(inside, outside, kernel, padding=kernel // 2), group_norm(outside), nn.ReLU(), nn.MaxPool1d(2)
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(4), nn.Flatten(), dropping(drop))
        self.head = nn.Linear(4 * widths[-1], classes)

    def forward(self, signal: Tensor) -> Tensor:
        """(batch, channels, length) -> (batch, classes)."""
        logits: Tensor = self.head(self.features(signal))
        return logits


def sequence_cnn(
    *, channels: int = 1, classes: int = 5, widths: Sequence[int] = (16, 32, 64), kernel: int = 7, dropout: float = 0.0
) -> SequenceCNN:
    """A convolution, GroupNorm and halving for each of `widths`; 19,653 parameters for one channel and five classes."""
    whole(channels=channels, classes=classes, kernel=kernel, widths=len(widths))
    return SequenceCNN(channels, classes, widths, kernel, dropout)
