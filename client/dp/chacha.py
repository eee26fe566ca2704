"""Secret normal numbers on a CUDA device, where they are needed: ChaCha20 in integer tensor operations.

torch's own generator there is Philox (Salmon et al. 2011): fast and statistically good, but not made to withstand somebody
who sees a part of what it gave, and everything it gives follows from a seed of 64 bits. The noise of an update is seen, so it
comes from a cipher under a 256-bit key of the operating system. Nothing here depends on the device: on the CPU it gives the
same bits.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

_CONSTANTS = b"expand 32-byte k"
_POOL = 2**20  # words drawn ahead for small tensors: a draw is some 500 kernels, however little it draws
_PAIRS = 2**22  # pairs of numbers at a time; some 200 MB of device memory
_BLOCKS = 2**32  # of one key and nonce: the counter has 32 bits


class DeviceCoins:
    """One keystream on one device, and normal numbers made of it. The key is in memory only, as long as the object."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.empty(0, dtype=torch.int32, device=device)
        self._new_key()

    def add_normal(self, to: Tensor, *, scale: float) -> None:
        """Add `scale` times standard normal numbers to every entry of `to`: flat, float32 or float64, on this device."""
        words_each = 3 if to.dtype == torch.float32 else 4
        for start in range(0, len(to), 2 * _PAIRS):
            part = to[start : start + 2 * _PAIRS]
            pairs = (len(part) + 1) // 2
            cosines, sines = normal_pairs(self.words(words_each * pairs).view(words_each, pairs), to.dtype)
            part[:pairs].add_(cosines, alpha=scale)
            part[pairs:].add_(sines[: len(part) - pairs], alpha=scale)

    def words(self, count: int) -> Tensor:
        """The next `count` int32 words of 32 secret bits; none is given twice."""
        if count > _POOL // 4:
            return self._draw(count)
        if count > len(self._pool):
            self._pool = self._draw(_POOL)
        taken, self._pool = self._pool[:count], self._pool[count:]
        return taken

    def _draw(self, count: int) -> Tensor:
        blocks = -(-count // 16)
        if self._block + blocks > _BLOCKS:
            self._new_key()
        words = keystream(self._key, self._nonce, self._block, blocks)
        self._block += blocks
        return words.view(-1)[:count]

    def _new_key(self) -> None:
        self._key, self._nonce = (little_endian(os.urandom(size)).to(self._device) for size in (32, 12))
        self._block = 0


def little_endian(text: bytes) -> Tensor:
    """The bytes as int32 words, least significant byte first."""
    words = [int.from_bytes(text[at : at + 4], "little", signed=True) for at in range(0, len(text), 4)]
    return torch.tensor(words, dtype=torch.int32)


def keystream(key: Tensor, nonce: Tensor, block: int, blocks: int) -> Tensor:
    """ChaCha20's keystream (RFC 8439, section 2.3), on the device of the key.

    Args:
        key: (8,) int32, as `little_endian` reads it.
        nonce: (3,) int32.
        block: counter of the first block; `block + blocks` is at most 2^32.
        blocks: how many.

    Returns:
        (16, blocks) int32: word w of block b at [w, b].
    """
    counter = torch.arange(block, block + blocks, device=key.device).to(torch.int32)  # from 2^31 on it wraps, as it should
    start = (
        little_endian(_CONSTANTS).to(key.device)[:, None].expand(4, blocks),
        key[:4, None].expand(4, blocks),
        key[4:, None].expand(4, blocks),
        torch.cat([counter[None], nonce[:, None].expand(3, blocks)]),
    )
    a, b, c, d = (row.clone() for row in start)
    for _ in range(10):
        b, d = _quarter_rounds(a, b, c, d)  # the columns
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)
        b, d = _quarter_rounds(a, b, c, d)  # the diagonals
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return torch.cat([row.add_(first) for row, first in zip((a, b, c, d), start, strict=True)])


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Four quarter rounds side by side (RFC 8439, section 2.1); `a` and `c` in place, returns `b` and `d`."""
    for left, right in ((16, 12), (8, 7)):
        a += b
        d = _rotated(d.bitwise_xor_(a), left)
        c += d
        b = _rotated(b.bitwise_xor_(c), right)
    return b, d


def _rotated(words: Tensor, by: int) -> Tensor:
    """Every word rotated to the left."""
    low = (words >> (32 - by)).bitwise_and_((1 << by) - 1)  # the shift copies the sign; the mask takes it off
    return low.add_(words, alpha=1 << by)


def normal_pairs(words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers from each column of `words` (Box and Muller, 1958).

    The radius has 64 bits, the angle 32 (64 for float64); neither is ever zero.

    Args:
        words: (3, pairs) int32 for float32, (4, pairs) for float64.
        dtype: of the numbers.
    """
    radius = _unsigned(words[0], dtype).add_(_unsigned(words[1] | 1, dtype), alpha=2.0**-32)
    radius.mul_(2.0**-32 * (1 - torch.finfo(dtype).eps / 2)).log_().mul_(-2).sqrt_()  # below 1 even after rounding
    if dtype == torch.float64:
        angle = words[2].to(dtype).add_(_unsigned(words[3] | 1, dtype), alpha=2.0**-32)
    else:
        angle = (words[2] | 1).to(dtype)
    angle.mul_(math.pi * 2.0**-31)
    return angle.cos().mul_(radius), angle.sin_().mul_(radius)


def _unsigned(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The words read as numbers from 0 to 2^32 - 1, rounded to `dtype`."""
    signed = words.to(dtype)
    return torch.where(words < 0, signed + 2.0**32, signed)
