"""torchvision's networks for classes of images, by name: GroupNorm for BatchNorm, and as much of them learning as is wanted."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from wardround.common.models.group_norm import with_group_norm
from wardround.common.models.parts import among, whole

_ROWS = nn.Sequential, nn.ModuleList
_BACKBONE_SEED = 0  # weights that do not learn are not exchanged, so every site has to make the same ones


class Published(nn.Module):
    """A published network for colour images.  `image` (batch, 1 or 3, height, width) -> logits (batch, classes).

    A grey image is given three times over: the network stays the published one, whose weights fit.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """See above."""
        logits: Tensor = self.network(image.expand(-1, 3, -1, -1))
        return logits


def published(
    *, name: str, channels: int = 1, classes: int = 2, side: int = 224, train: str = "all", dropout: float | None = None
) -> Published:
    """Any classifier of torchvision, without learned weights.

    Args:
        name: as `torchvision.models.list_models` gives it, such as "resnet18" or "vit_b_16".
        channels: 1 or 3.
        classes: of the answer.
        side: of the image; matters where a network has a weight for each place.
        train: what learns: "all", "head" (the layers behind the features), or "last-block" (the head and the last block of the
            features). The rest stays as it was made, the same for every seed.
        dropout: before the head, where the network knows it; None leaves it as published.
    """
    whole(channels=channels, classes=classes, side=side)
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; published networks read 1 (grey) or 3 (colour)")
    first = among("train", train, {"all": None, "head": _head, "last-block": _last_block})
    network = _made(name, classes, side, dropout)
    if first is not None:
        start = first(network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_BACKBONE_SEED)
            fixed = _made(name, classes, side, dropout)
        for (own, p), q in zip(network.named_parameters(), fixed.parameters(), strict=True):
            if own == start:
                break
            p.data.copy_(q.data)
            p.requires_grad_(False)
    return Published(network)


def _made(name: str, classes: int, side: int, dropout: float | None) -> nn.Module:
    from torchvision import models  # here, so that who names none of these networks does without torchvision

    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision has no classifier called {name!r}")
    options: dict[str, object] = {"num_classes": classes}
    if dropout is not None:
        options["dropout"] = float(dropout)
    if name.startswith("vit_"):
        options["image_size"] = side
    elif name.startswith("maxvit"):
        options["input_size"] = (side, side)
    elif name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    # RegNet computes its widths with tensors, which have no values where only sizes are asked for
    with torch.device("cpu") if name.startswith("regnet_") else contextlib.nullcontext():
        network: nn.Module = models.get_model(name, weights=None, **options)
    return with_group_norm(network)


def _blocks(layer: nn.Module, prefix: str = "") -> list[str]:
    """Full names of the children that hold a matrix, in the order in which they compute."""
    return [f"{prefix}{name}" for name, child in layer.named_children() if any(p.dim() > 1 for p in child.parameters())]


def _first(network: nn.Module, name: str) -> str:
    return next(f"{name}.{own}" for own, _ in network.get_submodule(name).named_parameters())


def _head(network: nn.Module) -> str:
    """The head's first parameter."""
    return _first(network, _blocks(network)[-1])


def _last_block(network: nn.Module) -> str:
    """The first parameter of the last block before the head."""
    return _first(network, _innermost(network, _blocks(network)[-2]))


def _innermost(network: nn.Module, name: str) -> str:
    """The last block within `name`: what only holds blocks in a row is none itself."""
    layer = network.get_submodule(name)
    inner = _blocks(layer, f"{name}.")
    if inner and (type(layer) in _ROWS or (len(inner) == 1 and _holds_blocks(network.get_submodule(inner[0])))):
        return _innermost(network, inner[-1])
    return name


def _holds_blocks(layer: nn.Module) -> bool:
    return type(layer) in _ROWS and any(True for child in layer.children() for _ in child.children())
