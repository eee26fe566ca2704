"""The sum of clipped patient gradients: one patient, whatever the records say, moves it by at most the clip norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wardround.common.tasks import Records
from wardround.common.tasks.base import Loss

_RECORDS_AT_ONCE = 256


def clipped_sum(
    model: nn.Module, loss: Loss, weights: Mapping[str, Tensor], batch: Records, *, clip_norm: float
) -> dict[str, Tensor]:
    """Sum over patients of min(1, clip_norm / |g|) g, where g is the mean gradient of one patient's records.

    Every record is differentiated alone (`torch.func`), so nothing couples it to its neighbours, whatever the model. A
    patient whose gradient is not finite counts as zero. An empty batch gives zeros. Abadi et al. 2016,
    https://arxiv.org/abs/1607.00133, with the patient in place of the record.

    Args:
        model: the network; its own parameters are not touched.
        loss: logits (1, classes), labels (1,) -> (1,).
        weights: the trainable tensors to differentiate at.
        batch: any records; those of one patient stay together.
        clip_norm: bound on the joint L2 norm of one patient's gradient.

    Returns:
        One tensor for each of `weights`, float64.
    """
    total = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    for chunk in _whole_patients(batch):
        mean = _mean_gradients(model, loss, weights, chunk)
        squares = torch.stack([g.flatten(1).double().square().sum(1) for g in mean.values()])
        length = squares.sum(0).sqrt()
        # a hair below the norm, so that rounding cannot step over it
        factor = (clip_norm * (1 - 1e-6) / length).clamp(max=1.0)
        factor = torch.where(length.isfinite(), factor, 0.0)
        for name, g in mean.items():
            total[name] += torch.tensordot(factor, g.double().nan_to_num(0.0, 0.0, 0.0), 1)
    return total


def _mean_gradients(model: nn.Module, loss: Loss, weights: Mapping[str, Tensor], chunk: Records) -> dict[str, Tensor]:
    """Mean gradient of each patient in `chunk`: tensors (patients, ...)."""

    def of_one(params: dict[str, Tensor], fields: dict[str, Tensor], label: Tensor) -> Tensor:
        alone = {name: tensor.unsqueeze(0) for name, tensor in fields.items()}
        logits = torch.func.functional_call(model, params, args=(), kwargs=alone)
        return loss(logits, label.unsqueeze(0)).squeeze(0)

    each = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0), randomness="different")
    gradients: dict[str, Tensor] = each(dict(weights), dict(chunk.fields), chunk.label)
    size = torch.bincount(chunk.patient)
    if int(size.max()) == 1:
        return gradients
    summed = {
        name: torch.zeros(len(size), *g.shape[1:], dtype=g.dtype, device=g.device).index_add_(0, chunk.patient, g)
        for name, g in gradients.items()
    }
    return {name: s / size.view(-1, *[1] * (s.dim() - 1)) for name, s in summed.items()}


def _whole_patients(batch: Records) -> list[Records]:
    """`batch` in pieces of about `_RECORDS_AT_ONCE` records; a patient cut in two would be clipped twice."""
    if len(batch) <= _RECORDS_AT_ONCE:
        return [batch] if len(batch) else []
    batch = batch.take(torch.argsort(batch.patient, stable=True))
    _, size = torch.unique_consecutive(batch.patient, return_counts=True)
    ends = size.cumsum(0)
    pieces, start = [], 0
    while start < len(batch):
        fitting = ends[(ends > start) & (ends <= start + _RECORDS_AT_ONCE)]
        stop = int(fitting[-1]) if len(fitting) else int(ends[ends > start][0])
        pieces.append(batch.take(torch.arange(start, stop)))
        start = stop
    return pieces
