"""Proofs on made-up records and weights: that one pass is exact, which sizes give the same bits, how much memory is wanted."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from wardround.client.dp.alone import mean_gradients, squared_length
from wardround.client.dp.taps import Groups, Taps, Untappable
from wardround.common.tasks import Records
from wardround.common.tasks.base import Loss

_AGREE = 1e-8  # relative; float64 agrees to 1e-12, a mistake does not agree at all
_MEMORY = 512 * 2**20  # bytes that one piece may take on a CPU
_MEMORY_CUDA = 0.5  # part of the device's free memory
_MOST, _MOST_CUDA = 64, 256  # records at once; more is not faster
_LEAST = 16  # below this, matrix kernels commonly change
_LIGHT, _HEAVY = 2**20, 8 * 2**20  # bytes a record up to which proving sizes 4 or 16 apart costs less than blank records do


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


def stand_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` in train mode with made-up weights and no randomness of its own."""
    twin = copy.deepcopy(model).to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in twin.parameters():
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            values = values / max(1, p[0].numel()) ** 0.5 if p.dim() > 1 else 1 + values / 4
            p.copy_(values.to(p.dtype))
    for layer in twin.modules():
        for name in ("p", "dropout"):  # torch's dropouts and recurrent layers, torchvision's stochastic depth
            if isinstance(chance := getattr(layer, name, None), float) and 0 < chance <= 1:
                setattr(layer, name, 0.0)
    return twin


def learning(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `model` that learn, detached."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def exact(model: nn.Module, loss: Loss, like: Records) -> None:
    """Compare one pass with plain autograd record by record, in float64, for patients of one and of two records.

    They differ where a network or a loss lets the records of a batch see each other, where a layer is used twice, or where
    the records are not the first dimension.

    Raises:
        Untappable: with the first parameter that differs, or torch's own complaint.
    """
    try:
        twin = stand_in(model, torch.float64)
    except RuntimeError as error:  # torch copies no weight that a hook has computed from others
        raise Untappable(f"the network cannot be copied: {error}") from error
    records = made_up(_as_float64(like), torch.tensor([0, 0, 1, 2]))
    weights = learning(twin)
    try:
        with torch.enable_grad():
            expected = list(mean_gradients(twin, loss, weights, records))
    except RuntimeError as error:
        raise Untappable(f"the network does not take one record alone: {error}") from error
    taps = Taps.on(twin)
    groups = Groups.of(records.patient)
    try:
        with torch.enable_grad(), taps.installed(groups):
            losses = loss(torch.func.functional_call(twin, weights, args=(), kwargs=dict(records.fields)), records.label)
            if losses.shape != records.label.shape[:1]:
                raise Untappable(f"the loss gives {list(losses.shape)} values for {len(records)} records")
            torch.autograd.backward(losses.sum())
            squares = taps.squares()
            found = [dict(taps.clipped(torch.eye(groups.patients, dtype=torch.float64)[i])) for i in range(groups.patients)]
    except (RuntimeError, ValueError, IndexError) as error:
        raise error if isinstance(error, Untappable) else Untappable(str(error)) from error
    for number, mean in enumerate(expected):
        length = float(squared_length(mean).sqrt())
        if not abs(float(squares[number].sqrt()) - length) <= _AGREE * length + 1e-12:
            raise Untappable("a patient's gradient has another length than record by record")
        for name, g in mean.items():
            if name not in found[number] or not (found[number][name] - g).norm() <= _AGREE * length + 1e-12:
                raise Untappable(f"{name} has another gradient than record by record")


def _as_float64(like: Records) -> Records:
    fields = {name: t[:0].double() if t.is_floating_point() else t[:0] for name, t in like.fields.items()}
    label = like.label[:0]
    return Records(fields, label.double() if label.is_floating_point() else label, like.patient[:0])


def sizes(model: nn.Module, loss: Loss, like: Records) -> tuple[int, ...]:
    """How many records may be computed at once, ascending: sizes in all of which a record's numbers are the same bits."""
    dtype = next(p.dtype for p in model.parameters())
    twin = stand_in(model, dtype)
    each = _bytes_of_a_record(twin, loss, like)
    device = like.patient.device
    budget = _MEMORY if device.type == "cpu" else int(_MEMORY_CUDA * torch.cuda.mem_get_info(device)[0])
    largest = max(1, min(budget // max(1, each), _MOST if device.type == "cpu" else _MOST_CUDA))
    if largest <= _LEAST or each > _HEAVY:
        return (min(largest, _LEAST),)
    candidates = [*range(_LEAST, largest, 4 if each <= _LIGHT else 16), largest]
    records = made_up(like, torch.arange(largest))
    reference = _trace(twin, loss, records)
    rolled = _trace(twin, loss, records.take(torch.arange(largest, device=device).roll(1)))
    if not all(torch.equal(a.roll(1, 0), b) for a, b in zip(reference, rolled, strict=True)):
        return (largest,)
    for size in candidates[:-1]:
        part = _trace(twin, loss, records.take(torch.arange(size, device=device)))
        if not all(torch.equal(a[:size], b) for a, b in zip(reference, part, strict=True)):
            return (largest,)
    return tuple(candidates)


def _trace(model: nn.Module, loss: Loss, records: Records) -> list[Tensor]:
    """What every layer gave and got back in one pass: all tensors with the records in front, in a fixed order."""
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []

    def watch(layer: nn.Module, given: object, output: object) -> None:
        for y in output if isinstance(output, tuple) else (output,):
            if isinstance(y, Tensor) and y.dim() and len(y) == len(records):
                outputs.append(y.detach().clone())
                if y.requires_grad:
                    y.register_hook(lambda g: gradients.append(g.clone()))  # type: ignore[no-untyped-call]

    _in_one_pass(model, loss, records, watch)
    return outputs + gradients


def _bytes_of_a_record(model: nn.Module, loss: Loss, like: Records) -> int:
    """What one record holds in memory at the worst moment: what autograd saves and what the layers keep."""
    records = made_up(like, torch.arange(2))
    held: dict[int, int] = {}
    own = {w.untyped_storage().data_ptr() for w in model.parameters()}

    def save(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        kept = _in_one_pass(model, loss, records, None)
    return (sum(held.values()) + kept) // len(records)


def _in_one_pass(
    model: nn.Module, loss: Loss, records: Records, watch: Callable[[nn.Module, object, object], None] | None
) -> int:
    taps = Taps.on(model)
    hooks = [layer.register_forward_hook(watch) for layer in model.modules()] if watch else []
    try:
        with torch.enable_grad(), taps.installed(Groups.of(records.patient)):
            weights = learning(model)
            outputs = torch.func.functional_call(model, weights, args=(), kwargs=dict(records.fields))
            torch.autograd.backward(loss(outputs, records.label).sum())
            taps.squares()
            return taps.nbytes
    finally:
        for hook in hooks:
            hook.remove()
