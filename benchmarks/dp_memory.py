"""How much memory training takes beyond the network and its batch, measured in a process that does nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from benchmarks.dp_modes import make
from benchmarks.networks import NETWORKS

_STEPS = 3
_LARGER = 1 << 16  # bytes
_M_MMAP_THRESHOLD, _M_MMAP_MAX = -3, -4  # of <malloc.h>
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra(network: str, mode: str, *, rewritten: bool, device: str) -> int | None:
    """Bytes at the highest moment of three steps beyond what was there before the mode touched the network.

    On a CPU by the kernel's own high-water mark, on CUDA by torch's allocator. None where the kernel does not tell or the
    process died.
    """
    if device == "cpu" and not _CLEAR.exists():
        return None
    context = multiprocessing.get_context("forkserver")  # each process starts from one that has only imported
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measured, network, mode, rewritten, device).result()
        except BrokenProcessPool:
            return None


def _measured(network: str, mode: str, rewritten: bool, device: str) -> int | None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _pages_of_their_own()
    _warm(network, mode, rewritten, device)
    known = NETWORKS[network]
    model, batch = (known.for_opacus() if rewritten else known.model()), known.batch().to(device)
    model.to(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _kilobytes("VmRSS")
        try:
            _CLEAR.write_text("5")  # the high-water mark starts here
        except OSError:
            return None
    step = make(known, mode, batch, model=model)
    for _ in range(_STEPS):
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return 1024 * (_kilobytes("VmHWM") - before)


def _pages_of_their_own() -> None:
    """Have the C library map every larger block by itself and unmap it when freed, so that the mark counts what is alive."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: freed blocks may be used again, uncounted
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _LARGER)
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_MAX, 1 << 30)


def _warm(network: str, mode: str, rewritten: bool, device: str) -> None:
    """Load the code that a step runs, so that its pages do not count; then give all memory back."""
    known = NETWORKS[network]
    make(known, mode, known.batch(2).to(device), model=known.for_opacus() if rewritten else known.model())()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _kilobytes(field: str) -> int:
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
