"""Normalisation inside one record: by group, instance, layer, root mean square. Its gradients are small, so they are built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wardround.client.dp.taps.base import Tap
from wardround.client.dp.taps.kept import Built, Groups, Kept


class _ScaleTap(Tap):
    """y = weight * normal(x) + bias."""

    def _built(self, weight: Tensor, bias: Tensor, groups: Groups) -> Kept:
        found = {"weight": weight, "bias": bias}
        return Built({name: groups.mean(g) for name, g in found.items() if name in self.learns})


class GroupNormTap(_ScaleTap):
    """Group normalisation (Wu and He 2018), channels second."""

    layer: nn.GroupNorm

    @property
    def _groups(self) -> int:
        return self.layer.num_groups

    def act(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Tap`."""
        x = x.contiguous()
        count, channels = x.shape[:2]
        weight, bias = (w.to(x.dtype) for w in weights)
        y, mean, inverse = torch.ops.aten.native_group_norm(
            x, weight, bias, count, channels, x[0, 0].numel(), self._groups, self.layer.eps
        )
        return y, (mean, inverse)

    def keep(self, x: Tensor, g: Tensor, again: Sequence[Tensor], groups: Groups) -> Kept:
        """See `Tap`."""
        mean, inverse = (t.repeat_interleave(x.shape[1] // self._groups, dim=1) for t in again)  # (records, channels)
        x, g = x.reshape(*x.shape[:2], -1), g.reshape(*g.shape[:2], -1)
        bias = g.sum(2)
        weight = (torch.linalg.vecdot(g, x) - mean * bias) * inverse
        return self._built(weight, bias, groups)

    def pull_back(self, x: Tensor, g: Tensor, weights: Sequence[Tensor], again: Sequence[Tensor]) -> Tensor:
        """See `Tap`."""
        count, channels = x.shape[:2]
        back: Tensor = torch.ops.aten.native_group_norm_backward(
            g.contiguous(), x.contiguous(), *again, weights[0], count, channels, x[0, 0].numel(), self._groups,
            (True, False, False),
        )[0]  # fmt: skip
        return back


class InstanceNormTap(GroupNormTap):
    """Instance normalisation (Ulyanov et al. 2016) without running statistics: a group for each channel."""

    layer: Any

    @classmethod
    def takes(cls, layer: nn.Module) -> bool:
        """See `Tap`: running statistics would leave the record."""
        return not getattr(layer, "track_running_stats", True)

    @property
    def _groups(self) -> int:
        channels: int = self.layer.num_features
        return channels


class LayerNormTap(_ScaleTap):
    """Layer normalisation (Ba et al. 2016) over the last dimensions."""

    layer: nn.LayerNorm

    def act(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Tap`."""
        x = x.contiguous()
        weight, bias = (*(w.to(x.dtype) for w in weights), None, None)[:2]
        y, mean, inverse = torch.ops.aten.native_layer_norm(x, self.layer.normalized_shape, weight, bias, self.layer.eps)
        return y, (mean, inverse)

    def keep(self, x: Tensor, g: Tensor, again: Sequence[Tensor], groups: Groups) -> Kept:
        """See `Tap`."""
        mean, inverse = again
        over = tuple(range(1, x.dim() - len(self.layer.normalized_shape)))
        weight = g * ((x - mean) * inverse)
        return self._built(weight.sum(over) if over else weight, g.sum(over) if over else g.clone(), groups)

    def pull_back(self, x: Tensor, g: Tensor, weights: Sequence[Tensor], again: Sequence[Tensor]) -> Tensor:
        """See `Tap`."""
        weight, bias = (*weights, None)[:2]
        back: Tensor = torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x.contiguous(), self.layer.normalized_shape, *again, weight, bias, (True, False, False)
        )[0]
        return back


class RMSNormTap(_ScaleTap):
    """Root mean square normalisation (Zhang and Sennrich 2019) over the last dimensions."""

    layer: nn.RMSNorm

    def _normal(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.rms_norm(x, self.layer.normalized_shape, weight, self.layer.eps)

    def act(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Tap`."""
        return self._normal(x, weights[0].to(x.dtype)), ()

    def keep(self, x: Tensor, g: Tensor, again: Sequence[Tensor], groups: Groups) -> Kept:
        """See `Tap`."""
        over = tuple(range(1, x.dim() - len(self.layer.normalized_shape)))
        weight = g * self._normal(x)
        return Built({"weight": groups.mean(weight.sum(over) if over else weight)})

    def pull_back(self, x: Tensor, g: Tensor, weights: Sequence[Tensor], again: Sequence[Tensor]) -> Tensor:
        """See `Tap`."""
        with torch.enable_grad():
            again_x = x.detach().requires_grad_()
            y = self._normal(again_x, weights[0])
        return torch.autograd.grad(y, again_x, g)[0]


class ChannelNormTap(LayerNormTap):
    """Layer normalisation over the channels at each point of an image, as ConvNeXt does it (Liu et al. 2022)."""

    def forward(self, x: Tensor) -> Tensor:
        """See `Tap`. The channels go last and come back."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
