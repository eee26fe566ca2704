"""Activations with a slope that learns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wardround.client.dp.taps.base import Tap
from wardround.client.dp.taps.kept import Built, Groups, Kept


class PReLUTap(Tap):
    """max(x, 0) + weight * min(x, 0), one weight or one for each channel (He et al. 2015)."""

    layer: nn.PReLU

    def act(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Tap`."""
        return F.prelu(x, *weights), ()

    def keep(self, x: Tensor, g: Tensor, again: Sequence[Tensor], groups: Groups) -> Kept:
        """See `Tap`."""
        of_channels = (g * x.clamp(max=0)).flatten(2).sum(2) if x.dim() > 2 else g * x.clamp(max=0)
        one = self.layer.weight.numel() == 1
        return Built({"weight": groups.mean(of_channels.flatten(1).sum(1, keepdim=True) if one else of_channels)})

    def pull_back(self, x: Tensor, g: Tensor, weights: Sequence[Tensor], again: Sequence[Tensor]) -> Tensor:
        """See `Tap`."""
        slope = weights[0].view(-1, *[1] * (x.dim() - 2))
        return torch.where(x > 0, g, g * slope)
