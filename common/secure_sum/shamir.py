"""A secret in shares: any t of them make it, fewer say nothing of it.

Shamir 1979, "How to share a secret", CACM 22(11), over the integers modulo the prime 2^256 + 297, so that every 32 bytes are
a number of the field.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

PRIME = 2**256 + 297
SECRET = 32  # bytes
SHARE = 33  # bytes
MOST_TRIED = 500  # sets of shares of one secret


def threshold_of(sites: int) -> int:
    """How many of so many sites make a secret: more than two thirds.

    A liar who tells some sites that one has vanished and the others that it has not needs 2t - n colluders among the sites.
    """
    return 2 * sites // 3 + 1


def deal(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """A share of `secret` (32 bytes) for each of the points, which are different numbers above 0."""
    if len(secret) != SECRET or len(set(points)) != len(points) or min(points) < 1:
        raise ValueError("a secret has 32 bytes, and its shares lie at different numbers above 0")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {point: _value(coefficients, point).to_bytes(SHARE, "big") for point in points}


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret that these shares make; None where they make none. Whether it is the one that was dealt they do not say."""
    points = tuple(sorted(shares))
    weights = _weights_at_zero(points)
    found = sum(weight * int.from_bytes(shares[point], "big") for weight, point in zip(weights, points, strict=True)) % PRIME
    return found.to_bytes(SECRET, "big") if found < 1 << 8 * SECRET else None


def recover(shares: Mapping[int, bytes], threshold: int, fits: Callable[[bytes], bool]) -> tuple[bytes | None, bool]:
    """The secret that fits what its dealer committed to, and whether all shares tried make it.

    Where the first `threshold` shares make another, some were dealt wrong: other sets are tried, all of them or as many as is
    reasonable, drawn by chance. None where none of them fits, or there are too few shares.
    """
    for number, points in enumerate(_sets(sorted(shares), threshold)):
        secret = combine({point: shares[point] for point in points})
        if secret is not None and fits(secret):
            return secret, number == 0
    return None, False


def is_share(share: bytes) -> bool:
    """Whether `share` is a number of the field, written in 33 bytes."""
    return len(share) == SHARE and int.from_bytes(share, "big") < PRIME


def _sets(points: Sequence[int], threshold: int) -> Iterator[Sequence[int]]:
    if math.comb(len(points), threshold) <= MOST_TRIED:
        return itertools.combinations(points, threshold)
    chance = secrets.SystemRandom()
    drawn = (chance.sample(points, threshold) for _ in range(MOST_TRIED - 1))
    return itertools.chain([points[:threshold]], drawn)


def _value(coefficients: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


@lru_cache(maxsize=16)  # the same sites reveal shares of every secret of a round
def _weights_at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights of the values at `points` for the value at 0."""
    weights = []
    for one in points:
        over = under = 1
        for other in points:
            if other != one:
                over, under = over * -other % PRIME, under * (one - other) % PRIME
        weights.append(over * pow(under, -1, PRIME) % PRIME)
    return tuple(weights)
