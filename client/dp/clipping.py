"""The sum of clipped patient gradients: one patient, whatever the records say, moves it by at most the clip norm.

Records are computed in pieces of one fixed shape, filled up with blank ones: the shape of a batch decides which kernels
round how, and a model chosen for it could turn the last bit of one patient's gradient into another patient's presence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from wardround.client.dp.taps import Groups, Taps
from wardround.common.tasks import Records
from wardround.common.tasks.base import Loss

_PIECE = 64  # records computed at once, blank ones included; a multiple of it where a patient may have more
_PROOF_RECORDS = 6  # of three patients
_NO_CLIP = 1e12  # no gradient is that long

_TAPS: WeakKeyDictionary[nn.Module, Taps | None] = WeakKeyDictionary()  # None: this network goes record by record
_PROVED: WeakSet[nn.Module] = WeakSet()  # both ways were seen to agree


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

    Abadi et al. 2016, https://arxiv.org/abs/1607.00133, with the patient in place of the record. A patient whose gradient
    is not finite counts as zero. An empty batch gives zeros.

    A network of known layers, each used once, is differentiated in one pass over all records of a piece (`taps`). Any other
    goes record by record (`torch.func`).

    Args:
        model: the network, as working memory: its parameters are overwritten.
        loss: logits (records, classes), labels (records,) -> (records,), each value from its own record alone.
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
    if model not in _TAPS:
        _TAPS[model] = Taps.on(model)
    size = _PIECE * (records_per_patient // _PIECE + 1)
    for piece in _pieces(batch, size):
        if _TAPS[model] is not None and model not in _PROVED:
            _prove(model, loss, piece.records)
        found = _in_one_pass(model, loss, weights, piece, clip_norm)
        if found is None:
            found = _record_by_record(model, loss, weights, piece, clip_norm)
        for name, clipped in found.items():
            total[name] += clipped
    return total


def _in_one_pass(
    model: nn.Module, loss: Loss, weights: Mapping[str, Tensor], piece: Piece, clip_norm: float
) -> dict[str, Tensor] | None:
    """The clipped sum of a piece by book-keeping; None where this network does not allow it."""
    taps = _TAPS[model]
    if taps is None:
        return None
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in learning.items():
        p.data, p.grad = weights[name], None
    records = piece.records
    groups = Groups(records.patient)
    with taps.installed():
        losses = loss(model(**records.fields), records.label)
        torch.autograd.backward((losses * groups.share.to(losses.dtype)).sum())
        if not taps.once_each() or any(p.grad is not None for p in learning.values()):
            for p in learning.values():  # a layer used twice, or a weight used outside of its layer
                p.grad = None
            _TAPS[model] = None
            return None
        with torch.no_grad():
            squares = taps.squares(groups)
            finite = squares.isfinite()
            if finite.all():
                factor = torch.where(piece.counts, _factor(squares, clip_norm), 0.0).to(losses.dtype)
                return {name: gradient.double() for name, gradient in taps.clipped(factor[groups.patient])}
    if not finite[-1]:  # the blank records: with this model nobody's gradient is finite
        return {}
    # zero times infinity is no zero, so these patients' records are blanked, and the shape stays
    return _in_one_pass(model, loss, weights, _blanked(piece, ~finite), clip_norm)


def _record_by_record(
    model: nn.Module, loss: Loss, weights: Mapping[str, Tensor], piece: Piece, clip_norm: float
) -> dict[str, Tensor]:
    mean = _mean_gradients(model, loss, weights, piece.records)
    squares = torch.stack([g.flatten(1).double().square().sum(1) for g in mean.values()]).sum(0)
    factor = torch.where(squares.isfinite() & piece.counts, _factor(squares, clip_norm), 0.0)
    return {name: torch.tensordot(factor, g.double().nan_to_num(0.0, 0.0, 0.0), 1) for name, g in mean.items()}


def _prove(model: nn.Module, loss: Loss, like: Records) -> None:
    """Compare both ways on made-up records and weights; where they differ, this network goes the slower way for good.

    They differ where a network or a loss lets records of a batch see each other. Nothing of a patient or of the
    coordinator's model enters, so which way is taken tells nobody anything.
    """
    generator = torch.Generator().manual_seed(0)

    def made_up(t: Tensor) -> Tensor:
        shape = (_PROOF_RECORDS, *t.shape[1:])
        if t.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=t.dtype).to(t.device)
        return torch.randint(2, shape, generator=generator, dtype=t.dtype).to(t.device)  # 0 and 1 are in any vocabulary

    device = like.patient.device
    patient = torch.arange(_PROOF_RECORDS, device=device) // 2
    records = Records({name: made_up(t) for name, t in like.fields.items()}, made_up(like.label), patient)
    piece = Piece(records, torch.ones(records.patients, dtype=torch.bool, device=device))
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = {
        name: (0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)).to(p.device) for name, p in learning.items()
    }
    for norm in (0.1, _NO_CLIP):
        fast = _in_one_pass(model, loss, weights, piece, norm)
        slow = _record_by_record(model, loss, weights, piece, norm)
        scale = max(float(s.abs().max()) for s in slow.values())
        if not fast or any(bool((fast[name] - s).abs().max() > 1e-3 * scale) for name, s in slow.items()):
            _TAPS[model] = None
            return
    _PROVED.add(model)


def _factor(squares: Tensor, clip_norm: float) -> Tensor:
    # a hair below the norm, so that rounding a sum of 64 patients in float32 does not step over it
    return (clip_norm * (1 - 2e-5) / squares.sqrt()).clamp(max=1.0)


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


def _blanked(piece: Piece, gone: Tensor) -> Piece:
    records = piece.records
    blank = gone[records.patient]
    fields = {
        name: torch.where(blank.view(-1, *[1] * (t.dim() - 1)), torch.zeros((), dtype=t.dtype, device=t.device), t)
        for name, t in records.fields.items()
    }
    return Piece(Records(fields, records.label, records.patient), piece.counts & ~gone)
