"""The documented way for parameters outside of any known layer: each record gets its own copy of them.

A learned scale of a residual branch, a class token, a positional embedding: small tensors that meet the batch by
broadcasting. Inside the pass such a parameter has the records in front, (records, ...), in place of a leading 1 where it
has one that stands for them; autograd then leaves each record's gradient on its copy. Whether a network takes that well is
proved on made-up records before any patient is read; where it does not, the network goes record by record.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from wardround.client.dp.taps.base import Tap
from wardround.client.dp.taps.kept import Built


class BareTap(Tap):
    """A module that holds parameters itself, whatever it does with them."""

    def __init__(self, layer: nn.Module, shared: Any) -> None:
        super().__init__(layer, shared)
        self.copies: list[dict[str, Tensor]] = []
        self._aligned: bool | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with one copy of its parameters for each record."""
        if not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if first is None or not first.dim():
            raise ValueError("no batch reaches this module")
        if self._aligned is None:
            self._aligned = self._fits(first, args, kwargs)
        copies = self._copies(first, aligned=self._aligned)
        self.copies.append(copies)
        with self._exchanged(copies):
            return self.plain(*args, **kwargs)

    def _copies(self, batch: Tensor, *, aligned: bool) -> dict[str, Tensor]:
        """A copy of each parameter for every record; `aligned` with the last dimensions of the batch, as broadcasting is."""
        copies = {}
        for name in self.learns:
            p = self.layer._parameters[name]
            if aligned:
                shape = (len(batch), *[1] * (batch.dim() - 1 - p.dim()), *p.shape)
            else:
                shape = (len(batch), *(p.shape[1:] if p.dim() > 1 and p.shape[0] == 1 else p.shape))
            copies[name] = p.detach().expand(shape).contiguous().requires_grad_()
        return copies

    @torch.no_grad()
    def _fits(self, batch: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether copies have to be aligned for the module to give what it gives without them; by shapes alone."""
        with torch.random.fork_rng(devices=[batch.device] if batch.is_cuda else []):
            wanted = _shapes(self.plain(*args, **kwargs))
            for aligned in (False, True):
                with contextlib.suppress(RuntimeError), self._exchanged(self._copies(batch, aligned=aligned)):
                    if _shapes(self.plain(*args, **kwargs)) == wanted:
                        return aligned
        raise RuntimeError("the module does not take a copy of its parameters for each record")

    @contextlib.contextmanager
    def _exchanged(self, copies: dict[str, Tensor]) -> Iterator[None]:
        own = self.layer._parameters
        before = {name: own[name] for name in copies}
        own.update(copies)
        try:
            yield
        finally:
            own.update(before)

    def collect(self) -> None:
        """Turn the copies' gradients into what was kept; to be called when the backward pass is over."""
        for copies in self.copies:
            found = {}
            for name, copy in copies.items():
                g = torch.zeros_like(copy) if copy.grad is None else copy.grad
                groups = self.shared.groups_of(len(g), g.device)
                found[name] = groups.mean(g.view(len(g), *self.layer._parameters[name].shape))
            self.kept.append(Built(found))
        self.copies.clear()


def _shapes(given: object) -> object:
    """The shapes of the tensors in `given`, however nested."""
    if isinstance(given, Tensor):
        return tuple(given.shape)
    if isinstance(given, dict):
        return {name: _shapes(part) for name, part in given.items()}
    return [_shapes(part) for part in given] if isinstance(given, (tuple, list)) else None
