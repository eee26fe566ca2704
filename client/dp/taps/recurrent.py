"""Recurrent layers: Elman's, LSTM and GRU, with manual back-propagation through time (Werbos 1990).

The pre-activations z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh are linear in the weights, so a record's gradients are sums
over time of dz_t x_t' and dz_t h_{t-1}'. Everything that does not wait for the moment before is computed for all moments at
once. Within, tensors are (ways, time, records, features): the reverse direction is a second way through the turned sequence,
and a sequence that ends early is padded behind its end, where no gradient arrives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from wardround.client.dp.taps.base import Pass, Tap, Untappable
from wardround.client.dp.taps.kept import Built, Gradients, Groups, Joined, Kept, outer, prefers_outer

_through_sigmoid = torch.ops.aten.sigmoid_backward.grad_input
_through_tanh = torch.ops.aten.tanh_backward.grad_input
_through_relu = torch.ops.aten.threshold_backward.grad_input

_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


class _Weights(NamedTuple):
    """What one layer computes with."""

    ih: Tensor  # (ways, gates, inputs)
    hh: Tensor  # (ways, gates, outputs)
    bias_ih: Tensor | None  # (ways, 1, gates)
    bias_hh: Tensor | None
    hr: Tensor | None  # (ways, outputs, hidden), LSTM's projection


class _Run(NamedTuple):
    """What a layer computed, (ways, time, records, features) each."""

    h: Tensor  # states before the first moment and after each one, time + 1
    c: Tensor | None = None  # LSTM's cell states, likewise
    gates: Tensor | None = None  # after their sigmoid or tanh
    inner: Tensor | None = None  # GRU: W_hn h + b_hn. LSTM with a projection: what is projected


class _Back(NamedTuple):
    """Gradients of what a layer computed, (ways, time, records, features) each."""

    ih: Tensor  # of the pre-activations that W_ih adds to
    hh: Tensor  # of those that W_hh adds to; mostly the same tensor
    h: Tensor  # of the state before the first moment, (ways, records, outputs)
    c: Tensor | None = None


class Columns:
    """Gradients of matrices that share `g` (records, time, out): one matrix, and its columns are theirs."""

    def __init__(self, x: dict[str, Tensor], g: Tensor, groups: Groups) -> None:
        """Of inputs (records, time, in) by the name of their matrix."""
        self._widths = {name: t.shape[2] for name, t in x.items()}
        self._joined = outer(torch.cat(list(x.values()), 2), g, groups, weight="joined", bias=None)

    def squares(self) -> Tensor:
        """See `Kept`."""
        return self._joined.squares()

    def blank(self, unusable: Tensor) -> None:
        """See `Kept`."""
        self._joined.blank(unusable)

    def clipped(self, factor: Tensor) -> Gradients:
        """See `Kept`."""
        parts = torch.split(self._joined.clipped(factor)["joined"], list(self._widths.values()), 1)
        return {name: part.contiguous() for name, part in zip(self._widths, parts, strict=True)}

    @property
    def nbytes(self) -> int:
        """See `Kept`."""
        return self._joined.nbytes


class _Lengths:
    """How long each of the padded sequences in (time, records, ...) is; None where all last to the end."""

    def __init__(self, lengths: Tensor | None, time: int, device: torch.device) -> None:
        self._last: Tensor | None = None
        self.padded: Tensor | None = None  # (time, records, 1) bool
        if lengths is not None:
            self._last = lengths.to(device)[:, None] - 1  # (records, 1)
            moment = torch.arange(time, device=device)[:, None, None]
            self.padded = moment > self._last
            self._turned = torch.where(self.padded, moment, self._last - moment)

    def turned(self, x: Tensor) -> Tensor:
        """(time, records, features) from each sequence's last moment to its first; padding stays behind."""
        return x.flip(0) if self._last is None else x.gather(0, self._turned.expand_as(x))

    def last(self, x: Tensor) -> Tensor:
        """(ways, time, records, features) -> (ways, records, features) at each sequence's last moment."""
        if self._last is None:
            return x[:, -1]
        return x.gather(1, self._last.expand(len(x), 1, *x.shape[2:])).squeeze(1)


