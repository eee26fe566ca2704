"""Whether an explanation follows what was learnt: its likeness to that of the same network with first, unlearnt weights.

The sanity check of Adebayo et al. 2018, https://arxiv.org/abs/1810.03292: a map that stays the same when the weights are
drawn anew shows the picture, not the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wardround.client.interpret.attributions import Attribution

Floats = NDArray[np.float64]


def likeness(pairs: Sequence[tuple[Attribution, Attribution]]) -> dict[str, float]:
    """Method -> Spearman's rank correlation of sizes, the mean over records; pairs are (learnt, not learnt).

    A method is left out where no record has a map in which two sizes differ.
    """
    found: dict[str, list[float]] = {}
    for learnt, unlearnt in pairs:
        for method in ("integrated", "saliency", "grad_cam"):
            one, other = (_sizes(getattr(side, method)) for side in (learnt, unlearnt))
            value = rank_correlation(one, other)
            if value is not None:
                found.setdefault(method, []).append(value)
    return {method: float(np.mean(values)) for method, values in found.items()}


def rank_correlation(one: Floats, other: Floats) -> float | None:
    """Spearman's, of the entries that are not 0 in both; None where one of the two does not vary.

    >>> rank_correlation(np.array([1.0, 2.0, 9.0, 0.0]), np.array([3.0, 4.0, 5.0, 0.0]))
    1.0
    """
    # what is at its reference, such as padding, has no say in any network: it would make all maps alike
    there = (one != 0) | (other != 0)
    one, other = _ranks(one[there]), _ranks(other[there])
    if len(one) < 2 or not one.std() or not other.std():
        return None
    return round(float(np.corrcoef(one, other)[0, 1]), 12)


def _ranks(values: Floats) -> Floats:
    """Ranks from 0; equals share the mean of theirs."""
    _, at, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(count) - (count + 1) / 2)[at.reshape(-1)]
    return ranks


def _sizes(maps: object) -> Floats:
    assert isinstance(maps, dict)
    return np.concatenate([np.zeros(0), *(tensor.abs().flatten().numpy() for tensor in maps.values())])
