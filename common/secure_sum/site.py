"""The hospital's half of a secure sum: five steps, once each, in order. What does not fit ends it, and its secrets are gone.

    advert -> deal -> mask -> agree -> reveal

The site believes its own plan about who takes part, and its own policy about how few may. It signs one advert, one vector and
one set of survivors for an occasion, ever; `turns` sees to that over restarts. Of any other site it reveals the share of its
seed or the share of its mask key, never both: with both the coordinator could take that site's masks off alone.

Memory is wiped as well as Python can: what is secret is let go of at the end, however it comes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from wardround.common.errors import SumAborted, WardroundError
from wardround.common.secure_sum import shamir
from wardround.common.secure_sum.masks import add_masks, agreed, pair_mask, self_mask
from wardround.common.secure_sum.messages import Advert, Agreed, Check, Dealt, Masked, Revealed, believed, cohort_digest
from wardround.common.secure_sum.occasion import FEWEST_SITES, Occasion, SumPlan
from wardround.common.secure_sum.rounding import quantise
from wardround.common.secure_sum.shares import Channel, Shares, commitment, mark
from wardround.common.secure_sum.turns import Turns
from wardround.common.trust.signing import Signed, Signer

if TYPE_CHECKING:
    from wardround.common.secure_sum.rounding import Floats, Ring

S = TypeVar("S", Advert, Dealt, Masked, Agreed)
_STEPS = ("advert", "deal", "mask", "agree", "reveal", "nothing more")


@dataclass(frozen=True)
class SiteRules:
    """How few a site's own policy allows, whatever the plan says.

    Attributes:
        min_cohort: sites that a vector is masked for, this one among them.
        min_survivors: sites whose vectors are summed, this one among them.
    """

    min_cohort: int = FEWEST_SITES
    min_survivors: int = FEWEST_SITES


@dataclass(repr=False)
class _Memory:
    """What is let go of at the end."""

    channel_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    mask_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    seed: bytes = field(default_factory=lambda: os.urandom(shamir.SECRET))
    adverts: dict[str, Advert] = field(default_factory=dict)
    held: dict[str, Shares] = field(default_factory=dict)  # of every site of the cohort, this one among them
    channels: dict[str, Channel] = field(default_factory=dict)
    model: str = ""
    survivors: tuple[str, ...] = ()


class SiteSum:
    """One occasion at one site.

    Attributes:
        next: the only step that may follow.
        clipped: how many numbers of the update were beyond the clip; it stays here.
        reason: why the sum was given up; empty where it was not.
    """

    def __init__(
        self,
        plan: SumPlan,
        occasion: Occasion,
        signer: Signer,
        *,
        check: Check,
        turns: Turns,
        rules: SiteRules,
        threads: int = 1,
    ) -> None:
        """Every step raises `SumAborted` where something does not fit; after that none may follow."""
        self.plan, self.occasion, self.name, self._signer = plan, occasion, signer.name, signer
        self._check, self._turns, self._rules, self._threads = check, turns, rules, threads
        self._memory: _Memory | None = _Memory()
        self.next, self.clipped, self.reason = _STEPS[0], 0, ""

    def advert(self) -> Signed:
        """Fresh public keys. From here on this occasion is used up at this site."""
        with self._step("advert") as memory:
            if self.name not in self.plan.weights:
                raise SumAborted(f"{self.name} is not among the sites of this plan")
            self._turns.take(self.occasion)
            channel, masks = (key.public_key().public_bytes_raw().hex() for key in (memory.channel_key, memory.mask_key))
            advert = Advert(self.occasion, channel, masks, commitment(memory.seed, self.occasion, self.name))
            memory.adverts[self.name] = advert
            return advert.sign(self._signer)

    def deal(self, adverts: Sequence[Signed]) -> list[Signed]:
        """Shares of this site's secrets for everybody who sent an advert; `adverts` has this site's own too."""
        with self._step("deal") as memory:
            own = memory.adverts.pop(self.name)
            for signed in adverts:
                self._add_advert(memory.adverts, signed)
            if memory.adverts.get(self.name) != own:
                raise SumAborted(f"the advert of {self.name} is missing or another's")
            self._enough(len(adverts), max(self.plan.fewest, self._rules.min_cohort), "sites sent their keys")
            points = [self.plan.points[site] for site in memory.adverts]
            key = memory.mask_key.private_bytes_raw()
            seeds, keys = (shamir.deal(secret, self.plan.threshold, points) for secret in (memory.seed, key))
            dealt = {site: Shares(seeds[point], keys[point]) for site, point in zip(memory.adverts, points, strict=True)}
            memory.held[self.name] = dealt.pop(self.name)
            return [self._box(memory, site, shares).sign(self._signer) for site, shares in dealt.items()]

    def mask(self, inbox: Sequence[Signed], update: Floats, model: str) -> tuple[Signed, Ring]:
        """The update under its masks, (size,) of uint32, and the statement that goes with it.

        Args:
            inbox: the boxes for this site, of all whom the vector is masked for.
            update: (size,) float32 or float64, already clipped and noised as the plan says. Whoever calls forgets it.
            model: SHA-256 of the manifest of the model that the update starts from.
        """
        with self._step("mask") as memory:
            for signed in inbox:
                self._open_box(memory, signed)
            self._enough(len(memory.held), max(self.plan.fewest, self._rules.min_cohort), "sites dealt their shares")
            if update.shape != (self.plan.size,) or update.dtype.kind != "f":
                raise SumAborted("the update is not of the plan's size")
            vector, self.clipped = quantise(update, self.plan.weights[self.name], self.plan.clip, self.plan.bits)
            salt, memory.model = self.occasion.salt(model), model
            masks = [self_mask(memory.seed, salt, self.name)]
            for peer in memory.held.keys() - {self.name}:
                secret = agreed(memory.mask_key, bytes.fromhex(memory.adverts[peer].mask_key), peer)
                masks.append(pair_mask(secret, salt, self.name, peer))
            add_masks(vector, masks, threads=self._threads)
            digest = hashlib.sha256(vector.data).hexdigest()
            statement = Masked(self.occasion, model, cohort_digest(frozenset(memory.held)), digest)
            return statement.sign(self._signer), vector

    def agree(self, survivors: Sequence[str], dropped: Sequence[str], masked: Sequence[Signed]) -> Signed:
        """The site's word that the vectors of `survivors` are summed, and no other set; `masked` has a statement of each."""
        with self._step("agree") as memory:
            if set(survivors) & set(dropped):
                raise SumAborted("a site is said to have survived and to have vanished")
            if sorted([*survivors, *dropped]) != sorted(memory.held):
                raise SumAborted("survivors and vanished sites are not the sites that this vector was masked for")
            if self.name not in survivors:
                raise SumAborted(f"{self.name} is asked to agree to a sum without it")
            self._enough(len(survivors), max(self.plan.fewest, self._rules.min_survivors), "sites survive")
            statements = self._by_signer(masked, Masked)
            if statements.keys() != set(survivors):
                raise SumAborted("the statements are not those of the survivors")
            cohort = cohort_digest(frozenset(memory.held))
            for site, statement in statements.items():
                if statement.model != memory.model:
                    raise SumAborted(f"{site} was sent another model than {self.name}")
                if statement.cohort != cohort:
                    raise SumAborted(f"{site} masked its vector for other sites than {self.name}")
            memory.survivors = tuple(sorted(survivors))
            return Agreed(self.occasion, memory.model, memory.survivors).sign(self._signer)

    def reveal(self, agreements: Sequence[Signed]) -> Signed:
        """The shares that take the masks off the sum; `agreements` has those of t survivors or more. Then all is forgotten."""
        with self._step("reveal") as memory:
            found = self._by_signer(agreements, Agreed)
            wanted = Agreed(self.occasion, memory.model, memory.survivors)
            for site, agreement in found.items():
                if site not in memory.survivors or agreement != wanted:
                    raise SumAborted(f"{site} agreed to other survivors than {self.name}")
            self._enough(len(found), self.plan.threshold, "survivors agreed")
            seeds = {site: memory.held[site].seed.hex() for site in memory.survivors}
            keys = {site: held.key.hex() for site, held in memory.held.items() if site not in seeds}
            signed = Revealed(self.occasion, memory.model, seeds, keys).sign(self._signer)
            self._memory = None
            return signed

    # ---- below: one statement at a time

    def _add_advert(self, adverts: dict[str, Advert], signed: Signed) -> None:
        advert, site = self._believed(signed, Advert), signed.signer
        known = {key for other in adverts.values() for key in (other.channel_key, other.mask_key)}
        if site in adverts:
            raise SumAborted(f"{site} has two adverts")
        if advert.channel_key == advert.mask_key or {advert.channel_key, advert.mask_key} & known:
            raise SumAborted(f"{site} has a key that is there twice")
        adverts[site] = advert

    def _box(self, memory: _Memory, to: str, shares: Shares) -> Dealt:
        theirs = bytes.fromhex(memory.adverts[to].channel_key)
        channel = memory.channels[to] = Channel.between(memory.channel_key, theirs, self.occasion, self.name, to)
        marks = (mark(share, what, self.occasion, self.name, to) for what, share in vars(shares).items())
        return Dealt(self.occasion, to, channel.seal(shares).hex(), *marks)

    def _open_box(self, memory: _Memory, signed: Signed) -> None:
        dealt, dealer = self._believed(signed, Dealt), signed.signer
        if dealer in memory.held or dealer not in memory.channels or dealt.to != self.name:
            raise SumAborted(f"the shares of {dealer} are not for {self.name}, or are there twice")
        shares = memory.channels[dealer].open(bytes.fromhex(dealt.box))
        for what, share in vars(shares).items():
            if mark(share, what, self.occasion, dealer, self.name) != getattr(dealt, f"{what}_mark"):
                raise SumAborted(f"the shares of {dealer} are not those it signed for")
        memory.held[dealer] = shares

    def _by_signer(self, all_signed: Sequence[Signed], kind: type[S]) -> dict[str, S]:
        found = {signed.signer: self._believed(signed, kind) for signed in all_signed}
        if len(found) != len(all_signed):
            raise SumAborted("a site's statement is there twice")
        return found

    def _believed(self, signed: Signed, kind: type[S]) -> S:
        return believed(signed, kind, self.plan, self.occasion, self._check)

    def _enough(self, count: int, wanted: int, what: str) -> None:
        if count < wanted:
            raise SumAborted(f"{count} {what}; {self.name} wants {wanted} or more")

    @contextlib.contextmanager
    def _step(self, step: str) -> Iterator[_Memory]:
        """One step; whatever is raised in it ends the sum here, with a reason in our own words."""
        try:
            if self._memory is None or step != self.next:
                raise SumAborted(self.reason or f"out of order: asked to {step}, the next step is {self.next}")
            yield self._memory
            self.next = _STEPS[_STEPS.index(step) + 1]
        except BaseException as error:
            self._memory, self.next = None, _STEPS[-1]
            ours = isinstance(error, WardroundError)
            self.reason = self.reason or (str(error) if ours else "the sum failed at this site")
            if isinstance(error, SumAborted) or not isinstance(error, Exception):
                raise
            raise SumAborted(self.reason, detail=getattr(error, "detail", "") or repr(error)) from None
