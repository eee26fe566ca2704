"""Recurrent layers over records of different lengths, without packing: what is behind a record's end changes nothing.

Packed sequences have shapes that follow from how long each record is; here every shape is public.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wardround.common.models.parts import Reader, among, whole
from wardround.common.models.parts import dropout as dropping

CELLS: dict[str, Callable[..., nn.Module]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Recurrent(nn.Module):
    """Layers above each other, each in one direction or in both.  (batch, time, inputs) -> (batch, time, `width`).

    What torch's own layer gives for packed sequences, up to each record's end; behind it, numbers that mean nothing.
    """

    def __init__(
        self, inputs: int, *, hidden: int, layers: int, cell: str, bidirectional: bool = False, drop: float = 0.0
    ) -> None:
        super().__init__()
        whole(inputs=inputs, hidden=hidden, layers=layers)
        kind = among("cell", cell, CELLS)
        ways = 2 if bidirectional else 1
        self.width = ways * hidden
        widths = [inputs] + [self.width] * (layers - 1)
        self.layers = nn.ModuleList(
            nn.ModuleList(kind(width, hidden, batch_first=True) for _ in range(ways)) for width in widths
        )
        self.dropout = dropping(drop)

    def forward(self, x: Tensor, end: Tensor) -> Tensor:
        """`end` (batch,) is how many moments each record has."""
        for number, ways in enumerate(self.layers):
            assert isinstance(ways, nn.ModuleList)
            x = self.dropout(x) if number else x
            onward, *back = ways
            states = [onward(x)[0]]
            states += [_turned(layer(_turned(x, end))[0], end) for layer in back]
            x = torch.cat(states, 2)
        return x


def _turned(x: Tensor, end: Tensor) -> Tensor:
    """(batch, time, features), each record from its last moment to its first; what is behind the end stays there."""
    moment = torch.arange(x.shape[1], device=x.device)
    source = torch.where(moment < end[:, None], end[:, None] - 1 - moment, moment)
    return x.gather(1, source[..., None].expand_as(x))


class MeanOverTime(nn.Module):
    """(batch, time, width), (batch, time) bool -> (batch, width): the mean of the moments that are there; zero for none."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """See above."""
        return (x * present[..., None]).sum(1) / present.sum(1, keepdim=True).clamp(min=1)


class AttentionOverTime(nn.Module):
    """A mean in which each moment weighs what a learned score gives it, by softmax (Bahdanau et al. 2015,
    https://arxiv.org/abs/1409.0473).  (batch, time, width), (batch, time) bool -> (batch, width), zero where no moment is.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)  # softmax does not see a bias

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """See above."""
        score: Tensor = self.score(x).squeeze(2)
        weight = score.masked_fill(~present, torch.finfo(score.dtype).min).softmax(1) * present
        mean: Tensor = (x * weight[..., None]).sum(1)
        return mean


class EveryPlace(nn.Module):
    """(batch, time, width), (batch, time) bool -> (batch, time * width): all moments behind each other, zero where none is.

    For records of one length in which it counts what stands where.
    """

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """See above."""
        return (x * present[..., None]).flatten(1)


POOLS: dict[str, Callable[[int], nn.Module]] = {
    "mean": MeanOverTime, "attention": AttentionOverTime, "places": EveryPlace,
}  # fmt: skip


class TokenReader(Reader):
    """Texts and sequences of letters, 0 for padding.  (batch, length) int64 -> (batch, `width`).

    With `bag` the sum of the embeddings, over the root of how many they are, stands behind what the recurrent layers found.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        embedding: int,
        hidden: int,
        layers: int,
        cell: str,
        bidirectional: bool,
        pool: str,
        drop: float,
        length: int = 0,
        spread: float = 1.0,
        bag: bool = False,
    ) -> None:
        super().__init__()
        whole(vocabulary=vocabulary, embedding=embedding)
        if not 0 <= spread <= 1:
            raise ValueError(f"spread is {spread!r}; a number from 0 to 1 is wanted")
        if pool == "places" and not length:
            raise ValueError("pool is 'places', which is for sequences of one length; there are: mean, attention")
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=0)
        with torch.no_grad():
            self.embedding.weight.mul_(spread)
        self.recurrent = Recurrent(embedding, hidden=hidden, layers=layers, cell=cell, bidirectional=bidirectional, drop=drop)
        self.pool = among("pool", pool, POOLS)(self.recurrent.width)
        self.bag = bag
        self.width = self.recurrent.width * (length if pool == "places" else 1) + (embedding if bag else 0)

    def forward(self, tokens: Tensor) -> Tensor:
        """See above."""
        present = tokens != 0
        end = (present * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)).amax(1)
        embedded = self.embedding(tokens)
        features: Tensor = self.pool(self.recurrent(embedded, end), present)
        if not self.bag:
            return features
        unit = present / present.sum(1, keepdim=True).clamp(min=1).sqrt()  # a bag's length, however many words are in it
        return torch.cat([features, (embedded * unit[..., None]).sum(1)], 1)


class SeriesReader(Reader):
    """Hourly values and whether each was measured.  (batch, hours, inputs) -> (batch, `width`), attention over the hours."""

    def __init__(self, inputs: int, *, hidden: int, layers: int, cell: str, drop: float) -> None:
        super().__init__()
        self.recurrent = Recurrent(inputs, hidden=hidden, layers=layers, cell=cell, drop=drop)
        self.width = hidden
        self.pool = AttentionOverTime(hidden)

    def forward(self, series: Tensor) -> Tensor:
        """See above."""
        every = torch.ones(series.shape[:2], dtype=torch.bool, device=series.device)
        features: Tensor = self.pool(self.recurrent(series, every.sum(1)), every)
        return features
