"""How many records are computed at once: sizes in which a record's numbers are the same bits.

Matrix kernels change with the shape of a batch, and most of them not at every size. Which sizes agree is found on made-up
records and weights, each size when it is first wanted; the answer depends on the machine and the network, on nobody's data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wardround.client.dp.proof import made_up, stand_in
from wardround.client.dp.taps import Groups, Taps, Untappable
from wardround.common.tasks import Records
from wardround.common.tasks.base import Loss
from wardround.common.weights import trainable

_MEMORY = 512 * 2**20  # bytes that one piece may take on a CPU
_MEMORY_CUDA = 0.5  # part of the device's free memory
_MOST, _MOST_CUDA = 64, 256  # records at once; more is not faster
_LEAST = 16  # below this, matrix kernels commonly change
_LIGHT, _HEAVY = 2**20, 8 * 2**20  # bytes a record from which proving many sizes, or any but one, costs more than it saves


class Sizes:
    """The sizes a piece may have.

    Args:
        candidates: ascending.
        agree: whether a record's numbers in a piece of this size are the same bits wherever it stands, and those it has in a
            piece of the size proved first.
    """

    def __init__(self, candidates: Sequence[int], agree: Callable[[int], bool]) -> None:
        self._agree = agree
        self._proved: dict[int, bool] = {}
        self._candidates = list(candidates)
        while self._candidates and not self._is_proved(self._candidates[-1]):
            self._candidates.pop()
        if not self._candidates:
            raise Untappable("a record's numbers depend on its place in a batch, at every size that was tried")
        self._larger: dict[int, Sizes | None] = {}

    @classmethod
    def single(cls) -> Sizes:
        """One record at a time."""
        return cls((1,), lambda _: True)

    @classmethod
    def of(cls, model: nn.Module, loss: Loss, like: Records) -> Sizes:
        """As many as memory allows: half of what is free on a CUDA device, half a gibibyte elsewhere.

        Raises:
            Untappable: at no size are a record's numbers the same bits at every place.
        """
        twin = stand_in(model)
        each = _bytes_of_a_record(twin, loss, like)
        device = like.patient.device
        budget = _MEMORY if device.type == "cpu" else int(_MEMORY_CUDA * torch.cuda.mem_get_info(device)[0])
        largest = max(1, min(budget // max(1, each), _MOST if device.type == "cpu" else _MOST_CUDA))
        same = _SameBits(twin, loss, like)
        if largest <= _LEAST or each > _HEAVY:
            return cls((min(largest, _LEAST),), same)
        if each > _LIGHT and device.type == "cpu":
            return cls((_LEAST, min(largest, 2 * _LEAST)), same)
        return cls((*range(_LEAST, largest, 4 if each <= _LIGHT else 16), largest), same)

    @property
    def largest(self) -> int:
        """The most records at once."""
        return self._candidates[-1]

    def fit(self, count: int) -> int:
        """The smallest size for `count` records, which are no more than `largest`."""
        return next(size for size in self._candidates if size >= count and self._is_proved(size))

    def at_least(self, count: int) -> Sizes | None:
        """Sizes whose largest holds `count` records of one patient; None where no such size is proved."""
        if count <= self.largest:
            return self
        if count not in self._larger:
            rounded = -(-count // _LEAST) * _LEAST
            try:
                self._larger[count] = Sizes((rounded,), self._agree)
            except Untappable:
                self._larger[count] = None
        return self._larger[count]

    def halved(self) -> Sizes | None:
        """For half as much memory; None where that leaves no size."""
        fewer = [size for size in self._candidates if size <= self.largest // 2] or [self.largest // 2]
        try:
            return Sizes(fewer, self._agree) if fewer[-1] else None
        except Untappable:
            return None

    def _is_proved(self, size: int) -> bool:
        if size not in self._proved:
            self._proved[size] = self._agree(size)
        return self._proved[size]


_Seen = dict[str, Tensor]  # a tensor's fingerprints: of each record by the way it may lie, (records,), and of "all", ()


class _SameBits:
    """Compares what every layer gives and gets back for the same made-up records in other places and in other sizes."""

    def __init__(self, model: nn.Module, loss: Loss, like: Records) -> None:
        self._model, self._loss = model, loss
        self._pool = made_up(like, torch.arange(_MOST))
        self._reference: list[_Seen] = []  # of records 0, 1, ... in the size proved first
        self._different = _MOST

    def __call__(self, size: int) -> bool:
        number = torch.arange(size, device=self._pool.patient.device) % self._different
        orders = [number.roll(1), number.roll(size // 2 + 3), number.flip(0)]
        if self._reference:
            return all(_alike(self._reference, self._seen(some), some) for some in (number, *orders))
        reference = self._seen(number)
        if not all(_alike(reference, self._seen(some), some) for some in orders):
            return False
        self._reference, self._different = reference, min(size, _MOST)
        return True

    def _seen(self, number: Tensor) -> list[_Seen]:
        """Fingerprints of all outputs and their gradients in a pass over these records of the pool, in a fixed order."""
        fields = {name: t[number] for name, t in self._pool.fields.items()}
        records = Records(fields, self._pool.label[number], torch.arange(len(number), device=number.device))
        outputs: list[_Seen] = []
        gradients: list[_Seen] = []

        def watch(layer: nn.Module, given: object, output: object) -> None:
            for y in output if isinstance(output, tuple) else (output,):
                if isinstance(y, Tensor) and y.dim():
                    outputs.append(_fingerprints(y.detach(), len(number)))
                    hooked: Any = y
                    if y.requires_grad:
                        hooked.register_hook(lambda g: gradients.append(_fingerprints(g, len(number))))

        _in_one_pass(self._model, self._loss, records, watch)
        return outputs + gradients


def _alike(reference: list[_Seen], found: list[_Seen], number: Tensor) -> bool:
    """Whether all tensors have the reference's bits record by record, in one of the ways they may lie, or as a whole."""
    return len(reference) == len(found) and all(
        any(torch.equal(one[way] if way == "all" else one[way][number], other[way]) for way in one.keys() & other.keys())
        for one, other in zip(reference, found, strict=True)
    )


