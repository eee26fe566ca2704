"""Secret randomness: an AES-256-CTR stream under a key of the operating system.

Who can repeat the coins can subtract the noise, so no configuration reaches this file: `OsCoins` takes no argument.
Tests hand in `SeededCoins` by argument, from code.
"""

from __future__ import annotations

import math
import os
from typing import Any, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor


class Coins(Protocol):
    """A source of uniform and normal numbers."""

    def uniform(self, count: int) -> Tensor:
        """`count` float64 numbers in [0, 1), 53 random bits each."""

    def normal(self, count: int) -> Tensor:
        """`count` independent standard normal float64 numbers."""


class OsCoins:
    """Coins nobody can repeat. One object a round; the key is never stored."""

    def __init__(self) -> None:
        key, nonce = os.urandom(32), os.urandom(16)
        self._stream = Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor()

    def uniform(self, count: int) -> Tensor:
        """`count` float64 numbers in [0, 1), 53 random bits each."""
        return torch.from_numpy((self._words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def normal(self, count: int) -> Tensor:
        """Standard normal numbers by the Box-Muller transform; 63-bit radii reach 9.4 standard deviations."""
        half = (count + 1) // 2
        radius = ((self._words(half) >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-63
        angle = (self._words(half) >> np.uint64(11)).astype(np.float64) * (2 * math.pi * 2.0**-53)
        length = np.sqrt(-2 * np.log(radius))
        return torch.from_numpy(np.concatenate([length * np.cos(angle), length * np.sin(angle)])[:count])

    def _words(self, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)


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
