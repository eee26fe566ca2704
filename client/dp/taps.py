"""Layers that remember what went through them, so that one backward pass is enough for every patient's gradient norm.

Book-keeping (Bu et al. 2023, https://arxiv.org/abs/2210.00038): autograd computes the gradients of activations only. A tapped
layer keeps its input and the gradient of its output; the norm of each patient's gradient follows from these two, and so does
the sum of the clipped gradients. Gradients of single records are built only where that is cheaper.

A tap replaces the `forward` of one layer for the time of one pass. Names and parameters stay torch's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Gradients = dict[str, Tensor]  # by the parameter's name in its layer: "weight", "bias"

_ROUNDING = 16  # times the dtype's precision: what sums of products over time may lose, generously


class Groups:
    """Which records belong to which patient; `batch` must be grouped by patient, numbered 0, 1, ..."""

    def __init__(self, patient: Tensor) -> None:
        self.patient = patient
        self.patients = int(patient.max()) + 1
        size = torch.bincount(patient, minlength=self.patients)
        self.share = 1 / size[patient].double()  # a record's part in its patient's mean
        self._one_each = len(patient) == self.patients
        self._most = int(size.max())
        self._place = torch.arange(len(patient), device=patient.device) - (size.cumsum(0) - size)[patient]

    def side_by_side(self, x: Tensor) -> Tensor:
        """(records, time, features) -> (patients, records x time, features); zeros where a patient has fewer records."""
        if self._one_each:
            return x
        laid = x.new_zeros(self.patients, self._most, *x.shape[1:])
        laid[self.patient, self._place] = x
        return laid.flatten(1, 2)

    def summed(self, x: Tensor) -> Tensor:
        """(records, ...) -> (patients, ...), summed over each patient's records."""
        if self._one_each:
            return x
        return x.new_zeros(self.patients, *x.shape[1:]).index_add_(0, self.patient, x)


class Kept(Protocol):
    """What a layer kept of one pass."""

    def squares(self, groups: Groups) -> Tensor:
        """Squared length of each patient's gradient in this layer, (patients,); never less than the true one."""

    def clipped(self, factor: Tensor) -> Gradients:
        """The layer's gradients, each record's times its `factor`, (records,), and summed."""


class Linear:
    """y_t = W x_t + b at each moment t: gradients are sums over time of outer products."""

    def __init__(self, x: Tensor, g: Tensor, *, bias: bool) -> None:
        self._x = x.reshape(len(x), -1, x.shape[-1])  # (records, time, in)
        self._g = g.reshape(len(g), -1, g.shape[-1])  # (records, time, out)
        self._bias = bias

    def squares(self, groups: Groups) -> Tensor:
        """See `Kept`."""
        found = squares_over_time(groups.side_by_side(self._x), groups.side_by_side(self._g))
        return found + groups.summed(self._g.sum(1)).square().sum(1) if self._bias else found

    def clipped(self, factor: Tensor) -> Gradients:
        """See `Kept`."""
        g = (self._g * factor[:, None, None]).flatten(0, 1)
        found = {"weight": g.T @ self._x.flatten(0, 1)}
        return found | {"bias": g.sum(0)} if self._bias else found


