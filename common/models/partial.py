"""Which part of a classifier learns: all of it, its head, or the head and the last block before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from wardround.common.models.parts import among

_ROWS = nn.Sequential, nn.ModuleList
_FROZEN_SEED = 0  # frozen weights that come out of no file are not exchanged, so every site has to make the same ones


def partly(build: Callable[[], nn.Module], train: str) -> nn.Module:
    """The network of `build`, whose layers stand in the order in which they compute; `train` says what learns of it.

    Args:
        build: a fresh network.
        train: "all", "head" (the layers behind the features), or "last-block" (the head and the last block of the features).
            The rest stays as it was made, the same for every seed.

    Raises:
        ValueError: another `train`.
    """
    first = among("train", train, {"all": None, "head": _head, "last-block": _last_block})
    network = build()
    if first is None:
        return network
    start = first(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_FROZEN_SEED)
        fixed = build()
    for (own, p), q in zip(network.named_parameters(), fixed.parameters(), strict=True):
        if own == start:
            break
        p.data.copy_(q.data)
        p.requires_grad_(False)
    return network


def _blocks(layer: nn.Module, prefix: str = "") -> list[str]:
    """Full names of the children that hold a matrix, in the order in which they compute."""
    return [f"{prefix}{name}" for name, child in layer.named_children() if any(p.dim() > 1 for p in child.parameters())]


def _ends(network: nn.Module) -> list[str]:
    """The features' last part and the head; what only wraps a network is looked through."""
    found = _blocks(network)
    while len(found) == 1:
        found = _blocks(network.get_submodule(found[0]), f"{found[0]}.")
    return found[-2:]


def _first(network: nn.Module, name: str) -> str:
    return next(f"{name}.{own}" for own, _ in network.get_submodule(name).named_parameters())


def _head(network: nn.Module) -> str:
    """The head's first parameter."""
    return _first(network, _ends(network)[1])


def _last_block(network: nn.Module) -> str:
    """The first parameter of the last block before the head."""
    return _first(network, _innermost(network, _ends(network)[0]))


def _innermost(network: nn.Module, name: str) -> str:
    """The last block within `name`: what only holds blocks in a row is none itself."""
    layer = network.get_submodule(name)
    inner = _blocks(layer, f"{name}.")
    if inner and (type(layer) in _ROWS or (len(inner) == 1 and _holds_blocks(network.get_submodule(inner[0])))):
        return _innermost(network, inner[-1])
    return name


def _holds_blocks(layer: nn.Module) -> bool:
    return type(layer) in _ROWS and any(True for child in layer.children() for _ in child.children())
