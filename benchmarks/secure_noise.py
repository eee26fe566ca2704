"""Secret noise beside torch's own, which a seed repeats: `python -m benchmarks.secure_noise`.

Processor time of one thread in nanoseconds a number, the rows of one repetition one after the other; a ratio is the median
over the repetitions. Memory that torch.normal asks for anew each time costs as much as its numbers, so it has a row without.
With `--threads` the clock is the wall's. Where there is a CUDA device, rows for it follow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cryptography
import numpy as np
import torch

from wardround.client.dp import OsCoins

COUNTS = (2_500_000, 11_000_000)  # the parameters of a small and of a middling network
REFERENCE = "torch.normal, new memory"
SECURE = "OsCoins.add_normal"
TARGET = 1.5  # times the reference, float32, one thread of the CPU
_SMALL = 100  # entries: what a bias costs


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    device: str
    dtype: str
    count: int
    who: str
    nanoseconds: float  # a number
    ratio: float  # to REFERENCE

    @property
    def line(self) -> str:
        """As it is printed."""
        return f"{self.device:5} {self.dtype:8} {self.count:11,} {self.who:30} {self.nanoseconds:9.3f} {self.ratio:8.2f}"


HEADER = f"{'':5} {'':8} {'numbers':>11} {'':30} {'ns each':>9} {'ratio':>8}"


def measured(count: int, *, device: str, dtype: torch.dtype, clock: Callable[[], float], repetitions: int) -> list[Row]:
    """All ways to noise one tensor."""
    to, coins = torch.zeros(count, device=device, dtype=dtype), OsCoins()

    def fresh() -> torch.Tensor:
        return torch.normal(0.0, 1.0, (count,), device=device, dtype=dtype)

    ways: dict[str, Callable[[], object]] = {
        REFERENCE: fresh,
        "add_(torch.normal)": lambda: to.add_(fresh(), alpha=1.3),
        "normal_, memory used again": lambda: to.normal_(),
        SECURE: lambda: coins.add_normal(to, scale=1.3),
    }
    times: dict[str, list[float]] = {who: [] for who in ways}
    for repetition in range(repetitions + 1):
        for who, way in ways.items():
            began = clock()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            if repetition:  # the first one warms up
                times[who].append(clock() - began)
    return [
        Row(
            device=device,
            dtype=str(dtype).removeprefix("torch."),
            count=count,
            who=who,
            nanoseconds=1e9 * statistics.median(times[who]) / count,
            ratio=statistics.median(mine / bare for mine, bare in zip(times[who], times[REFERENCE], strict=True)),
        )
        for who in ways
    ]


def small(repetitions: int) -> float:
    """Microseconds to noise a tensor of a few entries on the CPU."""
    to, coins = torch.zeros(_SMALL), OsCoins()
    times = []
    for _ in range(100 * repetitions):
        began = time.perf_counter()
        coins.add_normal(to, scale=1.0)
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def misses(rows: list[Row]) -> list[str]:
    """Every target that was not met, in words."""
    return [
        f"{row.count:,} numbers: {row.ratio:.2f} x {REFERENCE}, wanted {TARGET:.2f}"
        for row in rows
        if (row.device, row.dtype, row.who) == ("cpu", "float32", SECURE) and row.ratio > TARGET
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.secure_noise", description=__doc__)
    parser.add_argument("--reps", type=int, default=11, help="repetitions")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file as well")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    versions = {
        "python": platform.python_version(), "torch": torch.__version__,
        "numpy": np.__version__, "cryptography": cryptography.__version__,
    }  # fmt: skip
    print(f"{os.cpu_count()} cores, {asked.threads} used; " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print(HEADER)
    rows: list[Row] = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        clock = time.process_time if device == "cpu" and asked.threads == 1 else time.perf_counter
        for dtype in (torch.float32, torch.float64):
            for count in COUNTS:
                found = measured(count, device=device, dtype=dtype, clock=clock, repetitions=asked.reps)
                print(*(row.line for row in found), sep="\n", flush=True)
                rows += found
    few = small(asked.reps)
    print(f"{_SMALL} numbers: {few:.1f} microseconds")
    missed = misses(rows) if asked.threads == 1 else []
    print("\n" + ("\n".join(f"missed: {line}" for line in missed) or "every target is met"))
    if asked.json:
        table = {"versions": versions, "cores": os.cpu_count(), "threads": asked.threads, "repetitions": asked.reps}
        rest = {"rows": [asdict(row) for row in rows], "small_microseconds": few, "missed": missed}
        asked.json.write_text(json.dumps({**table, **rest}, indent=1) + "\n")


if __name__ == "__main__":
    main()