class RecurrentTap(Tap):
    """Layers above each other, each in one direction or in both. A kind of cell is a subclass with `scan` and `scan_back`."""

    def __init__(self, layer: nn.Module, shared: Pass) -> None:
        super().__init__(layer, shared)
        ways = ("", "_reverse") if self.layer.bidirectional else ("",)
        self.suffixes = [tuple(f"_l{number}{way}" for way in ways) for number in range(self.layer.num_layers)]
        names = [{kind + suffix for suffix in ways for kind in _PARAMETERS} for ways in self.suffixes]
        self.uses = sum(not self.learns.isdisjoint(of_layer) for of_layer in names)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """See torch's layer; what was given packed comes back packed.

        Raises:
            ValueError: the input is one sequence and not a batch.
        """
        packed = isinstance(input, PackedSequence)
        if packed and self.shared.public_shapes:
            raise Untappable("packed sequences: how far they are padded follows from the longest one")
        if not packed and input.dim() != 3:
            raise ValueError(f"a recurrent layer wants batches of sequences, 3 dimensions and not {input.dim()}")
        data, sizes = (input.data, input.batch_sizes) if packed else (input, None)
        if hx is None:
            self.layer.check_input(data, sizes)
        else:
            self.layer.check_forward_args(data, hx, sizes)
        if packed:
            x, lengths = pad_packed_sequence(input)
        else:
            x, lengths = input.transpose(0, 1) if self.layer.batch_first else input, None
        states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
        y, ends = self._layers(x, states, _Lengths(lengths, len(x), x.device))
        last = ends if isinstance(self, LSTMTap) else ends[0]
        if packed:
            return _packed_like(input, y), last
        return y.transpose(0, 1) if self.layer.batch_first else y, last

    def _layers(self, x: Tensor, states: tuple[Tensor, ...], lengths: _Lengths) -> tuple[Tensor, tuple[Tensor, ...]]:
        ends = []
        for number, suffixes in enumerate(self.suffixes):
            if number and self.layer.training and self.layer.dropout:
                x = F.dropout(x, self.layer.dropout)
            ways = len(suffixes)
            first = [s[number * ways : (number + 1) * ways] for s in states]
            x = x.unsqueeze(0) if ways == 1 else torch.stack([x, lengths.turned(x)])
            found: tuple[Tensor, ...] = _Scan.apply(
                self.shared.anchor, self, suffixes, lengths.padded, self.weights_of(suffixes), x, *first
            )
            ends.append([lengths.last(states) for states in found])
            x = found[0][0] if ways == 1 else torch.cat([found[0][0], lengths.turned(found[0][1])], 2)
        return x, tuple(torch.cat(of_layers) for of_layers in zip(*ends, strict=True))

    def weights_of(self, suffixes: tuple[str, ...]) -> _Weights:
        """One layer's weights as they are now, detached."""

        def stacked(name: str) -> Tensor:
            found = [getattr(self.layer, name + suffix).detach() for suffix in suffixes]
            return torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)

        return _Weights(
            stacked("weight_ih"),
            stacked("weight_hh"),
            stacked("bias_ih").unsqueeze(1) if self.layer.bias else None,
            stacked("bias_hh").unsqueeze(1) if self.layer.bias else None,
            stacked("weight_hr") if self.layer.proj_size else None,
        )

    def scan(self, x: Tensor, first: list[Tensor], weights: _Weights) -> _Run:
        """Forward through time from the states in `first`, (ways, records, features) each."""
        raise NotImplementedError

    def scan_back(self, run: _Run, g: Tensor, of_c: Tensor | None, weights: _Weights) -> _Back:
        """Back through time; `g` holds the gradient of the outputs and may be written to."""
        raise NotImplementedError

    def keep_way(self, suffix: str, x: Tensor, h: Tensor, back: list[Tensor], groups: Groups) -> list[Kept]:
        """What remains of one direction: inputs x, states h before each moment, both gradients; (records, time, ...)."""
        g = back[0]
        found: list[Kept] = []
        inputs = {f"weight_ih{suffix}": x, f"weight_hh{suffix}": h}
        columns = {name: t for name, t in inputs.items() if name in self.learns}
        if len(columns) > 1 and prefers_outer(h.shape[1], x.shape[2] + h.shape[2], g.shape[2]):
            found.append(Columns(columns, g, groups))  # so that the product of g with itself is taken once
        else:
            found += [outer(t, g, groups, weight=name, bias=None) for name, t in columns.items()]
        biases = [name for name in (f"bias_ih{suffix}", f"bias_hh{suffix}") if name in self.learns]
        if biases:
            total = groups.mean(g.sum(1))
            found.append(Built(dict.fromkeys(biases, total)))
        return found


