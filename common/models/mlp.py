"""A multi-layer perceptron for tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Table rows -> class scores.  `table` (batch, features) -> logits (batch, classes)."""

    def __init__(self, features: int, classes: int, hidden: Sequence[int]) -> None:
        super().__init__()
        sizes = [features, *hidden]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], classes))

    def forward(self, table: Tensor) -> Tensor:
        """(batch, features) -> (batch, classes)."""
        logits: Tensor = self.layers(table)
        return logits


def mlp(*, features: int, classes: int = 2, hidden: Sequence[int] = (16,)) -> MLP:
    """An `MLP` with `hidden` tanh layers; an empty list is logistic regression."""
    return MLP(features, classes, hidden)