class Convolution:
    """A convolution is linear over patches; the clipped sum is one ordinary weight gradient."""

    def __init__(self, x: Tensor, g: Tensor, layer: nn.Conv2d) -> None:
        self._x, self._g, self._layer = x, g, layer

    def squares(self, groups: Groups) -> Tensor:
        """See `Kept`."""
        layer = self._layer
        patches = F.unfold(self._x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT  # type: ignore[arg-type]
        g = self._g.flatten(2).mT
        found = squares_over_time(groups.side_by_side(patches), groups.side_by_side(g))
        return found + groups.summed(g.sum(1)).square().sum(1) if layer.bias is not None else found

    def clipped(self, factor: Tensor) -> Gradients:
        """See `Kept`."""
        g = self._g * factor[:, None, None, None]
        _, weight, bias = _convolution_backward(g, self._x, self._layer, (False, True, self._layer.bias is not None))
        return {"weight": weight} | ({"bias": bias} if self._layer.bias is not None else {})


class Scale:
    """y = w * normalised(x) + b: the gradients of single records are small, so they are built."""

    def __init__(self, of_records: Gradients) -> None:
        self._of_records = of_records  # each (records, features...)

    def squares(self, groups: Groups) -> Tensor:
        """See `Kept`."""
        parts = [groups.summed(g).flatten(1).square().sum(1) for g in self._of_records.values()]
        return torch.stack(parts).sum(0)

    def clipped(self, factor: Tensor) -> Gradients:
        """See `Kept`."""
        return {name: torch.tensordot(factor, g, 1) for name, g in self._of_records.items()}


def squares_over_time(x: Tensor, g: Tensor) -> Tensor:
    """|sum_t g_t x_t'|^2 for x (patients, time, in) and g (patients, time, out), rounded upwards.

    By Gram matrices over time, or by building the (out, in) gradient, whichever is smaller. What float arithmetic may
    lose where terms cancel is at most its precision times (sum_t |g_t| |x_t|)^2, so that much is added: a patient's length
    is never understated, and clipping keeps its word.
    """
    time, inside, outside = x.shape[1], x.shape[2], g.shape[2]
    lengths: Tensor = torch.linalg.vector_norm(x, dim=2) * torch.linalg.vector_norm(g, dim=2)
    if time == 1:
        return lengths[:, 0].square()
    if time * (inside + outside) <= inside * outside:
        found = (torch.bmm(x, x.mT) * torch.bmm(g, g.mT)).sum((1, 2))
    else:
        found = torch.bmm(g.mT, x).square().sum((1, 2))
    return found.clamp(min=0) + _ROUNDING * torch.finfo(x.dtype).eps * lengths.sum(1).square()


class Embedding:
    """Rows of a table, looked up: a row's gradient is the sum over the moments that read it."""

    def __init__(self, index: Tensor, g: Tensor, layer: nn.Embedding) -> None:
        self._index = index.reshape(len(index), -1)  # (records, time)
        self._g = g.reshape(*self._index.shape, -1)
        self._layer = layer
        if layer.padding_idx is not None:
            self._g = self._g * (self._index != layer.padding_idx)[..., None]

    def squares(self, groups: Groups) -> Tensor:
        """See `Kept`."""
        # a place that no record fills has g = 0, so whatever index stands there adds nothing
        index = groups.side_by_side(self._index[..., None].to(self._g.dtype)).squeeze(-1)
        g = groups.side_by_side(self._g)
        same = index[:, :, None] == index[:, None, :]
        found = (torch.bmm(g, g.mT) * same).sum((1, 2)).clamp(min=0)
        lengths: Tensor = torch.linalg.vector_norm(g, dim=2).sum(1).square()
        return found + _ROUNDING * torch.finfo(g.dtype).eps * lengths

    def clipped(self, factor: Tensor) -> Gradients:
        """See `Kept`."""
        g = (self._g * factor[:, None, None]).flatten(0, 1)
        rows = self._g.new_zeros(self._layer.weight.shape)
        return {"weight": rows.index_add_(0, self._index.flatten(), g)}


class _Tapped(torch.autograd.Function):
    """A layer's own forward; a backward that gives the gradient of the input and keeps the rest for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tap: _Tap) -> Tensor:
        y = tap.act(x)
        ctx.save_for_backward(x)
        ctx.tap = tap
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        (g,) = grad_outputs
        tap: _Tap = ctx.tap
        tap.kept.append(tap.keep(x, g))
        return tap.pull_back(x, g) if ctx.needs_input_grad[0] else None, None, None


class _Tap:
    """What is known about one layer: how it acts, how a gradient comes back through it, and what to keep."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.kept: list[Kept] = []
        self.act: Callable[[Tensor], Tensor] = type(layer).forward.__get__(layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Tapped.apply(x, self.layer.weight, self)  # type: ignore[no-untyped-call]
        return y

    def keep(self, x: Tensor, g: Tensor) -> Kept:
        raise NotImplementedError

    def pull_back(self, x: Tensor, g: Tensor) -> Tensor:
        raise NotImplementedError


class _LinearTap(_Tap):
    layer: nn.Linear

    def keep(self, x: Tensor, g: Tensor) -> Kept:
        return Linear(x, g, bias=self.layer.bias is not None)

    def pull_back(self, x: Tensor, g: Tensor) -> Tensor:
        return g @ self.layer.weight


class _ConvolutionTap(_Tap):
    layer: nn.Conv2d

    def keep(self, x: Tensor, g: Tensor) -> Kept:
        return Convolution(x, g, self.layer)

    def pull_back(self, x: Tensor, g: Tensor) -> Tensor:
        back: Tensor = _convolution_backward(g, x, self.layer, (True, False, False))[0]
        return back


class _GroupNormTap(_Tap):
    layer: nn.GroupNorm

    def keep(self, x: Tensor, g: Tensor) -> Kept:
        layer = self.layer
        normal = F.group_norm(x, layer.num_groups, eps=layer.eps)
        return Scale({"weight": (g * normal).flatten(2).sum(2), "bias": g.flatten(2).sum(2)})

    def pull_back(self, x: Tensor, g: Tensor) -> Tensor:
        layer = self.layer
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            y = F.group_norm(again, layer.num_groups, layer.weight.detach(), layer.bias.detach(), layer.eps)
        return torch.autograd.grad(y, again, g)[0]


class _LayerNormTap(_Tap):
    layer: nn.LayerNorm

    def keep(self, x: Tensor, g: Tensor) -> Kept:
        layer = self.layer
        normal = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        over = tuple(range(1, x.dim() - len(layer.normalized_shape)))
        found = {"weight": (g * normal).sum(over) if over else g * normal}
        return Scale(found | ({} if layer.bias is None else {"bias": g.sum(over) if over else g}))

    def pull_back(self, x: Tensor, g: Tensor) -> Tensor:
        layer = self.layer
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            bias = None if layer.bias is None else layer.bias.detach()
            y = F.layer_norm(again, layer.normalized_shape, layer.weight.detach(), bias, layer.eps)
        return torch.autograd.grad(y, again, g)[0]


class _EmbeddingTap(_Tap):
    layer: nn.Embedding

    def keep(self, x: Tensor, g: Tensor) -> Kept:
        return Embedding(x, g, self.layer)


_KINDS: dict[type[nn.Module], type[_Tap]] = {
    nn.Linear: _LinearTap,
    nn.Conv2d: _ConvolutionTap,
    nn.GroupNorm: _GroupNormTap,
    nn.LayerNorm: _LayerNormTap,
    nn.Embedding: _EmbeddingTap,
}


class Taps:
    """Taps for every learning layer of one network."""

    def __init__(self, taps: dict[str, _Tap]) -> None:
        self._taps = taps

    @classmethod
    def on(cls, model: nn.Module) -> Taps | None:
        """Taps for `model`, or None when some part of it is not known here: it then goes the exact, slower way.

        Known layers are taken by their exact type: a subclass may do something else.
        """
        taps: dict[str, _Tap] = {}
        seen: set[int] = set()
        for name, layer in model.named_modules():
            own = {n: p for n, p in layer.named_parameters(recurse=False) if p.requires_grad}
            if not own:
                continue
            if not _known(layer) or set(own) != {n for n, _ in layer.named_parameters(recurse=False)}:
                return None  # an unknown kind, or half of it frozen
            if any(id(p) in seen for p in own.values()) or layer.__dict__.get("forward") is not None:
                return None  # tied weights, or somebody else replaced its forward
            seen |= {id(p) for p in own.values()}
            taps[name] = _KINDS[type(layer)](layer)
        return cls(taps)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Tapped within, untouched after, whatever happens."""
        for tap in self._taps.values():
            tap.kept.clear()
            tap.layer.__dict__["forward"] = tap.forward
        try:
            yield
        finally:
            for tap in self._taps.values():
                tap.layer.__dict__.pop("forward", None)
                tap.kept.clear()

    def once_each(self) -> bool:
        """Whether every layer was passed exactly once; a layer used twice or not at all needs the slower way."""
        return all(len(tap.kept) == 1 for tap in self._taps.values())

    def squares(self, groups: Groups) -> Tensor:
        """Squared length of each patient's whole gradient, (patients,)."""
        return torch.stack([tap.kept[0].squares(groups).double() for tap in self._taps.values()]).sum(0)

    def clipped(self, factor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(parameter's full name, its clipped sum); `factor` is per record."""
        for name, tap in self._taps.items():
            for own, gradient in tap.kept[0].clipped(factor).items():
                yield f"{name}.{own}" if name else own, gradient


def _known(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if type(layer) is nn.Embedding:
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
    return type(layer) in _KINDS


def _convolution_backward(
    g: Tensor, x: Tensor, layer: nn.Conv2d, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = list(layer.weight.shape[:1]) if wanted[2] else None
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        g, x, layer.weight, sizes, layer.stride, layer.padding, layer.dilation, False, (0, 0), 1, wanted
    )
    return found
