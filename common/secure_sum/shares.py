"""Shares on their way through the coordinator, in boxes that only their receiver can open.

AES-256-GCM (NIST SP 800-38D) under HKDF-SHA256 of the X25519 agreement of sender and receiver. Each direction has a key of its
own, and each key seals one box ever, so its nonce can be zero. Study, run, round, attempt, sender and receiver are in the key
and in what the box authenticates: it opens nowhere else, at nobody else's, at no other time.

Besides, the dealer signs a mark of each share, SHA-256 of it and its place. The receiver sees at once whether the box holds
what was signed for, and whoever reveals another share than was dealt is known by it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from wardround.common.errors import SumAborted
from wardround.common.secure_sum.masks import agreed, derive
from wardround.common.secure_sum.occasion import Occasion
from wardround.common.secure_sum.shamir import SHARE
from wardround.common.trust.signing import canonical

BOX = 2 * SHARE + 16  # bytes: two shares and the tag
_NONCE = bytes(12)


@dataclass(frozen=True, repr=False)
class Shares:
    """What one site holds of another's secrets: of its own mask's seed, and of the key of its masks with others."""

    seed: bytes
    key: bytes


@dataclass(frozen=True, repr=False)
class Channel:
    """Between `site` and `peer`, for one occasion."""

    secret: bytes
    occasion: Occasion
    site: str
    peer: str

    @classmethod
    def between(cls, mine: X25519PrivateKey, theirs: bytes, occasion: Occasion, site: str, peer: str) -> Channel:
        """The channel of two channel keys; raises `SumAborted` where `theirs` is no key to agree with."""
        return cls(agreed(mine, theirs, peer), occasion, site, peer)

    def seal(self, shares: Shares) -> bytes:
        """A box for `peer`. One per channel: there is a single nonce."""
        return self._cipher(self.site, self.peer).encrypt(_NONCE, shares.seed + shares.key, self._names(self.site, self.peer))

    def open(self, box: bytes) -> Shares:
        """What `peer` put into `box`.

        Raises:
            SumAborted: it was not sealed by `peer`, for us, on this occasion.
        """
        try:
            plain = self._cipher(self.peer, self.site).decrypt(_NONCE, box, self._names(self.peer, self.site))
        except (InvalidTag, ValueError):
            plain = b""
        if len(plain) != 2 * SHARE:
            raise SumAborted(f"the shares of {self.peer} do not authenticate")
        return Shares(plain[:SHARE], plain[SHARE:])

    def _cipher(self, sender: str, receiver: str) -> AESGCM:
        return AESGCM(derive(self.secret, self.occasion.salt(), "shares", sender, receiver))

    def _names(self, sender: str, receiver: str) -> bytes:
        return self.occasion.salt() + canonical([sender, receiver])


def mark(share: bytes, what: str, occasion: Occasion, dealer: str, holder: str) -> str:
    """What the dealer signs of a share of his `what` ("seed" or "key"), in hex; a share is too random to be guessed from it."""
    return hashlib.sha256(occasion.salt() + canonical([what, dealer, holder]) + share).hexdigest()


def commitment(seed: bytes, occasion: Occasion, site: str) -> str:
    """What a site signs of its own mask's seed, in hex, so that what others put together can be told from it."""
    return hashlib.sha256(occasion.salt() + canonical(["commitment", site]) + seed).hexdigest()
