"""The noise that hides one patient, and the grid on which the result is told."""

from __future__ import annotations

import math

from torch import Tensor

from wardround.client.dp.coins import Coins

_GRID_BITS = 12  # the grid's step is the noise's deviation / 2^12 or finer


def add_noise(total: Tensor, *, deviation: float, coins: Coins) -> Tensor:
    """`total` plus independent normal noise, on a grid, as float32; (any shape), written in place where it is float32.

    The set of floats that a sum of floats can take may tell the summands (Mironov 2012,
    https://doi.org/10.1145/2382196.2382264). So the last bits do not leave: the sum is rounded to multiples of a power of
    two, thousands to one deviation, which after the noise costs no privacy and no accuracy to speak of.

    Args:
        total: a sum of clipped gradients.
        deviation: standard deviation of the noise, noise multiplier times clip norm; 0 adds nothing.
        coins: the secret source.

    Raises:
        ValueError: the deviation is negative, or none that float32 can work with.
    """
    if not (deviation == 0 or 1e-30 <= deviation <= 1e30):
        raise ValueError(f"noise cannot have scale {deviation}")
    if not deviation:
        return total.float()
    step = 2.0 ** (math.floor(math.log2(deviation)) - _GRID_BITS)
    # the floats next to this one are a step apart, so adding it rounds to the grid and taking it off leaves the rest
    whole = 1.5 * 2.0**23 * step
    coins.add_normal(total, scale=deviation)
    return total.float().add_(whole).sub_(whole)
