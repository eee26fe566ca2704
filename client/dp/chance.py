"""Dropout and the like draw from torch's generator: inside a private step its seed is secret too.

Masks lie by place, so one patient more or less moves everybody's. Drawn anew by chance that nobody knows, that is the same
as keeping them; under a seed that is known, it would not be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from wardround.client.dp.coins import Coins

_CHANCES = ("p", "dropout")  # where torch's dropouts and recurrent layers, and torchvision's stochastic depth, keep theirs


def chances(layer: nn.Module) -> list[str]:
    """Names of the attributes by which this very layer drops things at random."""
    return [name for name in _CHANCES if isinstance(one := getattr(layer, name, None), float) and 0 < one <= 1]


@contextlib.contextmanager
def secret_chance(model: nn.Module, coins: Coins, device: torch.device) -> Iterator[None]:
    """Within, what `model` draws follows from `coins`; the global generators stay as they were."""
    if not any(chances(layer) for layer in model.modules()):
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(coins.uniform(1).item() * 2**53))
        yield
