"""Tables: what their columns mean, and how a row becomes numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from wardround.common.tasks.base import Records, blank, numbered, unfit


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
            raise unfit(f"column {self.column}", absent, "have no value")
        if self.yes:
            wrong = ~absent & ~np.isin(raw, (*self.yes, *self.no))
            entry = np.isin(raw, self.yes).astype(np.float64) - np.isin(raw, self.no)
            wanted = f"one of {sorted((*self.yes, *self.no))}"
        else:
            wrong = ~absent & ~((raw >= self.low) & (raw <= self.high))
            entry = np.nan_to_num(np.clip((raw - self.centre) / self.scale, -3, 3))
            wanted = f"between {self.low:g} and {self.high:g}"
        if wrong.any():
            raise unfit(f"column {self.column}", wrong, f"are not {wanted}")
        parts = [entry, absent] if self.may_be_missing else [entry]
        return np.stack([part.astype(np.float32) for part in parts], axis=1)


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

    def blank(self, count: int) -> Records:
        """See `Schema.blank`."""
        return blank(count, table=(self.width,))

    @property
    def classes(self) -> int:
        """Labels are 0 and 1."""
        return 2

    def encode(self, raw: Mapping[str, NDArray[np.float64]], patient: Sequence[str]) -> Records:
        """Raw numbers by column (NaN for absent) and a patient id per record -> `Records` with one field `table`."""
        table = np.concatenate([column.encode(raw[column.column]) for column in self.columns], axis=1)
        table /= np.float32(self.scale)
        outcome = raw[self.label]
        low, high = self.label_range
        wrong: NDArray[np.bool_] = ~((outcome >= low) & (outcome <= high))
        if wrong.any():
            raise unfit(f"label {self.label}", wrong, f"are not between {low:g} and {high:g}")
        return Records(
            {"table": torch.from_numpy(np.ascontiguousarray(table))},
            torch.from_numpy((outcome > self.positive_above).astype(np.int64)),
            numbered(patient),
        )
