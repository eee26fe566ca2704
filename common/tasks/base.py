"""A task: what one record looks like, which network reads it, and what is a good answer.

A record is a mapping of named fields, and a model's `forward` takes those names. Whatever a schema knows about values
(centre, scale, plausible range) is a public constant, written down before any patient was looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.common.errors import DataRefused
from wardround.common.metrics import Scores

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Records:
    """Records of one site, in memory.

    Attributes:
        fields: named tensors, each (records, ...).
        label: (records,) int64.
        patient: (records,) int64, numbering the patients 0, 1, ... in order of first appearance.
    """

    fields: Mapping[str, Tensor]
    label: Tensor
    patient: Tensor

    def __len__(self) -> int:
        return len(self.label)

    @property
    def patients(self) -> int:
        """How many different patients there are."""
        return int(self.patient.max()) + 1 if len(self) else 0

    def take(self, index: Tensor) -> Records:
        """The records at `index`, patients numbered anew."""
        _, patient = torch.unique(self.patient[index], return_inverse=True)
        return Records({k: v[index] for k, v in self.fields.items()}, self.label[index], patient)

    def to(self, device: torch.device) -> Records:
        """The same records on `device`."""
        fields = {name: tensor.to(device) for name, tensor in self.fields.items()}
        return Records(fields, self.label.to(device), self.patient.to(device))

    def of_patients(self, chosen: Tensor) -> Records:
        """All records of the patients flagged in `chosen`, (patients,) bool."""
        return self.take(torch.nonzero(chosen[self.patient]).squeeze(1))

    def __add__(self, other: Records) -> Records:
        """Both, taken as different patients."""
        return Records(
            {k: torch.cat([v, other.fields[k]]) for k, v in self.fields.items()},
            torch.cat([self.label, other.label]),
            torch.cat([self.patient, other.patient + self.patients]),
        )


@dataclass(frozen=True)
class Column:
    """One finding of a table and how it becomes numbers.

    A number becomes `(value - centre) / scale`, cut to [-3, 3]. A finding with `yes` and `no` values becomes 1 or -1. A
    value that may be absent becomes 0 and adds an entry that says so.
    """

    name: str
    meaning: str
    low: float = -np.inf  # the plausible range of a number; outside of it is a mistake of unit or column
    high: float = np.inf
    centre: float = 0.0
    scale: float = 1.0
    yes: tuple[float, ...] = ()
    no: tuple[float, ...] = ()
    may_be_missing: bool = True
    absent_values: tuple[float, ...] = ()  # numbers that some hospitals write for "not measured"
    read_from: str = ""  # the file's column, where one column holds two findings

    @property
    def column(self) -> str:
        """The file's column."""
        return self.read_from or self.name

    @property
    def width(self) -> int:
        """How many entries of the encoded row it takes."""
        return 1 + self.may_be_missing

    def encode(self, raw: NDArray[np.float64]) -> NDArray[np.float32]:
        """(records,) with NaN for absent -> (records, width).

        Raises:
            DataRefused: implausible or unexpected values; how many is told to the site alone.
        """
        raw = np.where(np.isin(raw, self.absent_values), np.nan, raw)
        absent = np.isnan(raw)
        if absent.any() and not self.may_be_missing:
            raise _unfit(f"column {self.column}", absent, "have no value")
        if self.yes:
            wrong = ~absent & ~np.isin(raw, (*self.yes, *self.no))
            entry = np.isin(raw, self.yes).astype(np.float64) - np.isin(raw, self.no)
            wanted = f"one of {sorted((*self.yes, *self.no))}"
        else:
            wrong = ~absent & ~((raw >= self.low) & (raw <= self.high))
            entry = np.nan_to_num(np.clip((raw - self.centre) / self.scale, -3, 3))
            wanted = f"between {self.low:g} and {self.high:g}"
        if wrong.any():
            raise _unfit(f"column {self.column}", wrong, f"are not {wanted}")
        parts = [entry, absent] if self.may_be_missing else [entry]
        return np.stack([part.astype(np.float32) for part in parts], axis=1)


def _unfit(what: str, wrong: NDArray[np.bool_], why: str) -> DataRefused:
    # even a count is a figure about patients, so it stays in the detail
    return DataRefused(f"{what} does not fit the task's schema", detail=f"{int(wrong.sum())} records {why}")


