"""Secret randomness: keystreams of ciphers under keys of the operating system, and normal numbers made of them.

Who can repeat the coins can subtract the noise, so no configuration reaches this file: `OsCoins` takes no argument.
Tests hand in `SeededCoins` by argument, from code.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from wardround.client.dp.chacha import DeviceCoins

_Array = np.ndarray[Any, np.dtype[Any]]

_PAIRS = 2**14  # pairs of numbers at a time: keystream and working memory, 0.6 MB for float32, stay in a core's cache
_WORTH_A_THREAD = 2**18  # numbers; fewer are drawn sooner than a thread starts
_MOST_WORDS = 4  # 32-bit words behind one pair
_ZEROS = memoryview(bytes(4 * _MOST_WORDS * _PAIRS))  # what is encrypted: zeros give the bare keystream


class Coins(Protocol):
    """A source of uniform and normal numbers."""

    def uniform(self, count: int) -> Tensor:
        """`count` float64 numbers in [0, 1), 53 random bits each; on the CPU."""

    def normal(self, count: int) -> Tensor:
        """`count` independent standard normal float64 numbers; on the CPU."""

    def add_normal(self, to: Tensor, *, scale: float) -> None:
        """Add `scale` times independent standard normal numbers to every entry of `to`, in place.

        Args:
            to: float32 or float64, of any shape, contiguous, on the CPU or on a CUDA device.
            scale: standard deviation of what is added.

        Raises:
            ValueError: `to` is none of these, or `scale` is not a finite number from 0 upwards that `to` can hold.
        """


class OsCoins:
    """Coins nobody can repeat. One object a round; no key is ever stored.

    On the CPU the bits are AES-256 in counter mode (NIST SP 800-38A), one keystream and one key for each thread: part k of a
    tensor takes its numbers from keystream k, whichever thread is done first. On a CUDA device they are ChaCha20 (see
    `wardround.client.dp.chacha`). Copies of a process share its keystreams, so make the object after a fork, not before.
    """

    def __init__(self) -> None:
        self._keystreams = [_Keystream()]
        self._on_devices: dict[torch.device, DeviceCoins] = {}

    def uniform(self, count: int) -> Tensor:
        """`count` float64 numbers in [0, 1), 53 random bits each."""
        words = np.frombuffer(self._keystreams[0].take(8 * count), dtype=np.uint64)
        return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def normal(self, count: int) -> Tensor:
        """`count` independent standard normal float64 numbers."""
        numbers = torch.zeros(count, dtype=torch.float64)
        self.add_normal(numbers, scale=1.0)
        return numbers

    def add_normal(self, to: Tensor, *, scale: float) -> None:
        """See `Coins`. The numbers reach 9.4 standard deviations; in float32 none of them is zero."""
        _refuse(to, scale)
        flat = to.detach().view(-1)
        if to.is_cuda:
            if to.device not in self._on_devices:
                self._on_devices[to.device] = DeviceCoins(to.device)
            self._on_devices[to.device].add_normal(flat, scale=float(scale))
        else:
            self._add_on_cpu(flat.numpy(), float(scale))

    def _add_on_cpu(self, to: _Array, scale: float) -> None:
        threads = max(1, min(torch.get_num_threads(), len(to) // _WORTH_A_THREAD))
        self._keystreams += [_Keystream() for _ in range(threads - len(self._keystreams))]
        if threads == 1:
            self._keystreams[0].add_normal(to, scale)
            return
        with ThreadPoolExecutor(threads) as pool:  # ciphers and numpy let go of the interpreter's lock
            parts = zip(self._keystreams[:threads], np.array_split(to, threads), strict=True)
            for done in [pool.submit(keystream.add_normal, part, scale) for keystream, part in parts]:
                done.result()


class SeededCoins:
    """Coins that repeat, for tests only: whoever knows the seed can subtract the noise."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, count: int) -> Tensor:
        """`count` float64 numbers in [0, 1)."""
        return torch.rand(count, generator=self._generator, dtype=torch.float64)

    def normal(self, count: int) -> Tensor:
        """`count` standard normal float64 numbers."""
        return torch.randn(count, generator=self._generator, dtype=torch.float64)

    def add_normal(self, to: Tensor, *, scale: float) -> None:
        """See `Coins`. The numbers are the next `to.numel()` of `normal`, on every device."""
        _refuse(to, scale)
        to.detach().add_(scale * self.normal(to.numel()).view_as(to).to(to))


