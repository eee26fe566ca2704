"""A network and a loss that several files of tests train."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """One field, whatever its name, through layers in a row."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, *given: Tensor, **fields: Tensor) -> Tensor:
        (x,) = (*given, *fields.values())
        logits: Tensor = self.layers(x)
        return logits


def losses(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, reduction="none")
