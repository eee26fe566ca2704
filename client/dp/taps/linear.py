"""Linear layers and embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wardround.client.dp.taps.base import Tap
from wardround.client.dp.taps.kept import Gradients, Groups, Kept, outer, sum_of_squares


class LinearTap(Tap):
    """y_t = W x_t + b at each moment t: gradients are sums over time of outer products."""

    layer: nn.Linear

    def act(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Tap`."""
        return F.linear(x, *weights), ()

    def keep(self, x: Tensor, g: Tensor, again: Sequence[Tensor], groups: Groups) -> Kept:
        """See `Tap`."""
        x, g = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, g))
        return outer(x, g, groups, weight=self.name("weight"), bias=self.name("bias"))

    def pull_back(self, x: Tensor, g: Tensor, weights: Sequence[Tensor], again: Sequence[Tensor]) -> Tensor:
        """See `Tap`."""
        return g @ weights[0]


class EmbeddingTap(Tap):
    """Rows of a table, looked up: a row's gradient is the sum over the moments that read it."""

    layer: nn.Embedding

    @classmethod
    def takes(cls, layer: nn.Module) -> bool:
        """See `Tap`: not where reading changes the table, or where the batch decides a row's weight."""
        assert isinstance(layer, nn.Embedding)
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse

    def act(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Tap`."""
        return F.embedding(x, weights[0]), ()

    def keep(self, x: Tensor, g: Tensor, again: Sequence[Tensor], groups: Groups) -> Kept:
        """See `Tap`."""
        g = groups.shares(g.reshape(len(x), -1, g.shape[-1]))
        index = x.reshape(len(x), -1)
        if self.layer.padding_idx is not None:
            g = g * (index != self.layer.padding_idx)[..., None]
        return Rows(index, g, groups, self.layer.num_embeddings)


class Rows:
    """Each patient's gradient of a table, built for the rows it has read and no others."""

    def __init__(self, index: Tensor, g: Tensor, groups: Groups, table_rows: int) -> None:
        """Of index (records, time) and g (records, time, width), zero where nothing was read."""
        key = (index + table_rows * groups.patient[:, None]).flatten()  # equal for one patient's readings of one row
        order = key.argsort(stable=True)
        key = key[order]
        first = torch.ones_like(key, dtype=torch.bool)
        first[1:] = key[1:] != key[:-1]
        place = first.cumsum(0) - 1  # equal keys come together
        self._gradient = torch.zeros_like(g.flatten(0, 1)).index_add_(0, place, g.flatten(0, 1)[order])
        met = torch.zeros_like(key).scatter_(0, place, key)
        self._row, self._patient = met % table_rows, met // table_rows
        self._groups, self._table_rows = groups, table_rows

    def squares(self) -> Tensor:
        """See `Kept`."""
        of_rows = sum_of_squares([self._gradient])
        return of_rows.new_zeros(self._groups.patients).index_add_(0, self._patient, of_rows)

    def blank(self, unusable: Tensor) -> None:
        """See `Kept`."""
        self._gradient[unusable[self._patient]] = 0

    def clipped(self, factor: Tensor) -> Gradients:
        """See `Kept`."""
        g = self._gradient * factor.to(self._gradient.dtype)[self._patient, None]
        table = g.new_zeros(self._table_rows, g.shape[1])
        return {"weight": table.index_add_(0, self._row, g)}

    @property
    def nbytes(self) -> int:
        """See `Kept`."""
        return self._gradient.nbytes + self._row.nbytes + self._patient.nbytes
