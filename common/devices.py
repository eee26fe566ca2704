"""Where tensors are computed, and out of which memory."""

from __future__ import annotations

import ctypes
import sys

import torch

from wardround.common.errors import ConfigError


def device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` as a device; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: a GPU was asked for by name and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.device(name)
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"compute.device: {name} was asked for, and {torch.cuda.device_count()} GPUs were found")
    return found


def keep_memory() -> None:
    """Ask the C library not to hand freed blocks back at once: a training loop takes and frees the same ones each step."""
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, 1 << 30)
    except (OSError, AttributeError):  # another C library: only a little slower
        pass
