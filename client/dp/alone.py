"""Gradients record by record, through torch's own autograd: for networks that one pass does not cover, and as its judge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from wardround.common.tasks import Records
from wardround.common.tasks.base import Loss


def mean_gradients(
    model: nn.Module, loss: Loss, weights: Mapping[str, Tensor], records: Records
) -> Iterator[dict[str, Tensor]]:
    """Each patient's mean gradient in turn; `records` are grouped by patient.

    Every record is alone in its batch, so no layer or loss can couple it to another, and no shape depends on who else is
    there.
    """
    learning = {name: w.detach().requires_grad_() for name, w in weights.items()}
    _, size = torch.unique_consecutive(records.patient, return_counts=True)
    start = 0
    for count in size.tolist():
        total: list[Tensor] = []
        for at in range(start, start + count):
            alone = {name: t[at : at + 1] for name, t in records.fields.items()}
            value = loss(torch.func.functional_call(model, learning, args=(), kwargs=alone), records.label[at : at + 1])
            found = torch.autograd.grad(value.sum(), list(learning.values()), allow_unused=True, materialize_grads=True)
            total = [t + f for t, f in zip(total, found, strict=True)] if total else list(found)
        start += count
        yield {name: t / count for name, t in zip(learning, total, strict=True)}


def squared_length(gradient: Mapping[str, Tensor]) -> Tensor:
    """Squared length of one gradient over all its tensors, float64."""
    return torch.stack([g.double().square().sum() for g in gradient.values()]).sum()
