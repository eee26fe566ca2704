"""Records' gradients of a convolution's weight: products of what the kernel sees at each place and what comes back there.

A place is one position of the kernel, T of them a record; a patch is what the kernel sees there, kernel x channels numbers.
Which way is taken depends on shapes and on the kind of device, so the same numbers come out in the same bits everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wardround.client.dp.taps.kept import LONGEST, Built, Gradients, Groups, cancellation, squares_of_outer, sum_of_squares

# Measured in float32 on one thread of a CPU with 2 MiB of second-level cache. Constants, never timed anew: what is computed
# must not depend on how fast a machine is.
_AT_ONCE = 2**18  # numbers in the patches of the records computed at once: they stay in cache from copy to product
_AT_ONCE_CUDA = 2**26  # there, filling the device counts
_FEW = 8  # channels below which the convolution kernels' blocks are mostly empty
_SHORT = 12  # numbers in a run of channels and neighbours below which copying patches place by place is slow
_MANY_PLACES = 128  # from here a product with few columns is slower than the convolution kernel it imitates
_FEW_PLACES = 8  # up to here the sum over records is faster as one product of matrices than by the convolution kernel
_IN_A_SUM = 16  # times as many records at once there, since every product goes over the whole weight
_GHOST = 36  # how many numbers of a built gradient cost as much as one of the Gram matrices over places
_SMALL = 2**14  # numbers in a record's gradient up to which nothing is cheaper than to build it


@dataclass(frozen=True)
class Windows:
    """Where a kernel looks, dimension by dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many places there are."""
        return math.prod(self.places)

    @property
    def single(self) -> bool:
        """Whether a kernel sees one position only."""
        return math.prod(self.kernel) == 1

    def channels_first(self, x: Tensor) -> Tensor:
        """Patches of x (records, channels, ...), (records, channels x kernel, places). May share memory with `x`."""
        if self.single and x.shape[2:] == self.places and not any(self.padding) and set(self.stride) == {1}:
            return x.flatten(2)
        padded = x.contiguous()
        if any(self.padding):
            padded = F.pad(x, [p for p in reversed(self.padding) for _ in range(2)])
        record, channel, *steps = padded.stride()
        seen = padded.as_strided(
            (*x.shape[:2], *self.kernel, *self.places),
            (record, channel, *self._times(self.dilation, steps), *self._times(self.stride, steps)),
        )
        return seen.reshape(len(x), x.shape[1] * math.prod(self.kernel), self.count)

    def channels_last(self, x: Tensor) -> Tensor:
        """Patches of x (records, channels, ...), (records, places, kernel x channels)."""
        channels = x.shape[1]
        sizes = [size + 2 * p for size, p in zip(x.shape[2:], self.padding, strict=True)]
        padded = x.new_zeros(len(x), *sizes, channels)
        inside = tuple(slice(p, p + size) for size, p in zip(x.shape[2:], self.padding, strict=True))
        padded[(slice(None), *inside)] = x.movedim(1, -1)
        record, *steps, _ = padded.stride()
        seen = padded.as_strided(
            (len(x), *self.places, *self.kernel, channels),
            (record, *self._times(self.stride, steps), *self._times(self.dilation, steps), 1),
        )
        return seen.reshape(len(x), self.count, math.prod(self.kernel) * channels)

    @staticmethod
    def _times(factors: tuple[int, ...], steps: list[int]) -> list[int]:
        return [factor * step for factor, step in zip(factors, steps, strict=True)]

    def trimmed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """`x` up to the last position that is seen, so that a convolution finds `places` and no more; the padding then left.

        An output padding of the transpose adds positions that no kernel comes to.
        """
        last = [
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(self.places, self.stride, self.kernel, self.dilation, strict=True)
        ]
        spare = [size + 2 * p - end for size, p, end in zip(x.shape[2:], self.padding, last, strict=True)]
        if all(left < s for left, s in zip(spare, self.stride, strict=True)):
            return x, self.padding
        x = F.pad(x, [p for p in reversed(self.padding) for _ in range(2)])
        for dim, end in enumerate(last, start=2):
            x = x.narrow(dim, 0, end)
        return x, (0,) * len(last)


@dataclass(frozen=True)
class Passed:
    """What went through a convolution: `seen` by the kernel, (rows, in, ...), and `met` by it, (rows, out, places)."""

    seen: Tensor
    met: Tensor
    windows: Windows
    channel_groups: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in of one channel group, kernel)."""
        return (self.met.shape[1], self.seen.shape[1] // self.channel_groups, *self.windows.kernel)

    @property
    def stays_outer(self) -> bool:
        """Whether a record's gradient is large and its places are few."""
        inside = self.seen.shape[1] * math.prod(self.windows.kernel)
        outside = self.met.shape[1]
        numbers = inside * outside
        return self.channel_groups == 1 and numbers > _SMALL and self.windows.count**2 * (inside + outside) <= _GHOST * numbers

    def built(self, groups: Groups) -> Built:
        """Every patient's gradient of the weight."""
        if self.channel_groups > 1 or self._suits_the_kernel:
            return Built({"weight": groups.mean(self._by_kernel())})
        if self._runs_are_short:
            return Built({"weight": groups.mean(self._by_products(turned=False))})
        return _Turned({"weight": groups.mean(self._by_products(turned=True))})

    @property
    def _runs_are_short(self) -> bool:
        one = self.windows.kernel[-1] if self.windows.dilation[-1] == 1 else 1
        return self.seen.shape[1] * one < _SHORT or self.windows.single

    @property
    def _suits_the_kernel(self) -> bool:
        return (
            self.windows.count >= _MANY_PLACES
            and min(self.seen.shape[1], self.met.shape[1]) >= _FEW
            and self.seen.device.type == "cpu"
            and self.seen.dtype != torch.float64  # for which there is no such kernel
        )

    def _by_kernel(self) -> Tensor:
        """(rows, out, in of one channel group, kernel): one grouped convolution in which every row has its own channels."""
        windows, rows, shape = self.windows, len(self.seen), self.weight_shape
        seen, padding = windows.trimmed(self.seen)
        seen = seen.reshape(1, -1, *seen.shape[2:])
        met = self.met.reshape(1, -1, *windows.places)
        like = seen.new_empty(rows * shape[0], *shape[1:])  # its numbers do not matter for its own gradient
        found: Tensor = torch.ops.aten.convolution_backward(
            met, seen, like, None, windows.stride, padding, windows.dilation, False, (0,) * len(padding),
            rows * self.channel_groups, (False, True, False),
        )[1]  # fmt: skip
        return found.view(rows, *shape)

    def _by_products(self, *, turned: bool) -> Tensor:
        """(rows, out, in, kernel), or (rows, out, kernel, in) if `turned`: patches are copied out, some rows at once."""
        rows, (outside, inside, *kernel) = len(self.seen), self.weight_shape
        met = self.met.flatten(2)
        found = met.new_empty(rows, outside, inside * math.prod(kernel))
        for some in chunks(rows, found.shape[2] * met.shape[2], self.seen.device):
            seen = self.seen[some]
            patches = self.windows.channels_last(seen) if turned else self.windows.channels_first(seen).mT
            torch.bmm(met[some], patches, out=found[some])
        return found.view(rows, outside, *kernel, inside) if turned else found.view(rows, *self.weight_shape)

    def squares(self, groups: Groups) -> Tensor:
        """Squared length of each patient's gradient of the weight, (patients,) float64, never less than the true one."""
        met = groups.shares(self.met.flatten(2))
        outside, places = met.shape[1:]
        inside = math.prod(self.weight_shape[1:])
        total = met.new_empty(groups.patients, dtype=torch.float64)
        for patients, rows in groups.alike():
            time = rows.shape[1] * places
            by_time = 2 * time * (inside + outside) <= inside * outside  # a number of float64 costs as much as two
            for some in chunks(len(rows), time * (inside + outside), met.device, times=2):
                chosen = rows[some].flatten()
                x = self.windows.channels_last(self.seen[chosen]).view(-1, time, inside)
                g = met[chosen].mT.reshape(-1, time, outside)
                square = squares_by_time if by_time else squares_by_building
                lost = cancellation(x.dtype, rows=len(self.seen), time=time)
                total[patients[some]] = square(x, g, lost=lost)
        return total

    def blanked(self, rows: Tensor) -> Passed:
        """The same with zeros in the flagged rows, (rows,) bool."""
        seen, met = (t.masked_fill(rows.view(-1, *[1] * (t.dim() - 1)), 0) for t in (self.seen, self.met))
        return Passed(seen, met, self.windows, self.channel_groups)

    def summed(self, factor: Tensor) -> Tensor:
        """The sum over rows of their gradients times `factor`, (rows,); in the weight's shape."""
        met = self.met * factor.to(self.met.dtype).view(-1, *[1] * (self.met.dim() - 1))
        if self.windows.count <= _FEW_PLACES or self.seen.is_cuda:  # there a kernel may be one by Fourier transforms
            return self._summed_by_products(met.flatten(2))
        windows = self.windows
        seen, padding = windows.trimmed(self.seen)
        found: Tensor = torch.ops.aten.convolution_backward(
            met, seen, seen.new_empty(self.weight_shape), None, windows.stride, padding, windows.dilation, False,
            (0,) * len(padding), self.channel_groups, (False, True, False),
        )[1]  # fmt: skip
        return found

    def _summed_by_products(self, met: Tensor) -> Tensor:
        outside, inside, *kernel = self.weight_shape
        total = met.new_zeros(outside, math.prod(kernel) * inside)
        for some in chunks(len(met), total.shape[1] * met.shape[2], met.device, times=_IN_A_SUM, once=True):
            patches = self.windows.channels_last(self.seen[some])
            patches = patches.view(*patches.shape[:2], -1, inside).mT  # turned here, where there are fewer than weights
            total.addmm_(met[some].movedim(1, 0).flatten(1), patches.reshape(-1, total.shape[1]))
        return total.view(self.weight_shape)


def squares_by_time(x: Tensor, g: Tensor, *, lost: float) -> Tensor:
    """See `squares_of_outer`."""
    return squares_of_outer(x.double(), g.double(), lost=lost)


def squares_by_building(x: Tensor, g: Tensor, *, lost: float) -> Tensor:
    """The same from gradients that are built in the dtype of x (patients, time, in), g (patients, time, out), and dropped.

    The sum is taken another way and rounds otherwise, so what cancellation may have lost is added here as well.
    """
    of_x, of_g = (torch.linalg.vector_norm(t, dim=2).double() for t in (x, g))
    built = sum_of_squares([torch.bmm(g.mT, x)])
    usable = (of_x.amax(1) <= LONGEST) & (of_g.amax(1) <= LONGEST)
    return torch.where(usable, built + (lost * (of_x * of_g).sum(1)).square(), torch.inf)


def chunks(count: int, numbers: int, device: torch.device, *, times: int = 1, once: bool = False) -> Iterator[slice]:
    """`count` things of so many `numbers` each, as many at once as is good, or `times` as many.

    The last chunk is as large as the others and begins earlier, since other shapes round otherwise; not if everything is
    to come `once`.
    """
    most = _AT_ONCE if device.type == "cpu" else _AT_ONCE_CUDA
    step = max(1, times * most // max(1, numbers))
    for start in range(0, count, step):
        yield slice(start if once else max(0, min(start, count - step)), start + step)


class _Turned(Built):
    """Gradients that lie (patients, out, kernel, in), as the copies of patches left them."""

    def clipped(self, factor: Tensor) -> Gradients:
        """See `Kept`."""
        return {name: g.movedim(-1, 1).contiguous() for name, g in super().clipped(factor).items()}


class OuterOfPatches:
    """Gradients of a weight as sums over places, not built: many numbers, few places.

    The tensors may be shared with the network; they are not written to.
    """

    def __init__(self, passed: Passed, groups: Groups) -> None:
        self._passed, self._groups = passed, groups

    def squares(self) -> Tensor:
        """See `Kept`."""
        return self._passed.squares(self._groups)

    def blank(self, unusable: Tensor) -> None:
        """See `Kept`."""
        self._passed = self._passed.blanked(unusable[self._groups.patient])

    def clipped(self, factor: Tensor) -> Gradients:
        """See `Kept`."""
        return {"weight": self._passed.summed(self._groups.by_row(factor))}

    @property
    def nbytes(self) -> int:
        """See `Kept`."""
        return self._passed.seen.nbytes + self._passed.met.nbytes
