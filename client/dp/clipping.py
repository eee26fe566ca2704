"""The sum of clipped patient gradients: one patient, whatever the records say, moves it by at most the clip norm.

Records are computed in pieces of one fixed shape, filled up with blank ones: the shape of a batch decides which kernels
round how, and a model chosen for it could turn the last bit of one patient's gradient into another patient's presence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wardround.common.tasks import Records
from wardround.common.tasks.base import Loss

_PIECE = 64  # records computed at once, blank ones included; a multiple of it where a patient may have more


@dataclass(frozen=True)
class Piece:
    """Whole patients, filled up with blank records that belong to one more patient, the last, who counts for nothing."""

    records: Records
    counts: Tensor  # (patients + 1,) bool: False for the blank one


def clipped_sum(
    model: nn.Module,
    loss: Loss,
    weights: Mapping[str, Tensor],
    batch: Records,
    *,
    clip_norm: float,
    records_per_patient: int = _PIECE - 1,
) -> dict[str, Tensor]:
    """Sum over patients of min(1, clip_norm / |g|) g, where g is the mean gradient of one patient's records.

    Abadi et al. 2016, https://arxiv.org/abs/1607.00133, with the patient in place of the record. Every record is
    differentiated alone (`torch.func`), so no layer or loss can couple it to its neighbours. Lengths and sums are taken in
    float64. A patient whose gradient is not finite counts as zero. An empty batch gives zeros.

    Args:
        model: the network; its own parameters are not touched.
        loss: logits (1, classes), labels (1,) -> (1,).
        weights: the trainable tensors to differentiate at.
        batch: any records; those of one patient stay together.
        clip_norm: bound on the joint L2 norm of one patient's gradient.
        records_per_patient: a public bound on how many records a patient has in `batch`.

    Returns:
        One tensor for each of `weights`, float64.

    Raises:
        ValueError: a patient has more records than the bound.
    """
    total = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    for piece in _pieces(batch, _PIECE * (records_per_patient // _PIECE + 1)):
        mean = _mean_gradients(model, loss, weights, piece.records)
        squares = torch.stack([g.flatten(1).double().square().sum(1) for g in mean.values()]).sum(0)
        # a hair below the norm, so that rounding cannot step over it
        factor = (clip_norm * (1 - 1e-6) / squares.sqrt()).clamp(max=1.0)
        factor = torch.where(squares.isfinite() & piece.counts, factor, 0.0)
        for name, g in mean.items():
            total[name] += torch.tensordot(factor, g.double().nan_to_num(0.0, 0.0, 0.0), 1)
    return total


def _mean_gradients(model: nn.Module, loss: Loss, weights: Mapping[str, Tensor], records: Records) -> dict[str, Tensor]:
    """Mean gradient of each patient: tensors (patients, ...)."""

    def of_one(params: dict[str, Tensor], fields: dict[str, Tensor], label: Tensor) -> Tensor:
        alone = {name: tensor.unsqueeze(0) for name, tensor in fields.items()}
        logits = torch.func.functional_call(model, params, args=(), kwargs=alone)
        return loss(logits, label.unsqueeze(0)).squeeze(0)

    each = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0), randomness="different")
    gradients: dict[str, Tensor] = each(dict(weights), dict(records.fields), records.label)
    size = torch.bincount(records.patient)
    summed = {
        name: torch.zeros(len(size), *g.shape[1:], dtype=g.dtype, device=g.device).index_add_(0, records.patient, g)
        for name, g in gradients.items()
    }
    return {name: s / size.view(-1, *[1] * (s.dim() - 1)) for name, s in summed.items()}


def _pieces(batch: Records, size: int) -> list[Piece]:
    """`batch` in pieces of `size` records, grouped by patient, the last blank; a patient cut in two would be clipped twice."""
    if not len(batch):
        return []
    batch = batch.take(torch.argsort(batch.patient, stable=True))
    ends = torch.unique_consecutive(batch.patient, return_counts=True)[1].cumsum(0)
    pieces, start = [], 0
    while start < len(batch):
        fitting = ends[(ends > start) & (ends < start + size)]  # one place at least stays blank
        if not len(fitting):
            raise ValueError(f"a patient has more than {size - 1} records in one batch")
        stop = int(fitting[-1])
        pieces.append(_filled(batch.take(torch.arange(start, stop)), size))
        start = stop
    return pieces


def _filled(records: Records, size: int) -> Piece:
    missing, patients, device = size - len(records), records.patients, records.patient.device
    fields = {name: torch.cat([t, t.new_zeros(missing, *t.shape[1:])]) for name, t in records.fields.items()}
    label = torch.cat([records.label, records.label.new_zeros(missing)])
    patient = torch.cat([records.patient, torch.full((missing,), patients, device=device)])
    return Piece(Records(fields, label, patient), torch.arange(patients + 1, device=device) < patients)
