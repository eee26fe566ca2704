"""A secure sum from end to end, in one process: sites, a coordinator, and whoever vanishes when."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from wardround.common.secure_sum.coordinator import CoordinatorSum, Survivors
from wardround.common.secure_sum.occasion import Occasion, SumPlan
from wardround.common.secure_sum.site import SiteRules, SiteSum
from wardround.common.secure_sum.turns import Turns
from wardround.common.trust.certificates import Authority, Subject
from wardround.common.trust.signing import Signed, Signer, canonical, verify

NOW = datetime.now(UTC)
AUTHORITY = Authority.found("test", NOW)
MODEL, OTHER_MODEL = "ab" * 32, "cd" * 32
OCCASION = Occasion("5e" * 32, "run-1", 3, 1)
PHASES = ("advert", "shares", "masked", "agree", "reveal")


@lru_cache(maxsize=200)
def signer(name: str) -> Signer:
    return Signer(name, Ed25519PrivateKey.generate())


@lru_cache(maxsize=200)
def certificate(name: str):
    return AUTHORITY.issue(signer(name)._key.public_key(), Subject(name, "sign"), NOW)


@lru_cache(maxsize=1 << 18)  # every site checks what every other site was shown
def _check(kind: str, name: str, body: bytes, signature: str) -> None:
    verify(Signed(kind, name, json.loads(body), signature), certificate(name))


def check(signed: Signed) -> None:
    """What a roster does."""
    _check(signed.kind, signed.signer, canonical(signed.body), signed.signature)


def names(count: int) -> list[str]:
    return [f"h{number:03}" for number in range(count)]


def a_plan(count: int, size: int = 64, clip: float = 1.0, bits: int = 30, **more: int) -> SumPlan:
    return SumPlan(dict.fromkeys(names(count), 1 / count), clip, bits, size, **more)


@dataclass
class Sum:
    """The halves of one sum, and what they have said so far."""

    plan: SumPlan
    folder: Path
    occasion: Occasion = OCCASION
    model: str = MODEL
    models: Mapping[str, str] = field(default_factory=dict)  # of sites that are shown another
    rules: SiteRules = field(default_factory=SiteRules)

    def __post_init__(self) -> None:
        self.coordinator = CoordinatorSum(self.plan, self.occasion, check=check)
        self.sites = {name: self.site(name) for name in self.plan.weights}
        rng = np.random.default_rng(7)
        self.updates = {
            name: rng.uniform(-self.plan.clip, self.plan.clip, self.plan.size).astype(np.float32) for name in self.sites
        }
        self.adverts: list[Signed] = []
        self.dealt: dict[str, list[Signed]] = {}
        self.cohort: frozenset[str] = frozenset()
        self.masked: dict[str, tuple[Signed, np.ndarray]] = {}
        self.survivors = Survivors((), (), ())
        self.agreed: dict[str, Signed] = {}
        self.revealed: dict[str, Signed] = {}

    def site(self, name: str) -> SiteSum:
        turns = Turns(self.folder / f"{name}.json")
        return SiteSum(self.plan, self.occasion, signer(name), check=check, turns=turns, rules=self.rules)

    def advert(self, lost: Collection[str] = ()) -> Sum:
        for name in self.sites.keys() - set(lost):
            self.coordinator.take_advert(self.sites[name].advert())
        self.adverts = self.coordinator.adverts()
        return self

    def shares(self, lost: Collection[str] = ()) -> Sum:
        self.dealt = {a.signer: self.sites[a.signer].deal(self.adverts) for a in self.adverts if a.signer not in lost}
        for boxes in self.dealt.values():
            self.coordinator.take_dealt(boxes)
        self.cohort = self.coordinator.cohort(self.model)
        return self

    def mask(self, lost: Collection[str] = ()) -> Sum:
        for name in sorted(self.cohort - set(lost)):
            model = self.models.get(name, self.model)
            self.masked[name] = self.sites[name].mask(self.coordinator.inbox(name), self.updates[name], model)
            if model == self.model:
                self.coordinator.take_masked(*self.masked[name])
        self.survivors = self.coordinator.survivors()
        return self

    def asked(self, name: str) -> Signed:
        """What a site agrees to if it is asked honestly."""
        return self.sites[name].agree(self.survivors.names, self.survivors.dropped, self.survivors.masked)

    def agree(self, lost: Collection[str] = ()) -> Sum:
        for name in sorted(set(self.survivors.names) - set(lost)):
            self.agreed[name] = self.asked(name)
            self.coordinator.take_agreed(self.agreed[name])
        return self

    def reveal(self, lost: Collection[str] = ()) -> Sum:
        agreements = self.coordinator.agreements()
        for name in sorted(self.agreed.keys() - set(lost)):
            self.revealed[name] = self.sites[name].reveal(agreements)
            self.coordinator.take_revealed(self.revealed[name])
        return self

    def upto(self, phase: str, lost: Mapping[str, Collection[str]] | None = None) -> Sum:
        """All phases up to and with this one; `lost` are the sites that vanish in a phase."""
        steps = dict(zip(PHASES, (self.advert, self.shares, self.mask, self.agree, self.reveal), strict=True))
        gone: set[str] = set()
        for each in PHASES[: PHASES.index(phase) + 1]:
            gone |= set((lost or {}).get(each, ()))
            steps[each](gone)
        return self

    def plain(self) -> np.ndarray:
        """The sum that is to be found."""
        return sum(self.plan.weights[name] * self.updates[name].astype(np.float64) for name in self.survivors.names)
