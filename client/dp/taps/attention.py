"""Multi-head attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762): its projections are linears over time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wardround.client.dp.taps.base import Pass, Tap
from wardround.client.dp.taps.kept import Gradients, Groups, Joined, outer


class _Projection(NamedTuple):
    """y = x weight' + bias, where both may be rows of the named parameters."""

    weight: Tensor
    bias: Tensor | None
    weight_name: str
    bias_name: str


class Stacked(Joined):
    """Things kept of one use; gradients of the same name are rows of one parameter, from the first to the last."""

    def clipped(self, factor: Tensor) -> Gradients:
        """See `Kept`."""
        found: dict[str, list[Tensor]] = {}
        for part in self._parts:
            for name, g in part.clipped(factor).items():
                found.setdefault(name, []).append(g)
        return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in found.items()}


class AttentionTap(Tap):
    """`nn.MultiheadAttention` with the parameters of its `out_proj`, whose own forward torch does not call."""

    layer: nn.MultiheadAttention
    within = ("out_proj",)

    def __init__(self, layer: nn.Module, shared: Pass) -> None:
        super().__init__(layer, shared)
        self.learns = frozenset(name for name, p in layer.named_parameters() if p.requires_grad)
        out = {"out_proj.weight", "out_proj.bias"}
        self.uses = int(not self.learns.isdisjoint(out)) + int(not self.learns <= out)

    @classmethod
    def takes(cls, layer: nn.Module) -> bool:
        """See `Tap`: not with a learned or a zero entry added to the keys, nor another `out_proj` than torch puts there."""
        assert isinstance(layer, nn.MultiheadAttention)
        as_made = type(layer.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
        return as_made and layer.bias_k is None and layer.bias_v is None and not layer.add_zero_attn

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention`.

        Raises:
            ValueError: the input is one sequence and not a batch, or a mask has another shape than torch wants.
            RuntimeError: `is_causal` without the mask that it is a hint about.
        """
        if not query.dim() == key.dim() == value.dim() == 3:
            raise ValueError(f"attention wants batches of sequences, 3 dimensions and not {query.dim()}")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is not given")
        q, k, v = self._projected(query, key, value)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(q, k, attn_mask, key_padding_mask)
        dropout = self.layer.dropout if self.layer.training else 0.0
        seen: Tensor | None = None
        if need_weights:
            scores = (q * q.shape[3] ** -0.5) @ k.mT
            seen = (scores if mask is None else scores + mask).softmax(3)
            seen = F.dropout(seen, dropout) if dropout else seen
            mixed = seen @ v
            seen = seen.mean(1) if average_attn_weights else seen
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        (y,) = self._linears([(mixed.transpose(1, 2).flatten(2), self._out())])
        return y if self.layer.batch_first else y.transpose(0, 1), seen

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values, (records, heads, time, width) each; inputs that are one tensor are multiplied once."""
        given, layer = (query, key, value), self.layer
        together = [(0, 1), (1, 2), (2, 3)]
        if layer._qkv_same_embed_dim and key is value:
            together = [(0, 3)] if query is key else [(0, 1), (1, 3)]
        inputs = [given[start] if layer.batch_first else given[start].transpose(0, 1) for start, _ in together]
        found = self._linears([(x, self._in(*rows)) for x, rows in zip(inputs, together, strict=True)])
        parts = [part for y in found for part in y.chunk(y.shape[2] // layer.embed_dim, 2)]
        heads = (layer.num_heads, layer.head_dim)
        return [part.reshape(*part.shape[:2], *heads).transpose(1, 2) for part in parts]

    def _in(self, start: int, stop: int) -> _Projection:
        """The projections `start` to `stop` of queries, keys and values."""
        layer, width = self.layer, self.layer.embed_dim
        rows = slice(start * width, stop * width)
        bias = None if layer.in_proj_bias is None else layer.in_proj_bias.detach()[rows]
        if layer._qkv_same_embed_dim:
            return _Projection(layer.in_proj_weight.detach()[rows], bias, "in_proj_weight", "in_proj_bias")
        name = f"{'qkv'[start]}_proj_weight"
        return _Projection(getattr(layer, name).detach(), bias, name, "in_proj_bias")

    def _out(self) -> _Projection:
        weight, bias = self.layer.out_proj.weight, self.layer.out_proj.bias
        return _Projection(weight.detach(), None if bias is None else bias.detach(), "out_proj.weight", "out_proj.bias")

    def _linears(self, work: list[tuple[Tensor, _Projection]]) -> list[Tensor]:
        inputs, projections = [x for x, _ in work], [projection for _, projection in work]
        return list(_Linears.apply(self.shared.anchor, self, projections, *inputs))

    def _mask(self, q: Tensor, k: Tensor, attention: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """What is added to the scores, to be broadcast to (records, heads, queries, keys)."""
        records, heads, queries, _ = q.shape
        keys = k.shape[2]
        total: Tensor | None = None
        if attention is not None:
            if attention.shape not in ((queries, keys), (records * heads, queries, keys)):
                raise ValueError(f"attn_mask has shape {list(attention.shape)}")
            total = _added(attention, q.dtype)
            total = total if total.dim() == 2 else total.view(records, heads, queries, keys)
        if padding is not None:
            if padding.shape != (records, keys):
                raise ValueError(f"key_padding_mask has shape {list(padding.shape)}")
            behind = _added(padding, q.dtype).view(records, 1, 1, keys)
            total = behind if total is None else total + behind
        return total

    def keep_linears(self, work: list[tuple[Tensor, _Projection]], gradients: list[Tensor], groups: Groups) -> None:
        """Keep what remains of inputs (records, time, in) and the gradients of their projections."""
        parts = []
        for (x, projection), g in zip(work, gradients, strict=True):
            weight, bias = self.name(projection.weight_name), self.name(projection.bias_name)
            if weight or bias:
                parts.append(outer(x, g, groups, weight=weight, bias=bias))
        if parts:
            self.kept.append(Stacked(parts))


class _Linears(torch.autograd.Function):
    """Projections of one or several inputs (records, time, in), kept together."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, tap: AttentionTap, projections: list[_Projection], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        ctx.tap, ctx.projections = tap, projections
        return tuple(F.linear(x, p.weight, p.bias) for x, p in zip(inputs, projections, strict=True))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tap: AttentionTap = ctx.tap
        projections: list[_Projection] = ctx.projections
        dtype = projections[0].weight.dtype  # under autocast inputs and outputs are shorter
        inputs = [x.detach().to(dtype) for x in ctx.saved_tensors]
        gradients = [g.to(dtype) for g in grad_outputs]
        groups = tap.shared.groups_of(len(inputs[0]), inputs[0].device)
        tap.keep_linears(list(zip(inputs, projections, strict=True)), gradients, groups)
        wanted = ctx.needs_input_grad[3:]
        back = [g @ p.weight if wants else None for g, p, wants in zip(gradients, projections, wanted, strict=True)]
        return None, None, None, *back


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to scores: minus infinity where a bool says true, or the numbers it already holds."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
