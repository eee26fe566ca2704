"""Every registered network in a small size, with made-up records and the loss that it is trained by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nets import losses
from wardround.common.models import MODELS
from wardround.common.models.detector import detection_loss
from wardround.common.tasks import Records
from wardround.common.tasks.base import Loss


def of_pixels(logits: Tensor, mask: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, mask, reduction="none").flatten(1).mean(1)


def real_or_not(logits: Tensor, real: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, real, reduction="none")


def of_images(image: Tensor, wanted: Tensor) -> Tensor:
    return (image - wanted).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Case:
    """One network: options, what a record holds (an int n stands for codes 0 .. n - 1), what comes out for it."""

    network: str
    options: Mapping[str, Any]
    fields: Mapping[str, tuple[int, ...] | tuple[str, int, int]]
    output: tuple[int, ...] = (3,)
    label: tuple[int, ...] = ()
    loss: Loss = field(default=losses)

    def __str__(self) -> str:
        chosen = "-".join(str(v) for v in self.options.values() if isinstance(v, str))
        return "-".join(part for part in (self.network, *self.fields, chosen) if part)

    def build(self, **more: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return MODELS[self.network]({**self.options, **more})

    def records(self, count: int, *, dtype: torch.dtype = torch.float32) -> Records:
        random = torch.Generator().manual_seed(2)

        def made(shape: tuple[Any, ...]) -> Tensor:
            if shape[:1] == ("codes",):
                return torch.randint(shape[1], (count, *shape[2:]), generator=random)
            return torch.randn(count, *shape, generator=random, dtype=torch.float64).to(dtype)

        if self.loss is losses:
            label = torch.randint(3, (count,), generator=random)
        else:
            label = torch.rand(count, *self.label, generator=random, dtype=torch.float64).to(dtype)
        return Records({name: made(shape) for name, shape in self.fields.items()}, label, torch.arange(count))


_THREE = {"classes": 3}
_SERIES, _TABLE, _TOKENS, _FILM = {"series": (7, 6)}, {"table": (5,)}, {"tokens": ("codes", 9, 8)}, {"image": (1, 16, 16)}

CASES = [
    Case("mlp", {"features": 5, **_THREE}, _TABLE),
    Case("cnn", {"side": 16, **_THREE}, _FILM),
    Case("two-conv-cnn", {"channels": 1, "side": 16, **_THREE}, _FILM),
    Case("three-conv-cnn", {"channels": 3, "side": 16, **_THREE}, {"image": (3, 16, 16)}),
    Case("ws-cnn", {"width": 8, **_THREE}, _FILM),
    Case("text-rnn", {"vocabulary": 9, "embedding": 6, "hidden": 6, "classes": 3}, _TOKENS),
    Case("text-rnn", {"vocabulary": 9, "embedding": 6, "hidden": 6, "cell": "lstm", "bidirectional": True, **_THREE}, _TOKENS),
    Case("text-rnn", {"vocabulary": 9, "embedding": 6, "hidden": 6, "cell": "gru", "pool": "attention", **_THREE}, _TOKENS),
    Case("text-rnn", {"vocabulary": 9, "embedding": 6, "hidden": 6, "bag": True, "spread": 0.5, **_THREE}, _TOKENS),
    Case("sequence-rnn", {"vocabulary": 9, "hidden": 6, **_THREE}, _TOKENS),
    Case("sequence-rnn", {"vocabulary": 9, "hidden": 6, "pool": "places", "length": 8, **_THREE}, _TOKENS),
    Case("sequence-cnn", {"channels": 2, "widths": [8, 16], **_THREE}, {"signal": (2, 20)}),
    Case("series-rnn", {"inputs": 6, "hidden": 8, **_THREE}, _SERIES),
    Case("series-rnn", {"inputs": 6, "hidden": 8, "table": 5, "cell": "lstm", "layers": 2, **_THREE}, {**_SERIES, **_TABLE}),
    Case("transformer", {"vocabulary": 9, "length": 8, "width": 8, **_THREE}, _TOKENS),
    Case("transformer", {"inputs": 6, "length": 7, "width": 8, **_THREE}, _SERIES),
    Case("fusion", {"inputs": 6, "features": 5, "hidden": 8, **_THREE}, {**_SERIES, **_TABLE}),
    Case("fusion", {"channels": 1, "vocabulary": 9, "hidden": 8, **_THREE}, {**_FILM, **_TOKENS}),
    Case("unet", {"side": 16, "width": 4}, _FILM, (1, 16, 16), (1, 16, 16), of_pixels),
    Case("detector", {"side": 32, "width": 4, "depth": 2}, {"image": (1, 32, 32)}, (5, 8, 8), (4, 4), detection_loss),
    Case("detector", {"side": 16, "width": 4, "depth": 2, **_THREE}, _FILM, (7, 4, 4), (4, 5), detection_loss),
    Case("dcgan-discriminator", {"width": 8}, {"image": (3, 32, 32)}, (), (), real_or_not),
    Case("dcgan-discriminator", {"channels": 1, "side": 28, "width": 8, "kinds": 4},
         {"image": (1, 28, 28), "kind": ("codes", 4)}, (), (), real_or_not),
    Case("dcgan-generator", {"width": 4, "z": 6}, {"noise": (6,)}, (3, 32, 32), (3, 32, 32), of_images),
    Case("dcgan-generator", {"channels": 1, "side": 28, "width": 4, "z": 6, "kinds": 4},
         {"noise": (6,), "kind": ("codes", 4)}, (1, 28, 28), (1, 28, 28), of_images),
]  # fmt: skip

LARGE = [  # the same laws, but minutes for all of them
    Case("resnet18", {"channels": 1, **_THREE}, _FILM),
    Case("torchvision", {"name": "resnet18", "train": "last-block", **_THREE}, _FILM),
    Case("torchvision", {"name": "mobilenet_v3_small", "train": "head", **_THREE}, {"image": (3, 32, 32)}),
    Case("torchvision", {"name": "shufflenet_v2_x0_5", "train": "all", **_THREE}, {"image": (1, 32, 32)}),
]  # fmt: skip
