"""What a site says in a secure sum: five kinds of statements, each signed, each about one occasion, each read strictly.

    Advert      here are my keys, and what I shall answer for
    Dealt       this box is for that site; it holds the shares with these marks
    Masked      this vector is mine, for this model, masked for this cohort
    Agreed      these are the survivors, and I shall agree to no others
    Revealed    of each survivor the share of its seed, of each site that vanished the share of its key

Bytes are written as hex digits. A reader believes nothing: whether the signature is the site's is for the caller to check.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self, TypeVar

from wardround.common.errors import SignatureRefused, SumAborted
from wardround.common.secure_sum.occasion import MOST_SITES, Occasion, SumPlan
from wardround.common.secure_sum.shamir import SHARE, is_share
from wardround.common.secure_sum.shares import BOX
from wardround.common.trust.certificates import is_name
from wardround.common.trust.signing import Signed, Signer, canonical

Check = Callable[[Signed], None]  # returns if the site it names signed it; raises a WardroundError
_LARGEST_NUMBER = 1 << 31


@dataclass(frozen=True)
class _Statement:
    """Fields are read by their names: `_READ` has the rule for each."""

    kind: ClassVar[str]
    occasion: Occasion

    def sign(self, signer: Signer) -> Signed:
        """As a statement of `signer`."""
        values = {name: value for name, value in asdict(self).items() if name != "occasion"}
        return signer.sign(self.kind, {**asdict(self.occasion), **values})

    @classmethod
    def read(cls, signed: Signed) -> Self:
        """Read what `sign` wrote.

        Raises:
            SignatureRefused: another kind, other fields, or a value that none of ours has. The signature is not checked.
        """
        body, own = signed.body, [field.name for field in fields(cls) if field.name != "occasion"]
        wanted = {*_OCCASION, *own}
        if signed.kind != cls.kind or body.keys() != wanted or not all(_READ[name](body[name]) for name in wanted):
            raise SignatureRefused(f"the {cls.kind} of {signed.signer} cannot be read")
        values = {name: tuple(body[name]) if type(body[name]) is list else body[name] for name in own}
        return cls(Occasion(**{name: body[name] for name in _OCCASION}), **values)


@dataclass(frozen=True)
class Advert(_Statement):
    """Fresh public keys of a site.

    Attributes:
        channel_key: X25519, for the boxes of shares.
        mask_key: X25519, for the masks with other sites.
        commitment: to the seed of its own mask.
    """

    kind: ClassVar[str] = "secure-sum.advert"
    channel_key: str
    mask_key: str
    commitment: str


@dataclass(frozen=True)
class Dealt(_Statement):
    """Shares of the signer's two secrets for one other site.

    Attributes:
        to: whom for.
        box: sealed, see `shares`.
        seed_mark: of the share of its seed, by which it is known when it is revealed.
        key_mark: of the share of its mask key.
    """

    kind: ClassVar[str] = "secure-sum.shares"
    to: str
    box: str
    seed_mark: str
    key_mark: str


@dataclass(frozen=True)
class Masked(_Statement):
    """A masked vector is in.

    Attributes:
        model: digest of the manifest of the model it was trained from.
        cohort: digest of the names it was masked for.
        vector: SHA-256 of its bytes.
    """

    kind: ClassVar[str] = "secure-sum.masked"
    model: str
    cohort: str
    vector: str


@dataclass(frozen=True)
class Agreed(_Statement):
    """Whose vectors are summed; a site signs one of these for an occasion."""

    kind: ClassVar[str] = "secure-sum.agree"
    model: str
    survivors: tuple[str, ...]


@dataclass(frozen=True)
class Revealed(_Statement):
    """The shares that take the masks off: of each site one of two.

    Attributes:
        model: as agreed.
        seeds: of every survivor, the share of its seed.
        keys: of every other site of the cohort, the share of its mask key.
    """

    kind: ClassVar[str] = "secure-sum.reveal"
    model: str
    seeds: dict[str, str]
    keys: dict[str, str]


S = TypeVar("S", bound=_Statement)


def believed(signed: Signed, kind: type[S], plan: SumPlan, occasion: Occasion, check: Check) -> S:
    """What `signed` says, of a site of the plan, about this occasion.

    Raises:
        SumAborted: a stranger's, or about another occasion.
        WardroundError: it cannot be read, or what `check` raises where the signature is not the site's.
    """
    statement = kind.read(signed)
    if signed.signer not in plan.weights:
        raise SumAborted(f"{signed.signer} is not among the sites of this plan")
    check(signed)
    if statement.occasion != occasion:
        raise SumAborted(f"the {kind.kind} of {signed.signer} is of another study, run, round or attempt")
    return statement


def cohort_digest(names: frozenset[str]) -> str:
    """SHA-256 of a set of sites, in hex."""
    return hashlib.sha256(canonical(sorted(names))).hexdigest()


def _hex(count: int) -> Any:
    pattern = re.compile(f"[0-9a-f]{{{2 * count}}}")
    return lambda value: type(value) is str and pattern.fullmatch(value) is not None


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_NUMBER


def _is_site(value: object) -> bool:
    return type(value) is str and is_name(value)


def _are_sites(value: Any) -> bool:
    few = type(value) is list and 0 < len(value) <= MOST_SITES and all(_is_site(name) for name in value)
    return few and value == sorted(set(value))


def _are_shares(value: Any) -> bool:
    few = type(value) is dict and len(value) <= MOST_SITES and all(_is_site(name) for name in value)
    return few and all(_hex(SHARE)(share) and is_share(bytes.fromhex(share)) for share in value.values())


_OCCASION = tuple(field.name for field in fields(Occasion))
_READ: dict[str, Any] = {
    "study": _hex(32), "run": lambda value: type(value) is str and 0 < len(value) <= 100,
    "round": _is_number, "attempt": _is_number, "model": _hex(32), "cohort": _hex(32), "vector": _hex(32),
    "channel_key": _hex(32), "mask_key": _hex(32), "commitment": _hex(32),
    "to": _is_site, "box": _hex(BOX), "seed_mark": _hex(32), "key_mark": _hex(32),
    "survivors": _are_sites, "seeds": _are_shares, "keys": _are_shares,
}  # fmt: skip