@dataclass(frozen=True)
class TableSchema:
    """The columns of one record of a table, its label, and how an absent value is written."""

    columns: tuple[Column, ...]
    label: str
    positive_above: float  # the label is 1 where its column is larger
    label_range: tuple[float, float]
    absent: tuple[str, ...] = ("", "?", "NA", "NaN", "nan")
    scale: float = 1.0  # every encoded row is divided by it

    @property
    def width(self) -> int:
        """Length of one encoded row."""
        return sum(column.width for column in self.columns)

    @property
    def names(self) -> list[str]:
        """The file's columns in order, the label last."""
        return [*dict.fromkeys(column.column for column in self.columns), self.label]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one record's entry for each field, as in `ArraySchema`."""
        return {"table": (self.width,)}

    def encode(self, raw: Mapping[str, NDArray[np.float64]], patient: Sequence[str]) -> Records:
        """Raw numbers by column (NaN for absent) and a patient id per record -> `Records` with one field `table`."""
        table = np.concatenate([column.encode(raw[column.column]) for column in self.columns], axis=1)
        table /= np.float32(self.scale)
        outcome = raw[self.label]
        low, high = self.label_range
        wrong: NDArray[np.bool_] = ~((outcome >= low) & (outcome <= high))
        if wrong.any():
            raise _unfit(f"label {self.label}", wrong, f"are not between {low:g} and {high:g}")
        return Records(
            {"table": torch.from_numpy(np.ascontiguousarray(table))},
            torch.from_numpy((outcome > self.positive_above).astype(np.int64)),
            _numbered(patient),
        )


@dataclass(frozen=True)
class ArraySchema:
    """Fields that arrive as ready arrays, such as images.

    Attributes:
        shapes: shape of one record's entry for each field.
        classes: labels are 0 .. classes - 1.
        low, high: the plausible range of every value.
        centre, scale: public constants; values become (value - centre) / scale.
    """

    shapes: Mapping[str, tuple[int, ...]]
    classes: int
    low: float
    high: float
    centre: float = 0.0
    scale: float = 1.0

    def encode(self, raw: Mapping[str, NDArray[Any]], label: NDArray[Any], patient: Sequence[str]) -> Records:
        """Arrays by field, labels and a patient id per record -> `Records`; raises `DataRefused`."""
        numeric = label.dtype.kind in "biuf" and label.shape == (len(patient),)
        if not numeric or not np.isin(label, np.arange(self.classes)).all():
            raise DataRefused(f"the labels are not one number from 0 to {self.classes - 1} for each record")
        found = {}
        for name, shape in self.shapes.items():
            if name not in raw or raw[name].shape != (len(label), *shape) or raw[name].dtype.kind not in "biuf":
                raise DataRefused(f"field {name} is not one array of shape {list(shape)} for each record")
            values: NDArray[Any] = raw[name]
            inside = ((values >= self.low) & (values <= self.high)).reshape(len(label), -1)
            wrong = ~np.asarray(inside.all(axis=1))
            if wrong.any():
                raise _unfit(f"field {name}", wrong, f"hold values outside {self.low:g} to {self.high:g}")
            found[name] = torch.from_numpy((values.astype(np.float32) - self.centre) / self.scale)
        return Records(found, torch.from_numpy(label.astype(np.int64)), _numbered(patient))


def _numbered(patient: Sequence[str]) -> Tensor:
    # patients 0, 1, ... in order of first appearance
    number: dict[str, int] = {}
    return torch.tensor([number.setdefault(owner, len(number)) for owner in patient], dtype=torch.int64)


@dataclass(frozen=True)
class Task:
    """One clinical question, ready to be trained anywhere.

    Attributes:
        schema: what one record looks like.
        build: a fresh network from the plan's [model] options.
        loss: logits (batch, classes) and labels (batch,) -> one value per record (batch,); the engine sums.
        headline: the metric people ask for first.
    """

    name: str
    title: str
    schema: TableSchema | ArraySchema
    build: Callable[[Mapping[str, Any]], nn.Module]
    loss: Loss
    headline: str = "auroc"
    metrics: tuple[str, ...] = field(default=("auroc", "accuracy", "log_loss"))

    def size(self, options: Mapping[str, Any]) -> int:
        """How many numbers learn in the network of these options, counted without taking their memory."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.build(options).parameters() if p.requires_grad)

    def blank(self, count: int) -> Records:
        """`count` records of nobody: all zeros, in the shapes and dtypes of real ones, each a patient of its own."""
        fields = {name: torch.zeros(count, *shape, dtype=torch.float32) for name, shape in self.schema.shapes.items()}
        return Records(fields, torch.zeros(count, dtype=torch.int64), torch.arange(count))

    def model(self, options: Mapping[str, Any], seed: int) -> nn.Module:
        """A network whose first weights follow from `seed` alone; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(options)


def scores(model: nn.Module, weights: Mapping[str, Tensor], records: Records) -> Scores:
    """Predictions of a two-class model with `weights` for `records`, in chunks of 1,024."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(records), 1024):
            chunk = {name: tensor[start : start + 1024] for name, tensor in records.fields.items()}
            logits = torch.func.functional_call(model, dict(weights), args=(), kwargs=chunk)
            parts.append(logits.softmax(1)[:, 1])
    probability = torch.cat(parts) if parts else torch.empty(0)
    return Scores(probability.double().numpy(), records.label.numpy())
