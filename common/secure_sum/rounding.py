"""Numbers as integers of a 32-bit ring, in which the sum cannot wrap; that follows from the plan's public numbers alone.

A site's vector becomes round(x * weight * 2^bits / clip) with x clipped to [-clip, clip], as two's complement in uint32. A site
is off by at most half a step of clip / 2^bits, so the weighted sum of n sites is off by at most n / 2 steps: with bits = 30 and
n <= 128 less than 6e-8 of the clip. (float64 adds n * 2^-52 of the clip; a result in float32 its own last digit.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from wardround.common.errors import ConfigError, SumAborted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ring = NDArray[np.uint32]  # one dimension, two's complement
    Floats = NDArray[np.floating[Any]]

MOST_BITS = 30  # of the fraction, the sum of weights being at most 1: one bit is the sign's
_HALF = 1 << 31  # of the ring
_CHUNK = 1 << 15  # numbers at once: what is worked on stays in the cache, whatever the vector's length


def check_range(weights: Mapping[str, float], clip: float, bits: int, noise_headroom: int = 0) -> None:
    """Return if no sum over any of the sites can leave the ring.

    Args:
        weights: of each site.
        clip: the largest magnitude of a number before its weight.
        bits: of the fraction.
        noise_headroom: steps of the lattice kept free for noise that sites add after rounding, all sites together.

    Raises:
        ConfigError: the sum could wrap, or a number is none that can be worked with; names the key.
    """
    if type(bits) is not int or not 1 <= bits <= MOST_BITS:
        raise ConfigError(f"bits: got {bits}, wanted a whole number from 1 to {MOST_BITS}")
    if not (math.isfinite(clip) and clip > 0 and math.isfinite((1 << bits) / clip) and clip / (1 << bits) > 0):
        raise ConfigError(f"clip: got {clip}, wanted a finite number above 0 that leaves room for {bits} bits")
    if type(noise_headroom) is not int or noise_headroom < 0:
        raise ConfigError(f"noise_headroom: got {noise_headroom}, wanted a whole number of steps, 0 or more")
    for site, weight in weights.items():
        if not (math.isfinite(weight) and 0 < weight <= 1):
            raise ConfigError(f"weights.{site}: got {weight}, wanted a number above 0 and at most 1")
    most = sum(math.ceil(weight * (1 << bits)) + 1 for weight in weights.values())  # the 1: rounding, and float64 before it
    if most + noise_headroom >= _HALF:
        raise ConfigError(
            f"weights: they add up to {math.fsum(weights.values()):g}, which with bits = {bits} and noise_headroom = "
            f"{noise_headroom} could wrap; wanted less than {(_HALF - noise_headroom) / (1 << bits):g}, or fewer bits"
        )


def quantise(vector: Floats, weight: float, clip: float, bits: int, out: Ring | None = None) -> tuple[Ring, int]:
    """A site's vector in the ring, and how many of its numbers had to be clipped; that count stays at the site.

    Args:
        vector: (size,), float32 or float64.
        weight: the site's.
        clip: as in `check_range`, which must have been passed, as for `bits`.
        bits: of the fraction.
        out: (size,) where to put the result; made anew where None.

    Raises:
        SumAborted: a number is not finite.
    """
    result: Ring = np.empty(vector.size, np.uint32) if out is None else out
    signed = result.view(np.int32)
    factor, wide, clipped = weight * (1 << bits) / clip, np.empty(min(_CHUNK, vector.size)), 0
    for part in chunks(vector.size):
        given, work = vector[part], wide[: part.stop - part.start]
        low, high = float(given.min()), float(given.max())  # NaN comes through both
        if not (math.isfinite(low) and math.isfinite(high)):
            raise SumAborted("the update has a number that is not finite, so it is not sent")
        if low < -clip or high > clip:
            clipped += int(np.count_nonzero(np.abs(given) > np.float64(clip)))
            given = np.clip(given.astype(np.float64), -clip, clip)
        np.multiply(given, factor, out=work, dtype=np.float64)
        np.rint(work, out=work)
        signed[part] = work
    return result, clipped


def to_floats(total: Ring, clip: float, bits: int, dtype: type[np.floating[Any]] = np.float64) -> Floats:
    """The weighted sum (size,) that a sum in the ring stands for."""
    result = np.empty(total.size, dtype)
    signed, step = total.view(np.int32), np.float64(clip / (1 << bits))
    for part in chunks(total.size):
        result[part] = signed[part] * step
    return result


def chunks(size: int, length: int = _CHUNK) -> Iterator[slice]:
    """`size` entries, cut where a cache likes it."""
    return (slice(start, min(start + length, size)) for start in range(0, size, length))
