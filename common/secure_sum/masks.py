"""Masks that cancel: the same stream of random bits is added by one site and taken away by another.

A mask is the stream of AES-256-CTR (NIST SP 800-38A) under a key used for nothing else, read as little-endian 32-bit numbers.
Its key is HKDF-SHA256 (RFC 5869) of a secret: the X25519 agreement (RFC 7748) of two sites, or a site's own seed. Study, run,
round, attempt and the model's manifest are in the salt. Masks of sites that were sent different models do not cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from wardround.common.errors import SumAborted
from wardround.common.secure_sum.rounding import chunks
from wardround.common.trust.signing import canonical

if TYPE_CHECKING:
    from wardround.common.secure_sum.rounding import Ring

BLOCK = 1 << 17  # bytes: what is added to and what is added stay in the cache; twice as many or half are slower
_NUMBERS = BLOCK // 4
_CIPHER_BLOCK = 16  # bytes
_ZEROS = bytes(BLOCK)


@dataclass(frozen=True)
class Mask:
    """A stream to be added (sign 1) or taken away (sign -1)."""

    key: bytes
    sign: int

    def __repr__(self) -> str:  # a key does not belong in a traceback
        return f"Mask(sign={self.sign})"


def derive(secret: bytes, salt: bytes, *info: str) -> bytes:
    """A key of 32 bytes for the purpose `info`, by HKDF-SHA256."""
    return HKDF(hashes.SHA256(), 32, salt, canonical(list(info))).derive(secret)


def agreed(mine: X25519PrivateKey, theirs: bytes, peer: str) -> bytes:
    """What our key and that of `peer` have in common, by X25519.

    Raises:
        SumAborted: `theirs` is no key, or one of the few with which everybody agrees on the same.
    """
    try:
        return mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:
        raise SumAborted(f"the key of {peer} is none that can be agreed with") from None


def pair_mask(secret: bytes, salt: bytes, site: str, other: str) -> Mask:
    """What `site` puts on its vector for `other`, who puts on the opposite."""
    first, second = sorted((site, other))
    return Mask(derive(secret, salt, "pair", first, second), 1 if site == second else -1)


def self_mask(seed: bytes, salt: bytes, site: str) -> Mask:
    """What `site` puts on its vector besides, so that it stays hidden even if it is wrongly said to have vanished."""
    return Mask(derive(seed, salt, "self", site), 1)


def opposite(mask: Mask) -> Mask:
    """What takes `mask` off again."""
    return Mask(mask.key, -mask.sign)


def add_masks(to: Ring, masks: Sequence[Mask], *, threads: int = 1) -> None:
    """Put all masks on `to` (size,), in place; a thread for each of `threads` stretches of it."""
    blocks = -(-to.size // _NUMBERS)
    length = -(-blocks // threads) * _NUMBERS
    starts = range(0, to.size, max(length, 1))
    if len(starts) < 2:
        _add(to, masks, 0)
        return
    with ThreadPoolExecutor(len(starts)) as pool:
        list(pool.map(lambda start: _add(to[start : start + length], masks, start), starts))


def _add(to: Ring, masks: Sequence[Mask], start: int) -> None:
    """Put masks on the stretch `to` of a vector that begins at number `start`, a multiple of four."""
    stream = bytearray(BLOCK + _CIPHER_BLOCK - 1)  # the cipher wants room for a block more than it writes
    numbers = np.frombuffer(stream, "<u4", _NUMBERS)
    zeros = memoryview(_ZEROS)
    counter = modes.CTR((4 * start // _CIPHER_BLOCK).to_bytes(_CIPHER_BLOCK, "big"))
    ciphers = [
        (Cipher(algorithms.AES(mask.key), counter).encryptor(), np.add if mask.sign > 0 else np.subtract) for mask in masks
    ]
    for part in chunks(to.size, _NUMBERS):
        block = to[part]
        some, text = numbers[: block.size], zeros[: 4 * block.size]
        for cipher, put in ciphers:  # all masks on one block before the next: it does not leave the cache
            cipher.update_into(text, stream)
            put(block, some, out=block)
