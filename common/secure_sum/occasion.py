"""What a sum is of: the public numbers that every site and the coordinator took from the same plan, and which round it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from wardround.common.errors import ConfigError
from wardround.common.secure_sum.rounding import check_range
from wardround.common.secure_sum.shamir import threshold_of
from wardround.common.trust.certificates import is_name
from wardround.common.trust.signing import canonical

FEWEST_SITES, MOST_SITES = 3, 128
LARGEST = 1 << 31  # numbers of a vector; the counter of a mask's stream never comes round


@dataclass(frozen=True)
class SumPlan:
    """The numbers of a plan that a secure sum rests on.

    Attributes:
        weights: of each site; public and fixed, since hidden ones could be inflated under the masks.
        clip: the largest magnitude of a number of an update.
        bits: of the fraction, see `rounding`.
        size: numbers of an update.
        min_survivors: fewer updates are never summed; the threshold of the shares is a floor of its own.

    Raises:
        ConfigError: the sum could wrap, there are fewer than 3 sites or more than 128, or a number is out of its range.
    """

    weights: Mapping[str, float]
    clip: float
    bits: int
    size: int
    min_survivors: int = FEWEST_SITES

    def __post_init__(self) -> None:
        if not FEWEST_SITES <= len(self.weights) <= MOST_SITES:
            raise ConfigError(f"weights: {len(self.weights)} sites, wanted {FEWEST_SITES} to {MOST_SITES} for a secure sum")
        for site in self.weights:
            if not is_name(site):
                raise ConfigError(f"weights: got {site[:100]!r}, wanted a site's name")
        if not 1 <= self.size <= LARGEST:
            raise ConfigError(f"size: got {self.size}, wanted 1 to {LARGEST}")
        if not FEWEST_SITES <= self.min_survivors <= len(self.weights):
            raise ConfigError(f"min_survivors: got {self.min_survivors}, wanted {FEWEST_SITES} to {len(self.weights)}")
        check_range(self.weights, self.clip, self.bits)

    @cached_property
    def points(self) -> dict[str, int]:
        """Where each site's shares lie."""
        return {site: number for number, site in enumerate(sorted(self.weights), 1)}

    @property
    def threshold(self) -> int:
        """How many shares make a secret."""
        return threshold_of(len(self.weights))

    @property
    def fewest(self) -> int:
        """Fewer sites than this are no sum."""
        return max(self.threshold, self.min_survivors)


@dataclass(frozen=True)
class Occasion:
    """One attempt at one round. The keys of a sum are made for it, and every statement about it names it.

    Keys may be made while the round before is still being finished, when nobody knows the model yet; so the model's manifest
    is named in what is said from the masking on, not here.

    Attributes:
        study: SHA-256 of the plan's text, in hex.
        run: of the study.
        round: from 1.
        attempt: at the round, from 1.
    """

    study: str
    run: str
    round: int
    attempt: int

    def salt(self, model: str = "") -> bytes:
        """What all keys of this sum are derived with; `model` is the manifest's digest, for masks."""
        return hashlib.sha256(canonical(["secure-sum", *asdict(self).values(), model])).digest()
