"""Networks with one reader for each field of a record, side by side, and one linear head on what they all found."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wardround.common.models.parts import Reader, group_norm, whole
from wardround.common.models.parts import dropout as dropping
from wardround.common.models.recurrent import SeriesReader, TokenReader


class Fusion(nn.Module):
    """Fields by name, each as its reader wants it -> logits (batch, classes)."""

    def __init__(self, readers: Mapping[str, Reader], *, classes: int, drop: float = 0.0) -> None:
        super().__init__()
        whole(classes=classes)
        if not readers:
            raise ValueError("no field is read; give the size of at least one")
        self.readers = nn.ModuleDict(dict(readers))
        self.dropout = dropping(drop)
        self.head = nn.Linear(sum(reader.width for reader in readers.values()), classes)

    def forward(self, **fields: Tensor) -> Tensor:
        """See above.

        Raises:
            TypeError: a field is missing, or has no reader.
        """
        if fields.keys() != self.readers.keys():
            raise TypeError(f"the fields are {sorted(fields)}; the network reads {sorted(self.readers)}")
        found = [reader(fields[name]) for name, reader in self.readers.items()]
        logits: Tensor = self.head(self.dropout(torch.cat(found, 1)))
        return logits


class TableReader(Reader):
    """(batch, features) -> (batch, features): the head itself reads tables."""

    def __init__(self, features: int) -> None:
        super().__init__()
        whole(table=features)
        self.width = features

    def forward(self, table: Tensor) -> Tensor:
        """See above."""
        return table


class DenseReader(Reader):
    """(batch, features) -> (batch, hidden), one layer."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.width = hidden
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU())

    def forward(self, table: Tensor) -> Tensor:
        """See above."""
        found: Tensor = self.layers(table)
        return found


class ImageReader(Reader):
    """(batch, channels, height, width) -> (batch, hidden): three convolutions, then the mean over places."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.width = hidden
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), group_norm(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), group_norm(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, hidden, 3, padding=1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        """See above."""
        found: Tensor = self.layers(image).mean((2, 3))
        return found


def text_rnn(
    *,
    vocabulary: int = 20_000,
    classes: int = 4,
    embedding: int = 128,
    hidden: int = 128,
    layers: int = 2,
    cell: str = "rnn",
    bidirectional: bool = False,
    pool: str = "mean",
    dropout: float = 0.0,
    spread: float = 1.0,
    bag: bool = False,
) -> Fusion:
    """`tokens` through an embedding and recurrent layers; 2,626,564 parameters as it stands, for 20,000 words.

    Args:
        vocabulary: how many different tokens there are, padding included, which is 0.
        classes: of the answer.
        embedding: numbers for a token.
        hidden: numbers of a state, in each direction.
        layers: recurrent layers above each other.
        cell: "rnn", "lstm" or "gru".
        bidirectional: whether each layer also reads from the last token to the first.
        pool: "mean" or "attention", over the tokens that are no padding.
        dropout: between layers and before the head.
        spread: the deviation of the embeddings' first numbers; near 0, words that are hardly ever seen say hardly anything.
        bag: whether the head also reads the mean of the embeddings, whatever their order (Joulin et al. 2017,
            https://arxiv.org/abs/1607.01759).
    """
    reader = TokenReader(
        vocabulary, embedding=embedding, hidden=hidden, layers=layers, cell=cell, bidirectional=bidirectional, pool=pool,
        drop=dropout, spread=spread, bag=bag,
    )  # fmt: skip
    return Fusion({"tokens": reader}, classes=classes, drop=dropout)


def sequence_rnn(
    *,
    vocabulary: int,
    classes: int = 2,
    embedding: int = 16,
    hidden: int = 32,
    layers: int = 1,
    cell: str = "gru",
    bidirectional: bool = True,
    pool: str = "attention",
    length: int = 0,
    dropout: float = 0.0,
) -> Fusion:
    """`text_rnn` in the size for sequences of few letters, such as genes: read in both directions, with attention.

    With `pool = "places"` the head reads every one of `length` places by itself.
    """
    reader = TokenReader(
        vocabulary, embedding=embedding, hidden=hidden, layers=layers, cell=cell, bidirectional=bidirectional, pool=pool,
        drop=dropout, length=length,
    )  # fmt: skip
    return Fusion({"tokens": reader}, classes=classes, drop=dropout)


def series_rnn(
    *,
    inputs: int,
    classes: int = 2,
    hidden: int = 32,
    layers: int = 1,
    cell: str = "gru",
    table: int = 0,
    dropout: float = 0.0,
) -> Fusion:
    """`series` (batch, hours, inputs) with attention over the hours, and `table` (batch, table) beside it unless that is 0."""
    readers: dict[str, Reader] = {"series": SeriesReader(inputs, hidden=hidden, layers=layers, cell=cell, drop=dropout)}
    if table:
        readers["table"] = TableReader(table)
    return Fusion(readers, classes=classes, drop=dropout)


def fusion(
    *,
    classes: int = 2,
    channels: int = 0,
    inputs: int = 0,
    features: int = 0,
    vocabulary: int = 0,
    hidden: int = 32,
    cell: str = "gru",
    dropout: float = 0.0,
) -> Fusion:
    """Any of `image`, `series`, `table` and `tokens` together; a size of 0 leaves its field out.

    Args:
        classes: of the answer.
        channels: of `image` (batch, channels, height, width).
        inputs: of `series` (batch, hours, inputs).
        features: of `table` (batch, features).
        vocabulary: of `tokens` (batch, length), 0 for padding.
        hidden: what each reader gives.
        cell: of the readers of series and tokens: "rnn", "lstm" or "gru".
        dropout: before the head.
    """
    whole(hidden=hidden)
    readers: dict[str, Reader] = {}
    if channels:
        readers["image"] = ImageReader(channels, hidden)
    if inputs:
        readers["series"] = SeriesReader(inputs, hidden=hidden, layers=1, cell=cell, drop=0.0)
    if features:
        readers["table"] = DenseReader(features, hidden)
    if vocabulary:
        readers["tokens"] = TokenReader(
            vocabulary, embedding=hidden, hidden=hidden, layers=1, cell=cell, bidirectional=False, pool="attention", drop=0.0
        )
    return Fusion(readers, classes=classes, drop=dropout)
