"""The coordinator's half of a secure sum: it hands statements on, adds up what looks like noise, and takes the masks off.

    take_advert   ... -> adverts      everybody's keys, for everybody
    take_dealt    ... -> cohort       who dealt shares to all others; `inbox` has the boxes for one site
    take_masked   ... -> survivors    whose vectors are in, and their statements
    take_agreed   ... -> agreements   from here on a round that fails is lost: no other set of these vectors is ever summed
    take_revealed ... -> result

It holds the running sum and one vector, however many sites there are. A statement that does not fit is refused with the site's
name and the sum goes on without it; where too few are left it is given up.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from wardround.common.errors import SumAborted, UpdateRefused, WardroundError
from wardround.common.secure_sum import shamir
from wardround.common.secure_sum.masks import Mask, add_masks, agreed, opposite, pair_mask, self_mask
from wardround.common.secure_sum.messages import Advert, Agreed, Check, Dealt, Masked, Revealed, believed, cohort_digest
from wardround.common.secure_sum.occasion import Occasion, SumPlan
from wardround.common.secure_sum.rounding import to_floats
from wardround.common.secure_sum.shares import commitment, mark
from wardround.common.trust.signing import Signed

if TYPE_CHECKING:
    from wardround.common.secure_sum.rounding import Floats, Ring

S = TypeVar("S", Advert, Dealt, Masked, Agreed, Revealed)
_PHASES = ("adverts", "shares", "masked vectors", "agreements", "reveals", "nothing more")


@dataclass(frozen=True)
class Survivors:
    """What every survivor is asked to agree to: names, and the survivors' signed statements."""

    names: tuple[str, ...]
    dropped: tuple[str, ...]
    masked: tuple[Signed, ...]


