"""Before the first record is opened: networks and losses in which one patient's share cannot be told from another's.

    preflight(model, loss, like)     all of it, once a process, on made-up records
      refuse_coupled                 layers known to mix records or to learn statistics, by their type
      refuse_entangled               whatever else does, by what it does
      engine_of                      how the gradients will be taken

A frozen BatchNorm is refused too: in eval mode it mixes nothing, but one `train()` makes it. torchvision's
`FrozenBatchNorm2d` has no other mode, and passes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wardround.client.dp import proof
from wardround.client.dp.engine import engine_of, kind_of
from wardround.common.errors import PlanRefused
from wardround.common.tasks import Records
from wardround.common.tasks.base import Loss

_RECORDS = 6
_UNBOUNDED = "mixes the records of a batch, so no patient's share can be bounded"

_PASSED: WeakKeyDictionary[nn.Module, set[object]] = WeakKeyDictionary()


def preflight(model: nn.Module, loss: Loss, like: Records) -> None:
    """Return if `model` and `loss` can be trained privately on records shaped as `like`, whose values are not looked at.

    A pass is remembered for the life of the process, in which simulated sites share one network; a round then finds its
    engine ready.

    Raises:
        PlanRefused: with the layer's name, where it can be told.
    """
    passed = _PASSED.setdefault(model, set())
    kind = kind_of(loss, like)
    if kind in passed:
        return
    refuse_coupled(model)
    refuse_entangled(model, loss, like)
    engine_of(model, loss, like)
    passed.add(kind)


def refuse_coupled(model: nn.Module) -> None:
    """Refuse layers that mix the records of a batch or learn statistics without noise.

    Raises:
        PlanRefused: with the layer's name.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) or getattr(layer, "track_running_stats", False):
            raise PlanRefused(
                f"layer {name} ({type(layer).__name__}) mixes the patients of a batch, so no patient's share can be "
                "bounded; use GroupNorm"
            )
        if any(True for _ in getattr(layer, "_forward_pre_hooks", {})):
            raise PlanRefused(f"layer {name} changes its weights in a hook, which cannot be accounted for")


def refuse_entangled(model: nn.Module, loss: Loss, like: Records) -> None:
    """Refuse a network or a loss in which a record's numbers depend on the others of its batch, or on earlier ones.

    In train mode, on made-up records, with made-up weights and without dropout: when every second record is exchanged, the
    outputs and losses of the rest must stay what they were; and the network must come out of a pass as it went in. What
    couples records in gradients alone is not refused: the engine's own proof finds it, and takes them one by one.

    Raises:
        PlanRefused: with the layer's name, where it can be told.
    """
    try:
        _probe(model, loss, like)
    except PlanRefused:
        raise
    except Exception as error:  # a network that does not fit the records fails in any way, and in torch's words
        raise PlanRefused("the network cannot compute on records of this task's shape", detail=str(error)) from error


def _probe(model: nn.Module, loss: Loss, like: Records) -> None:
    twin = proof.stand_in(model)
    records = proof.made_up(like, torch.arange(_RECORDS))
    everybody = torch.ones(_RECORDS, dtype=torch.bool, device=like.patient.device)
    reference = _remembers_nothing(copy.deepcopy(twin), loss, records, _exchanged(records, everybody))
    even = torch.arange(_RECORDS, device=like.patient.device) % 2 == 0
    for same in (even, ~even):  # both ways, since a record may see only those before it
        others = _exchanged(records, ~same)
        found = _pass(copy.deepcopy(twin), loss, others)
        if not _alike(reference.outputs, found.outputs, same):
            raise PlanRefused(f"{_culprit(twin, records, others, same)} {_UNBOUNDED}")
        if not _alike([reference.losses], [found.losses], same):
            raise PlanRefused(f"the loss {_UNBOUNDED}")


