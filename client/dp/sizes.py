"""How many records are computed at once: sizes in which a record's numbers are the same bits.

Matrix kernels change with the shape of a batch, and most of them not at every size. Which sizes agree is found on made-up
records and weights, each size when it is first wanted; the answer depends on the machine and the network, on nobody's data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from wardround.client.dp.proof import learning, made_up, stand_in
from wardround.client.dp.taps import Groups, Taps
from wardround.common.tasks import Records
from wardround.common.tasks.base import Loss

_MEMORY = 512 * 2**20  # bytes that one piece may take on a CPU
_MEMORY_CUDA = 0.5  # part of the device's free memory
_MOST, _MOST_CUDA = 64, 256  # records at once; more is not faster
_LEAST = 16  # below this, matrix kernels commonly change
_LIGHT, _HEAVY = 2**20, 8 * 2**20  # bytes a record up to which proving sizes 4 or 16 apart costs less than blank records do


class Sizes:
    """The sizes a piece may have.

    Args:
        candidates: ascending; the last one is taken without proof.
        agree: whether a record's numbers in a piece of this size are the bits that they are in the largest.
    """

    def __init__(self, candidates: tuple[int, ...], agree: Callable[[int], bool] | None = None) -> None:
        self._candidates = candidates
        self._agree = agree
        self._proved: dict[int, bool] = {candidates[-1]: True}

    @classmethod
    def of(cls, model: nn.Module, loss: Loss, like: Records) -> Sizes:
        """As many as memory allows: half of what is free on a CUDA device, half a gibibyte elsewhere."""
        twin = stand_in(model, next(p.dtype for p in model.parameters()))
        each = _bytes_of_a_record(twin, loss, like)
        device = like.patient.device
        budget = _MEMORY if device.type == "cpu" else int(_MEMORY_CUDA * torch.cuda.mem_get_info(device)[0])
        largest = max(1, min(budget // max(1, each), _MOST if device.type == "cpu" else _MOST_CUDA))
        if largest <= _LEAST or each > _HEAVY:
            return cls((min(largest, _LEAST),))
        candidates = (*range(_LEAST, largest, 4 if each <= _LIGHT else 16), largest)
        return cls(candidates, _SameBits(twin, loss, made_up(like, torch.arange(largest))))

    @property
    def largest(self) -> int:
        """The most records at once."""
        return self._candidates[-1]

    def fit(self, count: int) -> int:
        """The smallest size for `count` records, which are no more than `largest`."""
        return next(size for size in self._candidates if size >= count and self._is_proved(size))

    def _is_proved(self, size: int) -> bool:
        if size not in self._proved:
            self._proved[size] = self._agree is not None and self._agree(size)
        return self._proved[size]


class _SameBits:
    """Compares what every layer gives and gets back in a smaller piece, where each record also stands one place further."""

    def __init__(self, model: nn.Module, loss: Loss, records: Records) -> None:
        self._model, self._loss, self._records = model, loss, records
        self._reference: list[Tensor] = []

    def __call__(self, size: int) -> bool:
        if not self._reference:
            self._reference = list(_trace(self._model, self._loss, self._records))
        some = torch.arange(size, device=self._records.patient.device).roll(1)
        found = list(_trace(self._model, self._loss, self._records.take(some)))
        return len(found) == len(self._reference) and all(
            torch.equal(whole[some], part) for whole, part in zip(self._reference, found, strict=True)
        )


def _trace(model: nn.Module, loss: Loss, records: Records) -> Iterator[Tensor]:
    """Fingerprints of every layer's outputs and their gradients in one pass, (records,) each, in a fixed order."""
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []

    def watch(layer: nn.Module, given: object, output: object) -> None:
        for y in output if isinstance(output, tuple) else (output,):
            if isinstance(y, Tensor) and y.dim() and len(y) == len(records):
                outputs.append(_fingerprint(y.detach()))
                if y.requires_grad:
                    y.register_hook(lambda g: gradients.append(_fingerprint(g)))

    _in_one_pass(model, loss, records, watch)
    yield from outputs
    yield from gradients


def _fingerprint(x: Tensor) -> Tensor:
    """One whole number for the bits of each row, (rows,)."""
    if x.is_floating_point():
        x = x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    flat = x.reshape(len(x), -1).long()
    place = torch.arange(1, flat.shape[1] + 1, device=x.device)
    return (flat * (place * 0x9E3779B1 + 1)).sum(1)  # wraps around


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
    """One pass with taps; the bytes that the layers kept."""
    taps = Taps.on(model)
    hooks = [layer.register_forward_hook(watch) for layer in model.modules()] if watch else []
    try:
        with torch.enable_grad(), taps.installed(Groups.of(records.patient)):
            outputs = torch.func.functional_call(model, learning(model), args=(), kwargs=dict(records.fields))
            torch.autograd.backward(loss(outputs, records.label).sum())
            taps.squares()
            return taps.nbytes
    finally:
        for hook in hooks:
            hook.remove()
