"""Series: what was measured of a patient hour by hour, and how that becomes numbers.

Every number of a record follows from that record and public constants alone. A centre or scale worked out from the patients
would tie all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from wardround.common.tasks.base import Records, blank, numbered, unfit
from wardround.common.tasks.table import Column

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

FEW = 20  # of fewer values nobody can tell whether they are mistyped or in another unit


@dataclass(frozen=True)
class Variable:
    """One quantity that is measured again and again.

    A value becomes `(value - centre) / scale`, cut to [-3, 3]. One outside of [low, high] was not measured: records of
    intensive care hold mistyped values by the hundred. Where most of them are outside, the unit is wrong, which is refused.
    """

    name: str
    meaning: str
    low: float
    high: float
    centre: float
    scale: float
    also: tuple[str, ...] = ()  # other names of it in files, such as that of another way of measuring


@dataclass(frozen=True)
class Events:
    """Measurements in any order, those of one moment in the order of the file; four arrays, (events,).

    Attributes:
        record: which record.
        hour: hours since the record began.
        what: the position in `SeriesSchema.names`.
        value: in the unit of the schema.
    """

    record: Whole
    hour: Floats
    what: Whole
    value: Floats


@dataclass(frozen=True)
class SeriesSchema:
    """Hourly findings of one record, and findings that do not change beside them.

    The field `series` is (records, steps, 2 x variables): first the values, then 1 where there was a measurement and 0 where
    there was none. In one step the last value counts; it stays until the next one, and before the first there is 0. The field
    `table`, (records, width), is there where `static` has columns.

    Attributes:
        variables: what is measured.
        hours: how long a record is; what was measured later is left out.
        step: hours that share one entry.
        static: findings that do not change, from the labels or among the events, where the first counts; implausible values
            as in `Variable`.
        classes: labels are 0 .. classes - 1.
    """

    variables: tuple[Variable, ...]
    hours: int
    step: int = 1
    static: tuple[Column, ...] = ()
    classes: int = 2

    @property
    def steps(self) -> int:
        """Entries of a record along time."""
        return -(-self.hours // self.step)

    @property
    def inputs(self) -> int:
        """Numbers of one step."""
        return 2 * len(self.variables)

    @property
    def width(self) -> int:
        """Length of one encoded row of `table`."""
        return sum(column.width for column in self.static)

    @property
    def names(self) -> dict[str, int]:
        """What a file may call each variable, and behind them each static column -> its position.

        Where both have one name, an event of that name is the variable's.
        """
        static = {column.column: at for at, column in enumerate(self.static, start=len(self.variables))}
        return static | {name: at for at, v in enumerate(self.variables) for name in (v.name, *v.also)}

    def blank(self, count: int) -> Records:
        """See `Schema.blank`."""
        fields: dict[str, tuple[int, ...]] = {"series": (self.steps, self.inputs)}
        if self.static:
            fields["table"] = (self.width,)
        return blank(count, **fields)

    def encode(self, events: Events, static: Mapping[str, Floats], label: Sequence[int], patient: Sequence[str]) -> Records:
        """Measurements, static columns by name (NaN for absent; the others are looked for among the events) -> `Records`.

        Raises:
            DataRefused: a unit or a label that is not the task's; how many is told to the site alone.
        """
        outcome = np.asarray(label, dtype=np.int64)
        wrong: NDArray[np.bool_] = (outcome < 0) | (outcome >= self.classes)
        if wrong.any():
            raise unfit("the label", wrong, f"are not 0 to {self.classes - 1}")
        inside = (events.hour >= 0) & (events.hour < self.hours)
        order = np.flatnonzero(inside)
        order = order[np.lexsort((events.hour[order], events.record[order]))]  # lexsort keeps the file's order in ties
        timed = Events(events.record[order], events.hour[order], events.what[order], events.value[order])
        fields = {"series": torch.from_numpy(self._series(timed, len(outcome)))}
        if self.static:
            fields["table"] = torch.from_numpy(self._table(timed, static, len(outcome)))
        return Records(fields, torch.from_numpy(outcome), numbered(patient))

    def _series(self, events: Events, count: int) -> NDArray[np.float32]:
        values = np.zeros((count, self.steps, len(self.variables)), dtype=np.float32)
        measured = np.zeros_like(values, dtype=bool)
        for at, variable in enumerate(self.variables):
            mine = np.flatnonzero(events.what == at)
            value = events.value[mine]
            mine = mine[_plausible(variable.name, value, (value >= variable.low) & (value <= variable.high))]
            where = events.record[mine], (events.hour[mine] // self.step).astype(np.int64), at
            # of several values for one place the last one stays
            values[where] = np.clip((events.value[mine] - variable.centre) / variable.scale, -3, 3)
            measured[where] = True
        # the step of the latest measurement, as far as there was one
        step = np.arange(self.steps)[None, :, None]
        latest = np.maximum.accumulate(np.where(measured, step, -1), axis=1)
        carried = np.where(latest >= 0, np.take_along_axis(values, np.maximum(latest, 0), axis=1), np.float32(0))
        return np.concatenate([carried, measured.astype(np.float32)], axis=2)

    def _table(self, events: Events, static: Mapping[str, Floats], count: int) -> NDArray[np.float32]:
        parts = []
        for at, column in enumerate(self.static, start=len(self.variables)):
            if column.column in static:
                record, value = np.arange(count), static[column.column]
            else:
                mine = np.flatnonzero(events.what == at)[::-1]  # so that the first one is written last
                record, value = events.record[mine], events.value[mine]
            there = ~np.isnan(value) & ~np.isin(value, column.absent_values)
            record, value = record[there], value[there]
            expected = (
                np.isin(value, (*column.yes, *column.no)) if column.yes else (value >= column.low) & (value <= column.high)
            )
            keep = _plausible(column.column, value, expected)
            raw = np.full(count, np.nan)
            raw[record[keep]] = value[keep]
            parts.append(column.encode(raw))
        return np.concatenate(parts, axis=1)


def _plausible(name: str, value: Floats, inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`inside` itself; raises `DataRefused` if so much is outside that the unit must be another one."""
    if len(value) >= FEW and 2 * np.count_nonzero(~inside) > len(value):
        raise unfit(f"the unit of {name}", ~inside, "are outside of its plausible range, most of all")
    return inside