class ElmanTap(RecurrentTap):
    """h_t = tanh(z_t), or its positive part (Elman 1990)."""

    def scan(self, x: Tensor, first: list[Tensor], weights: _Weights) -> _Run:
        """See `RecurrentTap`."""
        z = _times(x, weights.ih, _sum(weights.bias_ih, weights.bias_hh))
        h = _states(z, first[0])
        steps, hh = h.unbind(1), weights.hh.mT.contiguous()
        positive = self.layer.nonlinearity == "relu"
        for now, before, after in zip(z.unbind(1), steps, steps[1:], strict=False):
            torch.baddbmm(now, before, hh, out=after)
            if positive:
                torch.relu_(after)
            else:
                torch.tanh_(after)
        return _Run(h)

    def scan_back(self, run: _Run, g: Tensor, of_c: Tensor | None, weights: _Weights) -> _Back:
        """See `RecurrentTap`."""
        positive = self.layer.nonlinearity == "relu"
        later = None
        for after, now in _from_the_last(run.h[:, 1:], g):
            if later is not None:
                now.baddbmm_(later, weights.hh)
            if positive:
                _through_relu(now, after, 0, grad_input=now)
            else:
                _through_tanh(now, after, grad_input=now)
            later = now
        return _Back(g, g, torch.bmm(g[:, 0], weights.hh))


class LSTMTap(RecurrentTap):
    """Long short-term memory (Hochreiter and Schmidhuber 1997, Gers et al. 2000), with a projection or without."""

    def scan(self, x: Tensor, first: list[Tensor], weights: _Weights) -> _Run:
        """See `RecurrentTap`."""
        gates = _times(x, weights.ih, _sum(weights.bias_ih, weights.bias_hh))
        h, c = (_states(gates, s) for s in first)
        hidden = c.shape[3]
        out = h[:, 1:] if weights.hr is None else torch.empty_like(c[:, 1:])
        h_steps, c_steps, hh = h.unbind(1), c.unbind(1), weights.hh.mT.contiguous()
        parts = [part.unbind(1) for part in (gates, gates[..., : 2 * hidden], *gates.chunk(4, 3), out)]
        for t, (now, both, i, f, new, o, y) in enumerate(zip(*parts, strict=True)):
            now.baddbmm_(h_steps[t], hh)
            torch.sigmoid_(both)
            torch.tanh_(new)
            torch.sigmoid_(o)
            torch.mul(f, c_steps[t], out=c_steps[t + 1]).addcmul_(i, new)
            torch.tanh(c_steps[t + 1], out=y).mul_(o)
            if weights.hr is not None:
                torch.bmm(y, weights.hr.mT, out=h_steps[t + 1])
        return _Run(h, c, gates, None if weights.hr is None else out)

    def scan_back(self, run: _Run, g: Tensor, of_c: Tensor | None, weights: _Weights) -> _Back:
        """See `RecurrentTap`."""
        assert run.c is not None
        assert run.gates is not None
        hidden = run.c.shape[3]
        i, f, new, o = run.gates.chunk(4, 3)
        high = run.c[:, 1:].tanh()
        to_c = torch.ops.aten.tanh_backward(o, high)
        # the gates are not needed again, and fresh memory costs more than the arithmetic: dz takes their place
        dz, keep = run.gates, f.clone()
        _through_sigmoid(high, o, grad_input=o)
        _through_sigmoid(run.c[:, :-1], f, grad_input=f)
        high.copy_(i)
        _through_sigmoid(new, i, grad_input=i)
        _through_tanh(high, new, grad_input=new)
        dc = torch.zeros_like(high[:, 0])
        later = None
        of_states = dz.view(*high.shape[:3], 4, hidden)[..., :3, :]
        parts = _from_the_last(dz, of_states, o, to_c, keep, g, *(() if of_c is None else (of_c,)))
        for dz_now, of_state, of_out, to_c_now, keep_now, g_now, *more in parts:
            if later is not None:
                g_now.baddbmm_(later, weights.hh)
            dy = g_now if weights.hr is None else torch.bmm(g_now, weights.hr)
            dc.addcmul_(dy, to_c_now)
            if more:
                dc.add_(more[0])
            of_state.mul_(dc.unsqueeze(2))
            of_out.mul_(dy)
            dc.mul_(keep_now)
            later = dz_now
        return _Back(dz, dz, torch.bmm(dz[:, 0], weights.hh), dc)


