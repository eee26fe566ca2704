"""torchvision's networks for classes of images, by name, with GroupNorm for BatchNorm."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from wardround.common.models.group_norm import with_group_norm
from wardround.common.models.parts import whole


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


def published(*, name: str, channels: int = 1, classes: int = 2, side: int = 224, dropout: float | None = None) -> Published:
    """Any classifier of torchvision, without learned weights (`common.start` reads those out of a file).

    Args:
        name: as `torchvision.models.list_models` gives it, such as "resnet18" or "vit_b_16".
        channels: 1 or 3.
        classes: of the answer.
        side: of the image; matters where a network has a weight for each place.
        dropout: before the head, where the network knows it; None leaves it as published.
    """
    whole(channels=channels, classes=classes, side=side)
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; published networks read 1 (grey) or 3 (colour)")
    return Published(_made(name, classes, side, dropout))


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
