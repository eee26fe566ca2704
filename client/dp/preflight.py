"""Refused before the first record is opened: networks in which one record's gradient depends on another's."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wardround.common.errors import PlanRefused


def refuse_coupled(model: nn.Module) -> None:
    """Refuse layers that mix the records of a batch or learn statistics without noise.

    Raises:
        PlanRefused: with the layer's name.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) or getattr(layer, "track_running_stats", False):
            raise PlanRefused(
                f"layer {name} ({type(layer).__name__}) mixes the patients of a batch, so no patient's share can be "
                "bounded; use GroupNorm"
            )
        if any(True for _ in getattr(layer, "_forward_pre_hooks", {})):
            raise PlanRefused(f"layer {name} changes its weights in a hook, which cannot be accounted for")