class CoordinatorSum:
    """One occasion at the coordinator.

    The `take_` methods raise `UpdateRefused`, whose text names the site; a method that ends a phase raises `SumAborted`.

    Attributes:
        phase: what is being collected.
        bad_dealers: sites whose shares did not all fit together, though enough of them did.
    """

    def __init__(self, plan: SumPlan, occasion: Occasion, *, check: Check, threads: int = 1) -> None:
        self.plan, self.occasion, self._check, self._threads = plan, occasion, check, threads
        self.phase, self.bad_dealers = _PHASES[0], frozenset[str]()
        self._adverts: dict[str, tuple[Advert, Signed]] = {}
        self._dealt: dict[str, dict[str, tuple[Dealt, Signed]]] = {}  # by dealer, by holder
        self._cohort: frozenset[str] = frozenset()
        self._model = ""
        self._total: Ring | None = None
        self._masked: dict[str, Signed] = {}
        self._agreed: dict[str, Signed] = {}
        self._revealed: dict[str, Revealed] = {}

    def take_advert(self, signed: Signed) -> None:
        """A site's keys."""
        with self._taking("adverts", signed, Advert, self._adverts) as advert:
            keys = {key for other, _ in self._adverts.values() for key in (other.channel_key, other.mask_key)}
            if advert.channel_key == advert.mask_key or keys & {advert.channel_key, advert.mask_key}:
                raise UpdateRefused(f"{signed.signer} has a key that is there twice")
            try:
                for key in (advert.channel_key, advert.mask_key):
                    agreed(X25519PrivateKey.generate(), bytes.fromhex(key), signed.signer)
            except SumAborted as error:
                raise UpdateRefused(str(error)) from None
            self._adverts[signed.signer] = (advert, signed)

    def adverts(self) -> list[Signed]:
        """What every site that sent keys is to deal for; ends the phase."""
        self._end("adverts", len(self._adverts), self.plan.fewest)
        return [signed for _, signed in self._adverts.values()]

    def take_dealt(self, boxes: list[Signed]) -> None:
        """All the boxes of one site, one for each other site that sent keys."""
        if not boxes:
            raise UpdateRefused("a site dealt no shares")
        found: dict[str, tuple[Dealt, Signed]] = {}
        for signed in boxes:
            with self._taking("shares", signed, Dealt, self._dealt) as dealt:
                found[dealt.to] = (dealt, signed)
        dealer = boxes[0].signer
        others = self._adverts.keys() - {dealer}
        if {signed.signer for signed in boxes} != {dealer} or found.keys() != others or len(boxes) != len(others):
            raise UpdateRefused(f"{dealer} did not deal one box to each other site")
        self._dealt[dealer] = found

    def cohort(self, model: str) -> frozenset[str]:
        """Who masks for one another, starting from the model with this manifest; ends the phase."""
        self._end("shares", len(self._dealt), self.plan.fewest)
        self._cohort, self._model = frozenset(self._dealt), model
        self._total = np.zeros(self.plan.size, np.uint32)
        return self._cohort

    def inbox(self, site: str) -> list[Signed]:
        """The boxes for `site`, of everybody else in the cohort."""
        return [self._dealt[dealer][site][1] for dealer in sorted(self._cohort - {site})]

    def take_masked(self, signed: Signed, vector: Ring) -> None:
        """A site's masked vector, (size,) of uint32; it is added up and not kept."""
        with self._taking("masked vectors", signed, Masked, self._masked) as masked:
            if (masked.model, masked.cohort) != (self._model, cohort_digest(self._cohort)):
                raise UpdateRefused(f"{signed.signer} masked its vector for another model or another cohort")
            if signed.signer not in self._cohort or vector.dtype != np.uint32 or vector.shape != (self.plan.size,):
                raise UpdateRefused(f"{signed.signer} sent no vector of this sum")
            if hashlib.sha256(np.ascontiguousarray(vector).data).hexdigest() != masked.vector:
                raise UpdateRefused(f"{signed.signer} sent another vector than it signed for")
            assert self._total is not None
            np.add(self._total, vector, out=self._total)
            self._masked[signed.signer] = signed

    def survivors(self) -> Survivors:
        """Who is summed, for all of them to agree to; ends the phase, and whoever comes later has vanished."""
        self._end("masked vectors", len(self._masked), self.plan.fewest)
        names = sorted(self._masked)
        return Survivors(tuple(names), tuple(sorted(self._cohort - set(names))), tuple(self._masked[name] for name in names))

    def take_agreed(self, signed: Signed) -> None:
        """A survivor's signed word."""
        with self._taking("agreements", signed, Agreed, self._agreed) as agreement:
            wanted = Agreed(self.occasion, self._model, tuple(sorted(self._masked)))
            if signed.signer not in self._masked or agreement != wanted:
                raise UpdateRefused(f"{signed.signer} agreed to other survivors")
            self._agreed[signed.signer] = signed

    def agreements(self) -> list[Signed]:
        """What lets the survivors who agreed reveal; ends the phase. The round is finished now, or lost."""
        self._end("agreements", len(self._agreed), self.plan.threshold)
        return list(self._agreed.values())

    def take_revealed(self, signed: Signed) -> None:
        """A survivor's shares; each must be the one that was dealt to it."""
        with self._taking("reveals", signed, Revealed, self._revealed) as revealed:
            holder = signed.signer
            wanted = (self._model, set(self._masked), set(self._cohort) - set(self._masked))
            if holder not in self._agreed or (revealed.model, set(revealed.seeds), set(revealed.keys)) != wanted:
                raise UpdateRefused(f"{holder} revealed other shares than it was asked for")
            for what, shares in (("seed", revealed.seeds), ("key", revealed.keys)):
                for dealer, share in shares.items():
                    if dealer != holder and not self._was_dealt(share, what, dealer, holder):
                        raise UpdateRefused(f"{holder} revealed another share than {dealer} dealt to it")
            self._revealed[holder] = revealed

    @property
    def weight(self) -> float:
        """The sum of the survivors' weights."""
        return math.fsum(self.plan.weights[site] for site in self._masked)

    def result(self, dtype: type[np.floating[Any]] = np.float64) -> Floats:
        """The sum of weight times update over the survivors, (size,).

        Raises:
            SumAborted: too few revealed, or a dealer's shares do not make its secret: the text names it. The round is lost.
        """
        self._end("reveals", len(self._revealed), self.plan.threshold)
        try:
            assert self._total is not None
            add_masks(self._total, [opposite(mask) for mask in self._masks()], threads=self._threads)
            return to_floats(self._total, self.plan.clip, self.plan.bits, dtype)
        finally:
            self._forget()

    # ---- below: what is left in the sum of masked vectors

    def _masks(self) -> Iterator[Mask]:
        """Every survivor's own mask, and what each has for a site that vanished."""
        salt = self.occasion.salt(self._model)
        for site in sorted(self._cohort):
            advert = self._adverts[site][0]
            if site in self._masked:
                shares = {holder: revealed.seeds[site] for holder, revealed in self._revealed.items()}
                seed = self._secret(site, shares, partial(commitment, occasion=self.occasion, site=site), advert.commitment)
                yield self_mask(seed, salt, site)
            else:
                shares = {holder: revealed.keys[site] for holder, revealed in self._revealed.items()}
                key = X25519PrivateKey.from_private_bytes(self._secret(site, shares, _public, advert.mask_key))
                for peer in sorted(self._masked):
                    secret = agreed(key, bytes.fromhex(self._adverts[peer][0].mask_key), peer)
                    yield pair_mask(secret, salt, peer, site)

    def _secret(self, dealer: str, shares: dict[str, str], public: Callable[[bytes], str], wanted: str) -> bytes:
        at_points = {self.plan.points[holder]: bytes.fromhex(share) for holder, share in shares.items()}
        secret, whole = shamir.recover(at_points, self.plan.threshold, lambda found: public(found) == wanted)
        if secret is None:
            raise SumAborted(f"the shares dealt by {dealer} do not make its secret; the round is lost")
        if not whole:
            self.bad_dealers |= {dealer}
        return secret

    def _was_dealt(self, share: str, what: str, dealer: str, holder: str) -> bool:
        dealt = self._dealt[dealer][holder][0]
        signed_for = dealt.seed_mark if what == "seed" else dealt.key_mark
        return mark(bytes.fromhex(share), what, self.occasion, dealer, holder) == signed_for

    # ---- below: phases

    @contextlib.contextmanager
    def _taking(self, phase: str, signed: Signed, kind: type[S], known: Container[str]) -> Iterator[S]:
        try:
            statement = believed(signed, kind, self.plan, self.occasion, self._check)
        except WardroundError as error:
            raise UpdateRefused(str(error), detail=error.detail) from None
        if self.phase != phase:
            raise UpdateRefused(f"{signed.signer} answers out of turn; {self.phase} are collected")
        if signed.signer in known:
            raise UpdateRefused(f"{signed.signer} has answered before")
        yield statement

    def _end(self, phase: str, count: int, wanted: int) -> None:
        """Go on to the next phase, with `wanted` answers or more."""
        text = "" if count >= wanted else f"{count} sites sent {phase}, {wanted} or more are wanted"
        text = text if self.phase == phase else f"out of order: {phase} cannot be ended, {self.phase} are collected"
        self.phase = _PHASES[-1] if text else _PHASES[_PHASES.index(phase) + 1]
        if text:
            self._forget()
            raise SumAborted(text + "; the round is lost" * (phase == "reveals"))

    def _forget(self) -> None:
        self._total, self.phase = None, _PHASES[-1]
        self._dealt, self._revealed = {}, {}


def _public(key: bytes) -> str:
    return X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw().hex()