class GRUTap(RecurrentTap):
    """Gated recurrent unit (Cho et al. 2014) as torch has it: the new gate resets W_hn h + b_hn, after the product."""

    def scan(self, x: Tensor, first: list[Tensor], weights: _Weights) -> _Run:
        """See `RecurrentTap`."""
        gates = _times(x, weights.ih, weights.bias_ih)
        h = _states(gates, first[0])
        hidden = h.shape[3]
        inner = torch.empty_like(h[:, 1:])
        steps, hh = h.unbind(1), weights.hh.mT.contiguous()
        add = torch.empty_like(gates[:, 0])
        add_both, add_new = add[..., : 2 * hidden], add[..., 2 * hidden :]
        bias = add.new_zeros(()) if weights.bias_hh is None else weights.bias_hh
        parts = [part.unbind(1) for part in (gates[..., : 2 * hidden], *gates.chunk(3, 3), inner)]
        for t, (both, reset, update, new, q) in enumerate(zip(*parts, strict=True)):
            torch.baddbmm(bias, steps[t], hh, out=add)
            torch.sigmoid_(both.add_(add_both))
            q.copy_(add_new)
            torch.tanh_(new.addcmul_(reset, add_new))
            torch.lerp(new, steps[t], update, out=steps[t + 1])
        return _Run(h, None, gates, inner)

    def scan_back(self, run: _Run, g: Tensor, of_c: Tensor | None, weights: _Weights) -> _Back:
        """See `RecurrentTap`."""
        assert run.gates is not None
        assert run.inner is not None
        hidden = g.shape[3]
        reset, update, new = run.gates.chunk(3, 3)
        to_new = torch.ops.aten.tanh_backward(1 - update, new)
        # the gates are not needed again, and fresh memory costs more than the arithmetic: dz takes their place
        dz, keep = run.gates, update.clone()
        torch.sub(run.h[:, :-1], new, out=new)
        _through_sigmoid(new, update, grad_input=update)
        torch.mul(to_new, reset, out=new)
        _through_sigmoid(to_new * run.inner, reset, grad_input=reset)
        later: tuple[Tensor, ...] = ()
        for dz_now, of_gates, keep_now, g_now in _from_the_last(dz, dz.view(*g.shape[:3], 3, hidden), keep, g):
            if later:
                g_now.addcmul_(*later[1:]).baddbmm_(later[0], weights.hh)
            of_gates.mul_(g_now.unsqueeze(2))
            later = (dz_now, keep_now, g_now)
        ih = torch.cat([dz[..., : 2 * hidden], to_new.mul_(g)], 3)
        return _Back(ih, dz, torch.baddbmm(g[:, 0] * keep[:, 0], dz[:, 0], weights.hh))

    def keep_way(self, suffix: str, x: Tensor, h: Tensor, back: list[Tensor], groups: Groups) -> list[Kept]:
        """See `RecurrentTap`."""
        found = []
        for kind, inputs, g in (("ih", x, back[0]), ("hh", h, back[1])):
            weight, bias = self.name(f"weight_{kind}{suffix}"), self.name(f"bias_{kind}{suffix}")
            if weight or bias:
                found.append(outer(inputs, g, groups, weight=weight, bias=bias))
        return found


