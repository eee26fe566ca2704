"""DP-SGD as a capable person would write it for one network, with every advantage: what `benchmarks.one_run` loops over.

One forward and one backward a step (book-keeping; Bu et al. 2023, https://arxiv.org/abs/2210.00038), for records that are each
a patient and layers that are `Conv2d` or `Linear`. Noise is torch's own and not secret, batches are computed as they are
drawn, and nothing is checked. Parameters, sums and noise each lie in one flat tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wardround.common.tasks.base import Loss

_FEW = 8  # channels below which products over patches are faster than the convolution kernel


class _Tapped(torch.autograd.Function):
    """A layer that leaves its input and the gradient of its output behind, in place of the gradients of its weights."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, left: dict[nn.Module, tuple[Tensor, Tensor]], x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.left = layer, left
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        assert isinstance(layer, nn.Conv2d)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        x, weight = ctx.saved_tensors
        layer = ctx.layer
        ctx.left[layer] = (x.detach(), g)
        if not ctx.needs_input_grad[2]:
            return None, None, None, None
        if isinstance(layer, nn.Linear):
            return None, None, g @ weight, None
        back = torch.ops.aten.convolution_backward(
            g, x, weight, None, layer.stride, layer.padding, layer.dilation, False, (0, 0), 1, (True, False, False)
        )[0]
        return None, None, back, None


class PlainDPSGD:
    """`model`, tapped for good, with its parameters in one flat tensor."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._model, self._loss = model, loss
        self._layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        self._left: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
        self._sums, self._noise = torch.zeros_like(self.parameters), torch.empty_like(self.parameters)
        self._sum_of: dict[nn.Parameter, Tensor] = {}
        start = 0
        for p in model.parameters():
            place = slice(start, start + p.numel())
            p.data = self.parameters[place].view_as(p)
            self._sum_of[p] = self._sums[place].view_as(p)
            start += p.numel()
        for layer in self._layers:
            layer.__dict__["forward"] = lambda x, layer=layer: _Tapped.apply(layer, self._left, x, layer.weight)

    def clipped_sum(self, x: Tensor, label: Tensor, clip_norm: float) -> Tensor:
        """Sum of the records' gradients, each clipped; flat, overwritten by the next call. (records, ...), (records,)."""
        if not len(label):
            return self._sums.zero_()
        self._loss(self._model(x), label).sum().backward()
        with torch.no_grad():
            self._add_up(clip_norm)
        return self._sums

    def _add_up(self, clip_norm: float) -> None:
        squares: list[Tensor] = []
        built: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for layer in self._layers:
            x, g = self._left[layer]
            if isinstance(layer, nn.Linear):
                squares.append(torch.linalg.vecdot(g, g) * (torch.linalg.vecdot(x, x) + 1))
                continue
            of_weight, of_bias = _by_record(layer, x, g), g.flatten(2).sum(2)
            squares += [torch.linalg.vecdot(of_weight, of_weight), torch.linalg.vecdot(of_bias, of_bias)]
            built[layer] = of_weight, of_bias
        factor = (clip_norm / torch.stack(squares).sum(0).sqrt()).clamp(max=1)
        for layer in self._layers:
            weight, bias = self._sum_of[layer.weight], self._sum_of[layer.bias]
            if layer in built:
                torch.mv(built[layer][0].T, factor, out=weight.view(-1))
                torch.mv(built[layer][1].T, factor, out=bias)
            else:
                x, g = self._left[layer]
                g = g * factor[:, None]
                torch.mm(g.T, x, out=weight)
                torch.sum(g, 0, out=bias)

    @torch.no_grad()
    def step(self, *, deviation: float, rate: float) -> None:
        """Noise on the last sum, then a step against it."""
        self._sums.add_(self._noise.normal_(0, deviation))
        self.parameters.add_(self._sums, alpha=-rate)


def _by_record(layer: nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    """(records, all numbers of the weight), by the faster of two ways."""
    padding, rows = layer.padding, len(x)
    assert not isinstance(padding, str)
    if x.shape[1] < _FEW:
        padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        record, channel, down, right = padded.stride()
        seen = padded.as_strided(
            (rows, x.shape[1], *layer.kernel_size, *g.shape[2:]), (record, channel, down, right, down, right)
        )
        return torch.bmm(g.flatten(2), seen.reshape(rows, -1, g[0, 0].numel()).mT).flatten(1)
    return torch.ops.aten.convolution_backward(  # one group a record
        g.reshape(1, -1, *g.shape[2:]), x.reshape(1, -1, *x.shape[2:]), x.new_empty(rows * g.shape[1], *layer.weight.shape[1:]),
        None, layer.stride, padding, layer.dilation, False, (0, 0), rows, (False, True, False),
    )[1].view(rows, -1)  # fmt: skip
