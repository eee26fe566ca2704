"""What a layer keeps of one pass: enough for every patient's gradient length, and for the sum of the clipped gradients.

Two forms. `Built` holds each patient's gradient. `Outer` holds what it is a product of, for layers whose gradient would be
large and whose inputs are few; Goodfellow 2015 (https://arxiv.org/abs/1510.01799) for one vector a record, Li et al. 2022
(https://arxiv.org/abs/2110.05679) for several.

Lengths are the promise of clipping, so nothing here may understate one: squares are float64, and where the terms of a
product cancel, the part that float arithmetic may have lost is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

Gradients = dict[str, Tensor]  # by the parameter's name in its layer: "weight", "bias"

LONGEST = 1e15  # an activation or gradient longer than this is no learning; its patient counts as zero

_AT_ONCE = 2**16  # numbers whose length float32 sums
_GHOST = 8  # how many numbers of a built gradient cost as much as one of a Gram matrix over time; measured


def cancellation(dtype: torch.dtype, *, rows: int, time: int) -> float:
    """Which part of its terms is added to the length of a product over `time` that is summed over `rows` without being built.

    Two things are covered. The length itself: Gram matrices in float64 lose about sqrt(time) 2^-52 of the squared terms. And
    the sum over all rows: in float32 its terms share one accumulator with everybody else's, so a network chosen so that one
    patient's terms cancel must not bring in terms that eat the others' last bits; they are held to clip norm / this, and
    rows times 2^-24 of them stays below half the headroom. Honest lengths grow by less than a ten-thousandth.
    """
    if dtype == torch.float64:
        return 2.0**-24 * math.sqrt(time)
    return max(1e-4, rows * 2.0**-15)


class Groups:
    """Which rows belong to which patient. A patient's gradient is the mean over its records."""

    def __init__(self, patient: Tensor, patients: int, share: Tensor) -> None:
        self.patient = patient
        self.patients = patients
        self._share = share  # (rows,) a row's part in its patient's mean
        self._alone = False

    @classmethod
    def alone(cls, records: int, device: torch.device) -> Groups:
        """Every record is a patient of its own."""
        groups = cls(torch.arange(records, device=device), records, torch.ones(records, dtype=torch.float64, device=device))
        groups._alone = True
        return groups

    @classmethod
    def of(cls, patient: Tensor) -> Groups:
        """Records that are numbered by patient, 0, 1, ..., in ascending order."""
        size = torch.bincount(patient)
        if len(size) == len(patient):
            return cls.alone(len(patient), patient.device)
        return cls(patient, len(size), 1 / size[patient].double())

    @property
    def rows(self) -> int:
        """How many rows a tapped layer must see."""
        return len(self.patient)

    def spread(self, rows: int) -> Groups:
        """The same patients where a network folds several rows of a record into the batch, one record after the other.

        Raises:
            ValueError: `rows` is not a multiple of the records.
        """
        if rows == self.rows:
            return self
        each, rest = divmod(rows, self.rows)
        if rest or not each:
            raise ValueError(f"{rows} rows for {self.rows} records")
        return Groups(self.patient.repeat_interleave(each), self.patients, self._share.repeat_interleave(each))

    def mean(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (patients, ...), averaged over each patient's records. May be `x` itself."""
        if self._alone:
            return x
        weighted = x * self._share.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        return x.new_zeros(self.patients, *x.shape[1:]).index_add_(0, self.patient, weighted)

    def alike(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(patients, their rows (patients, each)) for every number of rows that a patient has here, ascending.

        What is computed shape by shape does not depend on how many rows some other patient has.
        """
        number = torch.arange(self.rows, device=self.patient.device)
        if self._alone:
            yield number, number[:, None]
            return
        size = torch.bincount(self.patient, minlength=self.patients)
        for each in sorted(set(size.tolist())):
            if each:
                yield (size == each).nonzero()[:, 0], number[size[self.patient] == each].view(-1, each)

    def shares(self, x: Tensor) -> Tensor:
        """`x`, each row times its part in its patient's mean. May be `x` itself."""
        return x if self._alone else x * self._share.to(x.dtype).view(-1, *[1] * (x.dim() - 1))

    def by_row(self, factor: Tensor) -> Tensor:
        """(patients,) -> (rows,): what each row is multiplied by when each patient's mean is multiplied by `factor`."""
        return factor if self._alone else factor[self.patient] * self._share.to(factor.dtype)


class Kept(Protocol):
    """What one use of a layer left behind."""

    def squares(self) -> Tensor:
        """Squared length of each patient's gradient in this layer, (patients,) float64; never less than the true one.

        Infinite or not a number where a patient's gradient is not usable.
        """

    def blank(self, unusable: Tensor) -> None:
        """Put zeros in place of the patients flagged in (patients,) bool: zero times infinity is no zero."""

    def clipped(self, factor: Tensor) -> Gradients:
        """Each patient's gradient times its entry of `factor`, (patients,), summed."""

    @property
    def nbytes(self) -> int:
        """Bytes held until the pass is over."""


class Built:
    """Each patient's gradient itself, (patients, ...) by parameter."""

    def __init__(self, of_patients: Gradients) -> None:
        self._of_patients = of_patients

    def squares(self) -> Tensor:
        """See `Kept`."""
        return sum_of_squares(list(self._of_patients.values()))

    def blank(self, unusable: Tensor) -> None:
        """See `Kept`."""
        for g in self._of_patients.values():
            g[unusable] = 0

    def clipped(self, factor: Tensor) -> Gradients:
        """See `Kept`."""
        return {name: (factor.to(g.dtype) @ g.flatten(1)).view(g.shape[1:]) for name, g in self._of_patients.items()}

    @property
    def nbytes(self) -> int:
        """See `Kept`."""
        return sum(g.nbytes for g in self._of_patients.values())


class Joined:
    """Several things kept of one use, of different parameters."""

    def __init__(self, parts: Sequence[Kept]) -> None:
        self._parts = parts

    def squares(self) -> Tensor:
        """See `Kept`."""
        return torch.stack([part.squares() for part in self._parts]).sum(0)

    def blank(self, unusable: Tensor) -> None:
        """See `Kept`."""
        for part in self._parts:
            part.blank(unusable)

    def clipped(self, factor: Tensor) -> Gradients:
        """See `Kept`."""
        return {name: g for part in self._parts for name, g in part.clipped(factor).items()}

    @property
    def nbytes(self) -> int:
        """See `Kept`."""
        return sum(part.nbytes for part in self._parts)


class Outer:
    """Gradients sum_t g_t x_t' (and sum_t g_t), of x (rows, time, in) and g (rows, time, out), not built.

    `x` and `g` may be shared with the network; they are not written to.
    """

    def __init__(self, x: Tensor, g: Tensor, groups: Groups, *, weight: str | None, bias: str | None) -> None:
        self._x, self._g, self._groups = x, g, groups
        self._weight, self._bias = weight, bias

    def squares(self) -> Tensor:
        """See `Kept`."""
        x, g = self._x.double(), self._groups.shares(self._g.double())
        total = x.new_empty(self._groups.patients)
        for patients, rows in self._groups.alike():  # side by side, nobody's memory depends on somebody else's records
            time = rows.shape[1] * x.shape[1]
            total[patients] = squares_of_outer(
                x[rows].reshape(len(rows), time, -1),
                g[rows].reshape(len(rows), time, -1),
                lost=cancellation(self._x.dtype, rows=len(x), time=time),
                with_weight=self._weight is not None,
                with_bias=self._bias is not None,
            )
        return total

    def blank(self, unusable: Tensor) -> None:
        """See `Kept`."""
        rows = unusable[self._groups.patient][:, None, None]
        self._x, self._g = self._x.masked_fill(rows, 0), self._g.masked_fill(rows, 0)

    def clipped(self, factor: Tensor) -> Gradients:
        """See `Kept`."""
        g = (self._g * self._groups.by_row(factor).to(self._g.dtype)[:, None, None]).flatten(0, 1)
        found = {}
        if self._weight is not None:
            found[self._weight] = g.T @ self._x.flatten(0, 1)
        if self._bias is not None:
            found[self._bias] = g.sum(0)
        return found

    @property
    def nbytes(self) -> int:
        """See `Kept`."""
        return self._x.nbytes + self._g.nbytes


def outer(x: Tensor, g: Tensor, groups: Groups, *, weight: str | None, bias: str | None) -> Kept:
    """The cheaper of both forms for x (rows, time, in), g (rows, time, out): a rule on shapes, the same on every machine."""
    if prefers_outer(x.shape[1], x.shape[2], g.shape[2]):
        return Outer(x, g, groups, weight=weight, bias=bias)
    found = {}
    if weight is not None:
        found[weight] = groups.mean(torch.bmm(g.mT, x))
    if bias is not None:
        found[bias] = groups.mean(g.sum(1))
    return Built(found)


def prefers_outer(time: int, inside: int, outside: int) -> bool:
    """Whether Gram matrices over `time` cost less than a built (outside, inside) gradient of each patient."""
    return time * time * (inside + outside) <= _GHOST * inside * outside


def sum_of_squares(parts: list[Tensor]) -> Tensor:
    """Squared length of each row over all `parts`, (rows, ...) each -> (rows,) float64.

    Lengths of up to 2^16 numbers are taken in the dtype of the parts: float32 loses less than 1e-5 of them, its overflow is an
    infinity and so a refusal, and its underflow begins at lengths of 1e-19.
    """
    total = torch.zeros(len(parts[0]), dtype=torch.float64, device=parts[0].device)
    for part in parts:
        flat = part.flatten(min(2, max(1, part.dim() - 1)))
        for some in torch.split(flat, _AT_ONCE, dim=-1):
            squares = torch.linalg.vector_norm(some, dim=-1).double().square()  # unlike a product, a norm makes no copy
            total += squares if squares.dim() == 1 else squares.sum(1)
    return total


def squares_of_outer(x: Tensor, g: Tensor, *, lost: float, with_weight: bool = True, with_bias: bool = False) -> Tensor:
    """|sum_t g_t x_t'|^2 (+ |sum_t g_t|^2) of x (patients, time, in), g (patients, time, out), both float64; rounded upwards.

    `lost` times the sum of the terms' lengths is added, see `cancellation`.
    """
    of_x, of_g = torch.linalg.vector_norm(x, dim=2), torch.linalg.vector_norm(g, dim=2)  # (patients, time)
    usable = (of_x.amax(1) <= LONGEST) & (of_g.amax(1) <= LONGEST)
    total = x.new_zeros(len(x))
    if x.shape[1] == 1:
        if with_weight:
            total += (of_x * of_g).square()[:, 0]
        if with_bias:
            total += of_g.square()[:, 0]
    else:
        if with_weight:
            total += (torch.bmm(x, x.mT) * torch.bmm(g, g.mT)).sum((1, 2)).clamp(min=0)
            total += (lost * (of_x * of_g).sum(1)).square()
        if with_bias:
            total += g.sum(1).square().sum(1) + (lost * of_g.sum(1)).square()
    return torch.where(usable, total, torch.inf)
