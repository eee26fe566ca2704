"""A small transformer encoder (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762) for tokens or for series."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wardround.common.models.fusion import Fusion
from wardround.common.models.parts import Reader, whole
from wardround.common.models.parts import dropout as dropping
from wardround.common.models.recurrent import MeanOverTime


class _Positions(nn.Module):
    """A learned vector for each place, added.  (batch, time, width) -> the same."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, length, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.place[:, : x.shape[1]]


class _Block(nn.Module):
    """Attention and two linear layers, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=float(drop), batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), dropping(drop), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, unseen: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, key_padding_mask=unseen, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Encoder(nn.Module):
    """Blocks over time and the mean of what is there.  (batch, time, width), (batch, time) bool -> (batch, width)."""

    def __init__(self, *, length: int, width: int, heads: int, layers: int, drop: float) -> None:
        super().__init__()
        whole(length=length, width=width, heads=heads, layers=layers)
        if width % heads:
            raise ValueError(f"width is {width}; {heads} heads want a multiple of themselves")
        self.positions = _Positions(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads, drop) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.pool = MeanOverTime(width)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """See above."""
        unseen = ~present
        unseen[:, 0] = False  # a record of padding alone attends to one place, or softmax divides by zero
        x = self.positions(x)
        for block in self.blocks:
            x = block(x, unseen)
        pooled: Tensor = self.pool(self.norm(x), present)
        return pooled


class _Tokens(Reader):
    """(batch, length) int64, 0 for padding behind -> (batch, width)."""

    def __init__(self, vocabulary: int, width: int, encoder: Encoder) -> None:
        super().__init__()
        whole(vocabulary=vocabulary)
        self.width, self.encoder = width, encoder
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.encoder(self.embedding(tokens), tokens != 0)
        return found


class _Series(Reader):
    """(batch, hours, inputs) -> (batch, width)."""

    def __init__(self, inputs: int, width: int, encoder: Encoder) -> None:
        super().__init__()
        whole(inputs=inputs)
        self.width, self.encoder = width, encoder
        self.project = nn.Linear(inputs, width)

    def forward(self, series: Tensor) -> Tensor:
        every = torch.ones(series.shape[:2], dtype=torch.bool, device=series.device)
        found: Tensor = self.encoder(self.project(series), every)
        return found


def transformer(
    *,
    length: int,
    vocabulary: int = 0,
    inputs: int = 0,
    classes: int = 2,
    width: int = 32,
    heads: int = 2,
    layers: int = 2,
    dropout: float = 0.0,
) -> Fusion:
    """`tokens` (batch, at most length) where a vocabulary is given, `series` (batch, at most length, inputs) otherwise.

    Raises:
        ValueError: both or neither are given, or the heads do not divide the width.
    """
    if bool(vocabulary) == bool(inputs):
        raise ValueError("one of vocabulary (for tokens) and inputs (for series) is wanted")
    encoder = Encoder(length=length, width=width, heads=heads, layers=layers, drop=dropout)
    if vocabulary:
        return Fusion({"tokens": _Tokens(vocabulary, width, encoder)}, classes=classes, drop=dropout)
    return Fusion({"series": _Series(inputs, width, encoder)}, classes=classes, drop=dropout)
