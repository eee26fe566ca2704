"""What the network costs a round: `python -m benchmarks.network`, beside stock Flower and beside moving the bytes alone.

A coordinator and its hospitals as processes, over TLS on loopback. A round lasts from one checkpoint to the next; the
longest training of a site is taken off, so everything else is in the figure: sealing, sending, checking, combining, writing.
Toy rounds and stock Flower's are of the same study; the bytes are moved by processes of their own before, after and between
two studies, with the same keys.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import flwr
import torch

SECONDS_TOY = 2.0  # targets
TIMES_BYTES, SECONDS_BYTES = 1.5, 2.0
CPU_IDLE, MEMORY_IDLE = 1.0, 400e6
_STUDIES = 2  # large ones, with bytes moved around each
_MOVES = 3


@dataclass(frozen=True)
class Row:
    """One figure; `target` is None where it is there to compare with."""

    what: str
    value: float
    unit: str
    target: float | None = None

    @property
    def line(self) -> str:
        """As it is printed."""
        wanted = "" if self.target is None else f"   (target: {self.target:.4g})"
        return f"{self.what:60} {self.value:9.3f} {self.unit}{wanted}"

    @property
    def missed(self) -> bool:
        """Whether there was a target, and it was not met."""
        return self.target is not None and self.value > self.target


def toy(folder: Path, *, rounds: int, sites: int, idle_seconds: float) -> list[Row]:
    """A small model, and a hospital that waits for it."""
    from benchmarks.network_runs import consortium, idle, prepared, timed

    scenario = prepared(folder, rounds=rounds, sites=sites)
    with consortium(folder, scenario) as there:
        waiting = idle(there, next(iter(scenario.sites)), idle_seconds)
        found = timed(there, scenario)
    return [
        Row("idle hospital, processor", waiting.cpu, "%", CPU_IDLE),
        Row("idle hospital, resident memory", waiting.memory / 1e6, "MB", MEMORY_IDLE / 1e6),
        Row(f"toy model, {sites} sites, a round beyond training", statistics.median(found.beyond), "s", SECONDS_TOY),
        Row("  the slowest of them", max(found.beyond), "s"),
    ]


def stock(folder: Path, *, rounds: int, toy_seconds: float) -> list[Row]:
    """The same study over Flower's own programs, with two sites."""
    from benchmarks.network_runs import prepared
    from benchmarks.network_runs import stock as carried

    seconds = statistics.median(carried(folder, prepared(folder / "study", rounds=rounds, sites=2)).whole)
    return [Row("toy model, stock Flower, 2 sites, a round", seconds, "s"), Row("  over ours", seconds / toy_seconds, "x")]


def large(folder: Path, *, rounds: int, sites: int) -> list[Row]:
    """A model of 45 MB, and its bytes."""
    from benchmarks.network_bytes import mover
    from benchmarks.network_runs import consortium, free_port, keys, prepared, timed

    whole, beyond, moved, size = [], [], [], 0
    for number in range(_STUDIES):
        own = folder / str(number)
        scenario = prepared(own, rounds=rounds, sites=sites, large=True)
        size = sum(4 * one.numel() for one in scenario.task.model(dict(scenario.study.plan.model), 0).parameters())
        with consortium(own, scenario) as there, mover(free_port(), size, *keys(there)) as bare:
            bare.seconds()  # warms up
            moved += [bare.seconds() for _ in range(_MOVES)]
            found = timed(there, scenario)
            moved += [bare.seconds() for _ in range(_MOVES)]
        whole += found.whole
        beyond += found.beyond
    bytes_alone, seconds = statistics.median(moved), statistics.median(beyond)
    what = f"{size / 1e6:.1f} MB, {sites} sites"
    return [
        Row(f"{what}, its bytes alone, down and up", bytes_alone, "s"),
        Row(f"{what}, a round", statistics.median(whole), "s"),
        Row(f"{what}, a round beyond training", seconds, "s", TIMES_BYTES * bytes_alone + SECONDS_BYTES),
        Row("  over its bytes alone", seconds / bytes_alone, "x"),
    ]


def table(rows: list[Row], *, rounds: int, sites: int) -> dict[str, object]:
    """What --json writes."""
    return {
        "versions": versions(),
        "cores": os.cpu_count(),
        "load": list(os.getloadavg()),
        "rounds": rounds,
        "sites": sites,
        "rows": [asdict(row) for row in rows],
        "missed": [row.what for row in rows if row.missed],
    }


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "flwr": flwr.__version__}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__)
    found.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file as well")
    found.add_argument("--rounds", type=int, default=12, help="of the toy study (default 12); large ones have half as many")
    found.add_argument("--sites", type=int, choices=(2, 3, 4), default=4, help="hospitals of wardround's studies")
    found.add_argument("--no-stock", action="store_true", help="leave out stock Flower, whose round takes half a minute")
    found.add_argument("--no-large", action="store_true", help="leave out the model of 45 MB")
    found.add_argument("--idle-seconds", type=float, default=20.0, help="how long an idle hospital is watched")
    return found


def main() -> None:
    asked = parser().parse_args()
    if asked.rounds < 3:
        raise SystemExit("--rounds: at least 3; the first and the last one do not count")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    rows: list[Row] = []

    def show(found: list[Row]) -> None:
        rows.extend(found)
        print(*(row.line for row in found), sep="\n", flush=True)

    with tempfile.TemporaryDirectory(prefix="wardround-bench-") as name:
        folder = Path(name)
        show(toy(folder / "toy", rounds=asked.rounds, sites=asked.sites, idle_seconds=asked.idle_seconds))
        if not asked.no_stock:
            show(stock(folder / "stock", rounds=4, toy_seconds=rows[2].value))
        if not asked.no_large:
            show(large(folder / "large", rounds=max(3, asked.rounds // 2), sites=asked.sites))
    found = table(rows, rounds=asked.rounds, sites=asked.sites)
    print("\n" + ("\n".join(f"missed: {what}" for what in found["missed"]) or "every target is met"))  # type: ignore[attr-defined]
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