class _Scan(torch.autograd.Function):
    """One layer in autograd's graph: states out, gradients of inputs and of first states back, the rest kept."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        tap: RecurrentTap,
        suffixes: tuple[str, ...],
        padded: Tensor | None,
        weights: _Weights,
        x: Tensor,
        *first: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.tap, ctx.suffixes, ctx.weights, ctx.given = tap, suffixes, weights, len(first)
        dtype = weights.ih.dtype
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            shape = (len(x), x.shape[2])
            widths = (weights.hh.shape[2], tap.layer.hidden_size)[: 2 if isinstance(tap, LSTMTap) else 1]
            states = [s.to(dtype) for s in first] or [x.new_zeros(*shape, width) for width in widths]
            run = tap.scan(x, states, weights)
        ctx.save_for_backward(padded, x, *run)
        return (run.h[:, 1:],) if run.c is None else (run.h[:, 1:], run.c[:, 1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        tap: RecurrentTap = ctx.tap
        weights: _Weights = ctx.weights
        padded, x, *states = ctx.saved_tensors
        x = x.detach()  # without the history that it comes with
        run = _Run(*states)
        g, of_c = (*grad_outputs, None)[:2]
        with torch.autocast(x.device.type, enabled=False):
            g = torch.zeros_like(run.h[:, 1:]) if g is None else g.to(x.dtype).clone(memory_format=torch.contiguous_format)
            back = tap.scan_back(run, g, of_c, weights)
            before = run.h[:, :-1] if padded is None else run.h[:, :-1].masked_fill(padded, 0)
            groups = tap.shared.groups_of(x.shape[2], x.device)
            found: list[Kept] = []
            for way, suffix in enumerate(ctx.suffixes):
                parts = [t[way].transpose(0, 1) for t in (x, before, back.ih, back.hh)]
                found += tap.keep_way(suffix, parts[0], parts[1], parts[2:], groups)
                hr = tap.name(f"weight_hr{suffix}")
                if hr is not None and run.inner is not None:
                    inner = run.inner[way].transpose(0, 1)
                    found.append(outer(inner, g[way].transpose(0, 1), groups, weight=hr, bias=None))
            if found:
                tap.kept.append(Joined(found))
            of_x = None
            if ctx.needs_input_grad[5]:
                of_x = torch.bmm(back.ih.flatten(1, 2), weights.ih).view_as(x)
        return None, None, None, None, None, of_x, *(back.h, back.c)[: ctx.given]


def _packed_like(packed: PackedSequence, y: Tensor) -> PackedSequence:
    """(time, records, features) without its padding, in the order of `packed`."""
    if packed.sorted_indices is not None:
        y = y.index_select(1, packed.sorted_indices)
    there = torch.arange(y.shape[1])[None] < packed.batch_sizes[:, None]
    return PackedSequence(y[there.to(y.device)], packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b


def _times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(ways, time, records, in) -> (ways, time, records, out), contiguous."""
    flat = x.flatten(1, 2)
    z = torch.bmm(flat, weight.mT) if bias is None else torch.baddbmm(bias, flat, weight.mT)
    return z.view(*x.shape[:3], -1)


def _states(z: Tensor, first: Tensor) -> Tensor:
    """Room for the states of all moments, (ways, time + 1, records, width), beginning with `first`."""
    ways, time, records = z.shape[:3]
    states = z.new_empty(ways, time + 1, records, first.shape[2])
    states[:, 0] = first
    return states


def _from_the_last(*through: Tensor) -> Any:
    """The tensors' moments together, from the last to the first."""
    return zip(*(t.unbind(1)[::-1] for t in through), strict=True)
