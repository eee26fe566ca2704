"""What several networks are made of, and how their options are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

T = TypeVar("T")


class Reader(nn.Module):
    """A module for one field of a record: (batch, ...) -> (batch, `width`)."""

    width: int


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 8 groups, of equal size (Wu and He 2018, https://arxiv.org/abs/1803.08494)."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


def dropout(part: float) -> nn.Dropout:
    """Drops `part` of the numbers while training; 0 drops nothing."""
    return nn.Dropout(float(part))  # secret chance looks for a float


def among(option: str, value: str, known: Mapping[str, T]) -> T:
    """What `value` stands for.

    Raises:
        ValueError: nothing has that name.
    """
    if value not in known:
        raise ValueError(f"{option} is {value!r}; there are: {', '.join(known)}")
    return known[value]


_DEEPEST = 64  # layers: each is built as an object before a site can say that the network is too large


def whole(**options: int) -> None:
    """Refuse what is not a whole number from 1 on, and networks of more than 64 layers.

    Raises:
        ValueError: with the option's name.
    """
    for option, value in options.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{option} is {value!r}; a whole number from 1 on is wanted")
        if option in ("layers", "depth") and value > _DEEPEST:
            raise ValueError(f"{option} is {value}; at most {_DEEPEST}")
