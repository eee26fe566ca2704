"""A tap: one layer's own forward, and a backward that keeps what the patients' gradients are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wardround.client.dp.taps.kept import Groups, Kept


class Untappable(ValueError):
    """A network, or what it did in a pass, that book-keeping does not cover; the text names the layer."""


class Pass:
    """One forward and backward over a batch: who the patients are, and what the layers kept.

    Attributes:
        groups: whose records these are; None means that every record is a patient of its own.
        public_shapes: whether no shape may follow from what the records say.
    """

    def __init__(self, *, public_shapes: bool = False) -> None:
        self.groups: Groups | None = None
        self.public_shapes = public_shapes
        self.anchor = torch.empty(0, requires_grad=True)  # makes autograd come by where no input of a layer learns

    def groups_of(self, rows: int, device: torch.device) -> Groups:
        """The patients of a layer's `rows`.

        Raises:
            ValueError: the rows are no multiple of the records.
        """
        if self.groups is None:
            self.groups = Groups.alone(rows, device)
        return self.groups.spread(rows)


class Tap:
    """What is known about one layer. A kind of layer is a subclass with `act`, `keep` and `pull_back`.

    Attributes:
        layer: the tapped module.
        learns: names of its own parameters that learn.
        kept: what its uses left behind since the last `clear`.
        uses: how many entries of `kept` one use makes.
        within: children that the tap computes itself, and whose parameters are its own.
    """

    uses = 1
    within: tuple[str, ...] = ()

    def __init__(self, layer: nn.Module, shared: Pass) -> None:
        self.layer: Any = layer
        self.shared = shared
        self.learns = frozenset(n for n, p in layer.named_parameters(recurse=False) if p.requires_grad)
        self.kept: list[Kept] = []
        self.plain: Callable[..., Any] = layer.forward

    @classmethod
    def takes(cls, layer: nn.Module) -> bool:
        """Whether this very layer, with its options, is one that the tap computes exactly."""
        return True

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The tensors `act` computes with; read anew at each use, since `functional_call` exchanges them."""
        found = (self.layer.weight, getattr(self.layer, "bias", None))
        return tuple(w.detach() for w in found if w is not None)

    def forward(self, x: Tensor) -> Tensor:
        """What stands in for the layer's forward while it is tapped."""
        y: Tensor = Tapped.apply(self.shared.anchor, self, x, *self.weights)
        return y

    def act(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer's output, and tensors that `keep` and `pull_back` need again."""
        raise NotImplementedError

    def keep(self, x: Tensor, g: Tensor, again: Sequence[Tensor], groups: Groups) -> Kept:
        """What remains of input `x` and the gradient `g` of the output."""
        raise NotImplementedError

    def pull_back(self, x: Tensor, g: Tensor, weights: Sequence[Tensor], again: Sequence[Tensor]) -> Tensor:
        """The gradient of the input."""
        raise NotImplementedError

    def name(self, own: str) -> str | None:
        """`own` if that parameter learns; None where it is frozen."""
        return own if own in self.learns else None


class Tapped(torch.autograd.Function):
    """A tap in autograd's graph: gradients of inputs flow on, gradients of weights are kept and not computed here."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tap: Tap, x: Tensor, *weights: Tensor) -> Tensor:
        """The layer's output."""
        y, again = tap.act(x, weights)
        ctx.save_for_backward(x, *weights, *again)
        ctx.tap, ctx.count = tap, len(weights)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the input, and none of the weights."""
        (g,) = grad_outputs
        x, *rest = ctx.saved_tensors
        tap: Tap = ctx.tap
        weights, again = rest[: ctx.count], rest[ctx.count :]
        with torch.autocast(x.device.type, enabled=False):  # whoever called, what is kept is not shortened
            g = g.to(weights[0].dtype)  # under autocast the output is shorter than the weights
            x, *again = (t.to(g.dtype) if t.is_floating_point() else t for t in (x, *again))
            x = x.detach()  # a saved tensor comes with its history, which nobody needs any more
            tap.kept.append(tap.keep(x, g, again, tap.shared.groups_of(len(x), x.device)))
            back = tap.pull_back(x, g, weights, again) if ctx.needs_input_grad[2] else None
        return None, None, back, *[None] * ctx.count
