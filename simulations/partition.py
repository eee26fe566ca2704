"""Many sites out of a few data sets: who gets which patient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from wardround.common.errors import ConfigError

_RULES = {"iid": None, "dirichlet": 0.5, "size": 1.0}


@dataclass(frozen=True)
class Partition:
    """A rule and its strength, written `iid`, `dirichlet:0.3` or `size:1.0`.

    `iid` deals patients out evenly. `dirichlet:a` skews the label: the sites' shares of each class are drawn from a
    Dirichlet distribution with concentration `a` (Hsu et al. 2019, https://arxiv.org/abs/1909.06335). `size:a` skews how
    many patients a site has, in the same way.
    """

    rule: str
    strength: float | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a rule.

        >>> Partition.parse("dirichlet:0.3")
        Partition(rule='dirichlet', strength=0.3)

        Raises:
            ConfigError: no such rule, or a strength that is no positive number.
        """
        rule, _, strength = text.partition(":")
        if rule not in _RULES or (rule == "iid" and strength):
            raise ConfigError(f"--partition {text}: wanted iid, dirichlet:ALPHA or size:ALPHA")
        if not strength:
            return cls(rule, _RULES[rule])
        try:
            value = float(strength)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise ConfigError(f"--partition {text}: {strength!r} is not a positive number")
        return cls(rule, value)

    def deal(self, label: NDArray[Any], sites: int, *, seed: int) -> list[NDArray[np.int64]]:
        """Indices of each site's patients; every patient goes to exactly one site, and no site goes without.

        Raises:
            ConfigError: there are more sites than patients.
        """
        if sites > len(label):
            raise ConfigError(f"--sites {sites}: there are only {len(label)} patients to share out")
        random = np.random.default_rng(seed)
        owner = np.empty(len(label), dtype=np.int64)
        groups = [np.flatnonzero(label == c) for c in np.unique(label)] if self.rule == "dirichlet" else None
        for group in groups or [np.arange(len(label))]:
            order = random.permutation(group)
            if self.strength is None:
                owner[order] = np.arange(len(order)) % sites
                continue
            share = random.dirichlet(np.full(sites, self.strength))
            owner[order] = np.searchsorted(np.cumsum(share)[:-1], (np.arange(len(order)) + 0.5) / len(order))
        for site in np.flatnonzero(np.bincount(owner, minlength=sites) == 0):
            richest = np.bincount(owner, minlength=sites).argmax()
            owner[random.choice(np.flatnonzero(owner == richest))] = site
        return [np.flatnonzero(owner == site) for site in range(sites)]
