"""Taps: layers that remember what went through them, so that one backward pass is enough for every patient's gradient.

Book-keeping (Bu et al. 2023, https://arxiv.org/abs/2210.00038): autograd computes the gradients of activations only. What a
tapped layer kept gives the length of each patient's gradient, and then the sum of the clipped ones. A tap replaces the
`forward` of one layer object; modules, names and parameters stay torch's own.

    Taps.on(model)            which layers learn, and what is known about each
      with taps.installed():  forward, backward: layers keep
      taps.squares()          lengths, patient by patient
      taps.clipped(factor)    one tensor for each parameter
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wardround.client.dp.taps.activation import PReLUTap
from wardround.client.dp.taps.attention import AttentionTap
from wardround.client.dp.taps.bare import BareTap
from wardround.client.dp.taps.base import Pass, Tap, Untappable
from wardround.client.dp.taps.convolution import ConvolutionTap, TransposedConvolutionTap
from wardround.client.dp.taps.kept import Groups
from wardround.client.dp.taps.linear import EmbeddingTap, LinearTap
from wardround.client.dp.taps.norm import ChannelNormTap, GroupNormTap, InstanceNormTap, LayerNormTap, RMSNormTap
from wardround.client.dp.taps.recurrent import ElmanTap, GRUTap, LSTMTap

__all__ = ["Groups", "Taps", "Untappable"]

_KINDS: dict[type[nn.Module], type[Tap]] = {
    nn.Linear: LinearTap,
    nn.Embedding: EmbeddingTap,
    nn.Conv1d: ConvolutionTap,
    nn.Conv2d: ConvolutionTap,
    nn.Conv3d: ConvolutionTap,
    nn.ConvTranspose1d: TransposedConvolutionTap,
    nn.ConvTranspose2d: TransposedConvolutionTap,
    nn.ConvTranspose3d: TransposedConvolutionTap,
    nn.GroupNorm: GroupNormTap,
    nn.InstanceNorm1d: InstanceNormTap,
    nn.InstanceNorm2d: InstanceNormTap,
    nn.InstanceNorm3d: InstanceNormTap,
    nn.LayerNorm: LayerNormTap,
    nn.RMSNorm: RMSNormTap,
    nn.PReLU: PReLUTap,
    nn.RNN: ElmanTap,
    nn.LSTM: LSTMTap,
    nn.GRU: GRUTap,
    nn.MultiheadAttention: AttentionTap,
}
_BY_NAME: dict[str, type[Tap]] = {  # so that nobody who does without these layers has to import their package
    "torchvision.models.convnext.LayerNorm2d": ChannelNormTap,
}


def _kind(layer: nn.Module) -> type[Tap]:
    """The kind of tap for this very layer."""
    known = type(layer)
    kind = _KINDS.get(known) or _BY_NAME.get(f"{known.__module__}.{known.__qualname__}", BareTap)
    return kind if kind.takes(layer) else BareTap


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """Lengths and sums come from different products, so neither may be shortened: no TF32, no autocast, no gradients."""
    short = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = short


class Taps:
    """Taps for every learning layer of one network."""

    def __init__(self, taps: dict[str, Tap], shared: Pass) -> None:
        self._taps = taps
        self._shared = shared

    @classmethod
    def on(cls, model: nn.Module, *, public_shapes: bool = False) -> Taps:
        """Taps for `model`, not yet installed.

        Known layers are taken by their exact type, since a subclass may do something else; a module of another type that
        holds parameters itself gets the copies of `bare`.

        Raises:
            Untappable: weights are tied, or somebody else replaced a layer's forward.
        """
        shared = Pass(public_shapes=public_shapes)
        taps: dict[str, Tap] = {}
        seen: dict[int, str] = {}
        inside: set[nn.Module] = set()  # children that a tap computes itself
        for name, layer in model.named_modules():
            if layer in inside:
                continue
            kind = _kind(layer)
            parts = [layer, *(layer.get_submodule(child) for child in kind.within)]
            inside.update(parts[1:])
            named = [pair for part in parts for pair in part.named_parameters(recurse=False, remove_duplicate=False)]
            own = [p for _, p in named if p.requires_grad]
            if not own:
                continue
            for p in own:
                if id(p) in seen:
                    raise Untappable(f"layer {name} shares a parameter with layer {seen[id(p)]}")
                seen[id(p)] = name
            if "forward" in layer.__dict__:
                raise Untappable(f"layer {name} has a forward of its own making")
            if getattr(layer, "parametrizations", None) is not None:
                raise Untappable(f"layer {name} computes its weights anew at every use")
            taps[name] = kind(layer, shared)
        return cls(taps, shared)

    def install(self) -> None:
        """Let every layer keep from now on."""
        for tap in self._taps.values():
            tap.layer.__dict__["forward"] = tap.forward

    def remove(self) -> None:
        """Give every layer its own forward back."""
        self.clear()
        for tap in self._taps.values():
            tap.layer.__dict__.pop("forward", None)

    @contextlib.contextmanager
    def installed(self, groups: Groups | None = None) -> Iterator[None]:
        """Tapped within, untouched after, whatever happens. Without `groups` every record is a patient of its own."""
        self.clear()
        self._shared.groups = groups
        self.install()
        try:
            yield
        finally:
            self.remove()

    def clear(self) -> None:
        """Forget what was kept."""
        self._shared.groups = None
        for tap in self._taps.values():
            tap.kept.clear()
            if isinstance(tap, BareTap):
                tap.copies.clear()

    @property
    def used(self) -> bool:
        """Whether anything was kept since the last `clear`."""
        return any(tap.kept or (isinstance(tap, BareTap) and tap.copies) for tap in self._taps.values())

    @property
    def records(self) -> int:
        """How many records the last pass had; 0 where nothing was kept."""
        return 0 if self._shared.groups is None else self._shared.groups.rows

    def group(self, groups: Groups) -> None:
        """Whose the records of the coming pass are."""
        self._shared.groups = groups

    @_exactly()
    def squares(self) -> Tensor:
        """Squared length of each patient's whole gradient, (patients,) float64.

        Raises:
            Untappable: a layer was not used exactly once in this pass.
        """
        parts = []
        for name, tap in self._taps.items():
            if isinstance(tap, BareTap):
                tap.collect()
            if len(tap.kept) != tap.uses:
                raise Untappable(f"layer {name} was used {len(tap.kept) // tap.uses} times in one pass; once is wanted")
            parts += [kept.squares() for kept in tap.kept]
        return torch.stack(parts).sum(0)

    def blank(self, unusable: Tensor) -> None:
        """Put zeros in place of the patients flagged in (patients,) bool."""
        for tap in self._taps.values():
            for kept in tap.kept:
                kept.blank(unusable)

    @_exactly()
    def clipped(self, factor: Tensor) -> dict[str, Tensor]:
        """The sum of each patient's gradient times its `factor`, (patients,), by the parameter's full name."""
        return {
            f"{name}.{own}" if name else own: gradient
            for name, tap in self._taps.items()
            for kept in tap.kept
            for own, gradient in kept.clipped(factor).items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes that the layers keep at this moment."""
        return sum(kept.nbytes for tap in self._taps.values() for kept in tap.kept)