def _fingerprints(y: Tensor, records: int) -> _Seen:
    """The records of a layer may be in front, behind the time, or folded together with it, one way or the other."""
    y = y[:, None] if y.dim() == 1 else y
    of_places = _fingerprint(y.reshape(*y.shape[:2], -1))  # of the first two dimensions
    of_rows = _fingerprint(of_places)
    found = {"all": _fingerprint(of_rows)}
    if len(y) == records:
        found["in front"] = of_rows
    if y.shape[1] == records:
        found["second"] = _fingerprint(of_places.T)
    if len(y) > records and len(y) % records == 0:
        found["folded, in front"] = _fingerprint(of_rows.view(records, -1))
        found["folded, second"] = _fingerprint(of_rows.view(-1, records).T)
    return found


def _fingerprint(x: Tensor) -> Tensor:
    """One whole number for the bits along the last dimension; all arithmetic wraps around."""
    if x.is_floating_point():
        x = x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    place = torch.arange(1, x.shape[-1] + 1, device=x.device) * 0x9E3779B1 + 1
    return (x * place.to(x.dtype)).sum(-1, dtype=torch.int64)


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
    leaves = [layer for layer in model.modules() if layer is model or not any(True for _ in layer.children())]
    hooks = [layer.register_forward_hook(watch) for layer in leaves] if watch else []
    try:
        with torch.enable_grad(), taps.installed(Groups.of(records.patient)):
            outputs = torch.func.functional_call(model, trainable(model), args=(), kwargs=dict(records.fields))
            torch.autograd.backward(loss(outputs, records.label).sum())
            taps.squares()
            return taps.nbytes
    finally:
        for hook in hooks:
            hook.remove()
