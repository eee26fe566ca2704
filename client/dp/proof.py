"""The proof, on made-up records and weights, that one pass gives what plain autograd gives record by record."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from wardround.client.dp.alone import mean_gradients, squared_length
from wardround.client.dp.chance import chances
from wardround.client.dp.taps import Groups, Taps, Untappable
from wardround.common.tasks import Records
from wardround.common.tasks.base import Loss
from wardround.common.weights import trainable

_PARTS = (1.0, 0.7, 0.4)  # what each made-up patient's gradient is multiplied by in the sum that is compared
_AGREE = 1e-8  # relative; float64 agrees to 1e-12, a mistake does not agree at all


def made_up(like: Records, patient: Tensor) -> Records:
    """Records of nobody, shaped as `like`, for the patients in `patient`: normal numbers, and 0 or 1 where whole ones go."""
    generator = torch.Generator().manual_seed(0)

    def values(t: Tensor) -> Tensor:
        shape = (len(patient), *t.shape[1:])
        if t.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=t.dtype).to(t.device)
        return torch.randint(2, shape, generator=generator).to(t.device, t.dtype)

    label = values(like.label)
    if label.is_floating_point():
        label = label.sigmoid()  # what a loss of probabilities takes, and any other too
    return Records({name: values(t) for name, t in like.fields.items()}, label, patient.to(like.patient.device))


def stand_in(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `model` in train mode with made-up weights and no randomness of its own; `dtype` None leaves its dtypes."""
    twin = copy.deepcopy(model).to(dtype=dtype).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in twin.parameters():
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            values = values / max(1, p[0].numel()) ** 0.5 if p.dim() > 1 else 1 + values / 4
            p.copy_(values.to(p.dtype))
    for layer in twin.modules():
        for name in chances(layer):
            setattr(layer, name, 0.0)
    return twin


def exact(model: nn.Module, loss: Loss, like: Records, *, public_shapes: bool = False) -> None:
    """Compare one pass with plain autograd record by record, in float64, for patients of one and of two records.

    They differ where a network or a loss lets the records of a batch see each other, where a layer is used twice, or where
    the records are not the first dimension. With `public_shapes` no layer may be given packed sequences.

    Raises:
        Untappable: with the first parameter that differs, or torch's own complaint.
    """
    try:
        twin = stand_in(model, torch.float64)
    except RuntimeError as error:  # torch copies no weight that a hook has computed from others
        raise Untappable(f"the network cannot be copied: {error}") from error
    records = made_up(_as_float64(like), torch.tensor([0, 0, 1, 2]))
    weights = trainable(twin)
    try:
        with torch.enable_grad():
            expected = list(mean_gradients(twin, loss, weights, records))
    except RuntimeError as error:
        raise Untappable(f"the network does not take one record alone: {error}") from error
    taps = Taps.on(twin, public_shapes=public_shapes)
    if public_shapes:
        _refuse_packed(twin)
    groups = Groups.of(records.patient)
    try:
        with torch.enable_grad(), taps.installed(groups):
            losses = loss(torch.func.functional_call(twin, weights, args=(), kwargs=dict(records.fields)), records.label)
            if losses.shape != records.label.shape[:1]:
                raise Untappable(f"the loss gives {list(losses.shape)} values for {len(records)} records")
            torch.autograd.backward(losses.sum())
            squares = taps.squares()
            found = taps.clipped(torch.tensor(_PARTS, dtype=torch.float64))
    except (RuntimeError, ValueError, IndexError) as error:
        raise error if isinstance(error, Untappable) else Untappable(str(error)) from error
    lengths = [float(squared_length(mean).sqrt()) for mean in expected]
    for length, square in zip(lengths, squares.tolist(), strict=True):
        if not abs(square**0.5 - length) <= _AGREE * length + 1e-12:
            raise Untappable("a patient's gradient has another length than record by record")
    for name in weights:
        by_record = torch.stack([part * mean[name] for part, mean in zip(_PARTS, expected, strict=True)]).sum(0)
        if name not in found or not (found[name] - by_record).norm() <= _AGREE * max(lengths) + 1e-12:
            raise Untappable(f"{name} has another gradient than record by record")


def _refuse_packed(model: nn.Module) -> None:
    def refuse(layer: nn.Module, args: tuple[object, ...]) -> None:
        if any(isinstance(given, PackedSequence) for given in args):
            raise Untappable("packed sequences: kernels work on shapes that follow from how long they are")

    for layer in model.modules():
        layer.register_forward_pre_hook(refuse)


def _as_float64(like: Records) -> Records:
    fields = {name: t[:0].double() if t.is_floating_point() else t[:0] for name, t in like.fields.items()}
    label = like.label[:0]
    return Records(fields, label.double() if label.is_floating_point() else label, like.patient[:0])