class _Keystream:
    """The keystream of one thread, and the memory that thread works in."""

    def __init__(self) -> None:
        key, nonce = os.urandom(32), os.urandom(16)
        self._stream = Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor()
        self._bytes = np.empty(len(_ZEROS) + 15, dtype=np.uint8)  # `update_into` wants room for a block more, less one byte
        self._work = np.empty((3, _PAIRS), dtype=np.float64)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        return self._stream.update(bytes(count))

    def add_normal(self, to: _Array, scale: float) -> None:
        """`Coins.add_normal` for a flat array: of each chunk, the cosines go to the first half and the sines to the second."""
        words_each = 3 if to.dtype == np.float32 else 4
        for start in range(0, len(to), 2 * _PAIRS):
            part = to[start : start + 2 * _PAIRS]
            pairs = (len(part) + 1) // 2
            size = 4 * words_each * pairs
            self._stream.update_into(_ZEROS[:size], self._bytes.data)
            words = self._bytes[:size].view(np.uint32).reshape(words_each, pairs)
            cosines, sines = _normal_pairs(words, scale, self._work.view(to.dtype)[:, :pairs])
            part[:pairs] += cosines
            part[pairs:] += sines[: len(part) - pairs]


def _normal_pairs(words: _Array, scale: float, work: _Array) -> tuple[_Array, _Array]:
    """Two independent normal numbers of standard deviation `scale` from each column of `words` (Box and Muller, 1958).

    A radius is made of 64 bits, as hi * 2^-32 + lo * 2^-64: in float32 too this keeps its relative precision down to the
    smallest, which is what the logarithm, and so the tail, needs. `lo` is odd, so the radius is finite. An angle is a signed
    odd number of 32 bits (of 64 for float64), so in float32 no number is zero, and both signs are equally likely.

    Rounding moves half the square of a length by some 2^-24 (2^-53 for float64): as little as any float32 arithmetic does,
    except that the very shortest lengths, below 1e-3, come in steps; the first is 2^-11.5.

    Args:
        words: (3, pairs) uint32 for float32, (4, pairs) for float64; overwritten.
        scale: the standard deviation.
        work: (3, pairs) of the wanted type, holding anything; the results are two of its rows.
    """
    radius, angle, spare = work
    words[1] |= 1
    words[-1] |= 1
    np.copyto(radius, words[0])
    np.copyto(spare, words[1])
    spare *= 2.0**-32
    radius += spare
    radius *= 2.0**-32 * (1 - float(np.finfo(work.dtype).epsneg))  # below 1 even after rounding: no radius without length
    np.log(radius, out=radius)
    radius *= -2
    np.sqrt(radius, out=radius)
    radius *= scale  # a step of its own: the square of a small scale would be zero in float32
    np.copyto(angle, words[2].view(np.int32))
    if len(words) == _MOST_WORDS:
        np.copyto(spare, words[3])
        spare *= 2.0**-32
        angle += spare
    if work.dtype == np.float32:
        angle *= math.pi * 2.0**-31
        np.cos(angle, out=spare)
        np.sin(angle, out=angle)
        spare *= radius
        angle *= radius
    else:  # with t, the tangent of half the angle: 2r / (1 + t^2) is r + r cos, and t times it is r sin;
        angle *= math.pi * 2.0**-32  # numpy's float64 sine and cosine would take longer than everything else together
        np.tan(angle, out=angle)
        np.multiply(angle, angle, out=spare)
        spare += 1
        spare *= 0.5
        np.divide(radius, spare, out=spare)
        angle *= spare
        spare -= radius
    return spare, angle


def _refuse(to: Tensor, scale: float) -> None:
    """Refuse what noise cannot be added to, rather than leave a part of it bare."""
    if to.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"noise is added to float32 or float64 tensors, not to {to.dtype}")
    if to.device.type not in ("cpu", "cuda"):
        raise ValueError(f"noise is added on the CPU or on a CUDA device, not to a {to.dtype} tensor on {to.device}")
    if not to.is_contiguous():
        raise ValueError(f"noise is added to contiguous tensors, not to a {to.dtype} tensor with strides {to.stride()}")
    held = torch.tensor(scale, dtype=to.dtype).item()
    if not (0 <= held < math.inf and (held > 0) == (scale > 0)):
        raise ValueError(f"noise of scale {scale} cannot be added to a {to.dtype} tensor")