def _remembers_nothing(model: nn.Module, loss: Loss, records: Records, others: Records) -> _Pass:
    before = {name: t.clone() for name, t in _tensors(model)}
    first = _pass(model, loss, records)
    _pass(model, loss, others)
    for name, t in _tensors(model):
        if name not in before or not torch.equal(t, before[name]):
            raise PlanRefused(f"{name} of the network changes in a pass: it would learn from patients without noise")
    again = _pass(model, loss, records)
    if not _alike([*first.outputs, first.losses], [*again.outputs, again.losses], slice(None)):
        raise PlanRefused("the network or the loss remembers earlier batches, which no noise accounts for")
    return first


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()  # also those that are in no state_dict


class _Pass(NamedTuple):
    """What came out."""

    outputs: list[Tensor]  # (records, ...) each
    losses: Tensor  # (records,)


def _pass(model: nn.Module, loss: Loss, records: Records) -> _Pass:
    with _same_chance(records.label.device), torch.enable_grad():
        outputs = model(**{name: t.clone() for name, t in records.fields.items()})  # it may write into them
        kept = [t.detach().clone() for t in _by_record(outputs)]
        losses = loss(outputs, records.label).detach()
    if losses.shape != (_RECORDS,):
        shape = list(losses.shape)
        raise PlanRefused(f'the loss gives shape {shape} for {_RECORDS} records, not one value each (reduction="none")')
    return _Pass(kept, losses)


@contextlib.contextmanager
def _same_chance(device: torch.device) -> Iterator[None]:
    """What is drawn within is the same every time; the global generators stay as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _exchanged(records: Records, rows: Tensor) -> Records:
    """Other values in `rows`, (records,) bool."""

    def other(t: Tensor) -> Tensor:
        changed = t.clone()
        changed[rows] = 1.5 - 2 * t[rows] if t.is_floating_point() else 1 - t[rows]
        return changed

    return Records({name: other(t) for name, t in records.fields.items()}, other(records.label), records.patient)


def _by_record(given: object) -> Iterator[Tensor]:
    """The tensors in `given`, however nested, that have the records in front."""
    if isinstance(given, Tensor):
        if given.dim() and len(given) == _RECORDS:
            yield given
    elif isinstance(given, Mapping):
        for part in given.values():
            yield from _by_record(part)
    elif isinstance(given, (tuple, list)):
        for part in given:
            yield from _by_record(part)


def _alike(one: list[Tensor], other: list[Tensor], rows: Tensor | slice) -> bool:
    """Whether `rows` agree in all tensors: floats but for the rounding of nondeterministic sums."""
    return len(one) == len(other) and all(_close(a[rows], b[rows]) for a, b in zip(one, other, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    finite = a[a.isfinite()].abs()
    off = torch.finfo(a.dtype).eps ** 0.5 * (float(finite.max()) if finite.numel() else 0.0)
    return torch.allclose(a, b, rtol=0.0, atol=off, equal_nan=True)


def _culprit(twin: nn.Module, one: Records, other: Records, rows: Tensor) -> str:
    """Where `rows` differ first between two passes."""

    def watched(records: Records) -> list[tuple[str, list[Tensor]]]:
        model = copy.deepcopy(twin)
        named = {layer: f"layer {name} ({type(layer).__name__})" for name, layer in model.named_modules() if name}
        seen: list[tuple[str, list[Tensor]]] = []

        def enter(layer: nn.Module, args: object, kwargs: object) -> None:
            seen.append((f"what reaches {named[layer]}", [t.detach().clone() for t in _by_record([args, kwargs])]))

        def leave(layer: nn.Module, args: object, output: object) -> None:
            seen.append((named[layer], [t.detach().clone() for t in _by_record(output)]))

        for layer in named:
            layer.register_forward_pre_hook(enter, with_kwargs=True)
            layer.register_forward_hook(leave)
        with _same_chance(records.label.device):
            model(**{name: t.clone() for name, t in records.fields.items()})
        return seen

    for (place, a), (_, b) in zip(watched(one), watched(other), strict=False):
        if not _alike(a, b, rows):
            return place
    return "the network"
