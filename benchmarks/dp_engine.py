"""What privacy costs in time and memory, beside plain SGD and Opacus: `python -m benchmarks.dp_engine`.

A step is forward, backward, clipping, noise and the optimiser, of the same network and batch in every mode; the plain
baseline uses torch's own recurrent layers. One thread. The modes take turns in one process, and a ratio is the median over
the repetitions of a mode's processor time over plain SGD's in the same repetition. Nothing is timed before its clipped sum
was found to be that of single records differentiated alone. A mode of Opacus that raises on a network gets it rewritten the
way Opacus asks for, if there is one; the table says so.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import opacus
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import dp_memory, simulation
from benchmarks.dp_modes import MODES, Step, difference, make
from benchmarks.networks import NETWORKS, Network
from wardround.client.dp import OsCoins
from wardround.common.devices import keep_memory

EIGHT = 8  # physical batches in a large logical one
MEMORY = 2.0  # target: extra peak memory over plain SGD's
NOISE = 1.5  # target: our noise over torch.normal
AGREEMENT = 1e-2  # float32 beside float64: the ResNet is off by 3e-3 in every mode, and ours leaves 1e-3 to rounding
_WARM = 3  # steps before the clock runs: kernels are chosen, buffers taken
_WIDTH = 128  # of the output where it is not a terminal's
_BUSY = 0.25  # cores used by other programs from which the output warns
_DRAWN = 1_000_000  # noise values drawn at once

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Usable:
    """Whether a mode works on a network, and on which form of it."""

    works: bool
    rewritten: bool = False
    difference: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table; milliseconds, bytes, and times plain SGD. None: not measured."""

    network: str
    mode: str
    works: bool
    note: str
    difference: float | None = None
    one: float | None = None
    one_ratio: float | None = None
    one_spread: tuple[float, float] | None = None  # quartiles of the ratio
    eight: float | None = None
    eight_ratio: float | None = None
    memory: int | None = None
    memory_ratio: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A target and whether it was met; None where nothing was measured."""

    network: str
    what: str
    wanted: str
    measured: float | None
    met: bool | None


@dataclass(frozen=True)
class Choice:
    """What to measure."""

    networks: list[str]
    modes: list[str]
    repetitions: int
    device: str
    memory: bool
    all_eight: bool

    @property
    def few(self) -> int:
        """Repetitions of the long steps."""
        return max(1, self.repetitions // 2)


class Busy:
    """How many cores other programs used while the clock ran: inside of `with`, as often as it is entered."""

    def __init__(self) -> None:
        self._seconds, self._worked, self._before = 0.0, 0.0, (0.0, 0.0)

    def __enter__(self) -> None:
        self._before = time.monotonic(), self._others()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.monotonic() - self._before[0]
        self._worked += self._others() - self._before[1]

    @property
    def cores(self) -> float | None:
        """On average; None where the system does not tell."""
        return None if math.isnan(self._worked) else max(0.0, self._worked / self._seconds)

    @staticmethod
    def _others() -> float:
        try:
            return simulation._busy() - simulation._own()
        except OSError:
            return math.nan


def measured(network: Network, choice: Choice, busy: Busy, say: Callable[[str], None]) -> tuple[list[Row], float | None]:
    """The rows of one network, and how many times faster ours is than Opacus' fastest mode (None: not all were tried)."""
    found: dict[str, Usable] = {}
    for mode in choice.modes:
        say(f"{network.name}: {MODES[mode].title} against single records")
        found[mode] = usable(network, mode, choice.device) if mode != "sgd" else Usable(True)
    works = [mode for mode in choice.modes if found[mode].works]

    with busy:
        one = _timed(network, {mode: found[mode] for mode in works}, choice.repetitions, choice.device, say)
    opacus_modes = [mode for mode in works if MODES[mode].by_opacus]
    best = min(opacus_modes, key=lambda mode: statistics.median(one[mode]), default=None)
    long = [mode for mode in works if choice.all_eight or mode == best or not MODES[mode].by_opacus]
    with busy:
        eight = _timed(network, {mode: found[mode] for mode in long}, choice.few, choice.device, say, batches=EIGHT)

    memory: dict[str, int | None] = {}
    for mode in works if choice.memory else ():
        say(f"{network.name}: {MODES[mode].title}, memory")
        memory[mode] = dp_memory.extra(network.name, mode, rewritten=found[mode].rewritten, device=choice.device)
    rows = [_row(network.name, mode, found[mode], one, eight, memory) for mode in choice.modes]
    all_tried = all(name in choice.modes for name, mode in MODES.items() if mode.by_opacus)
    faster = statistics.median(_ratios(one[best], one["ours"])) if best and all_tried and "ours" in one else None
    return rows, faster


def usable(network: Network, mode: str, device: str) -> Usable:
    """Try `mode` on the network as it is, then rewritten for Opacus; compare its clipped sum with single records'."""
    refused = ""
    for rewritten in (False, True):
        if rewritten and not (MODES[mode].by_opacus and network.rewritten):
            continue
        try:
            off = difference(network, mode, rewritten=rewritten, device=device)
        except Exception as error:  # whatever a mode raises is what its users get
            refused = refused or f"raises: {_first_words(error)}"
            continue
        if not off <= AGREEMENT:
            return Usable(False, rewritten, off, f"not timed: its clipped sum is wrong by {off:.1e}")
        return Usable(True, rewritten, off, f"rewritten (as it is {refused})" if rewritten else "")
    return Usable(False, note=refused)


def _first_words(error: Exception, most: int = 60) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."


def _timed(
    network: Network, found: dict[str, Usable], repetitions: int, device: str, say: Callable[[str], None], *, batches: int = 1
) -> Times:
    """Seconds of each step of each mode; A B A B."""
    steps: dict[str, Step] = {}
    for mode, how in found.items():
        say(f"{network.name}: {MODES[mode].title}, warming up")
        model = network.for_opacus() if how.rewritten else network.model()
        steps[mode] = make(network, mode, network.batch().to(device), model=model, batches=batches)
        for _ in range(_WARM if batches == 1 else 1):
            steps[mode]()
    times: Times = {mode: [] for mode in steps}
    for repetition in range(repetitions):
        say(f"{network.name}: {batches} physical a step, repetition {repetition + 1} of {repetitions}")
        for mode, step in steps.items():
            times[mode].append(_seconds(step, device))
    return times


def _seconds(call: Callable[[], Any], device: str) -> float:
    """Processor time on a CPU, which other programs hardly touch; on CUDA wall time until the device is done."""
    if device == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _row(network: str, mode: str, how: Usable, one: Times, eight: Times, memory: dict[str, int | None]) -> Row:
    if not how.works:
        return Row(network, mode, works=False, note=how.note, difference=how.difference)
    ratios = _ratios(one[mode], one["sgd"])
    used, plain = memory.get(mode), memory.get("sgd")
    return Row(
        network=network,
        mode=mode,
        works=True,
        note=how.note,
        difference=how.difference,
        one=1e3 * statistics.median(one[mode]),
        one_ratio=statistics.median(ratios),
        one_spread=_quartiles(ratios),
        eight=1e3 * statistics.median(eight[mode]) if mode in eight else None,
        eight_ratio=statistics.median(_ratios(eight[mode], eight["sgd"])) if mode in eight else None,
        memory=used,
        memory_ratio=used / plain if used is not None and plain else None,
    )


def _ratios(one: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def noise_ratio(repetitions: int, device: str) -> tuple[float, float, float]:
    """Nanoseconds a value of `torch.normal` and of ours, and the median of their ratio."""
    coins, sums = OsCoins(), torch.zeros(_DRAWN, device=device)
    ways = {
        "torch": lambda: torch.normal(0.0, 1.0, (_DRAWN,), device=device),
        "ours": lambda: coins.add_normal(sums, scale=1.0),
    }
    times: Times = {who: [] for who in ways}
    for repetition in range(repetitions + 1):
        for who, draw in ways.items():
            seconds = _seconds(draw, device)
            if repetition:  # the first draw warms up
                times[who].append(seconds)
    torchs, ours = (1e9 * statistics.median(times[who]) / _DRAWN for who in ways)
    return torchs, ours, statistics.median(_ratios(times["ours"], times["torch"]))


def verdicts(network: Network, rows: list[Row], faster: float | None) -> list[Verdict]:
    """Every target of one network."""
    nothing = Row(network.name, "ours", works=False, note="")
    ours = next((row for row in rows if row.mode == "ours"), nothing)
    limits = (
        ("one physical batch", network.one, ours.one_ratio),
        (f"logical = {EIGHT} physical", network.eight, ours.eight_ratio),
        ("extra peak memory", MEMORY, ours.memory_ratio),
    )
    found = [_at_most(network.name, what, limit, value) for what, limit, value in limits]
    wanted = f">= {network.faster:.1f} x faster"
    met = None if faster is None else faster >= network.faster
    return [*found, Verdict(network.name, "beside Opacus' fastest mode", wanted, faster, met)]


def _at_most(network: str, what: str, limit: float, value: float | None) -> Verdict:
    return Verdict(network, what, f"<= {limit:.2f} x plain", value, None if value is None else value <= limit)


def _shown(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _printed(console: Console, network: Network, rows: list[Row]) -> None:
    title = f"{network.name}: {network.title}, {network.batch_size} records a physical batch"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    columns = ("ms", "x plain", "quartiles", f"ms, {EIGHT}", f"x plain, {EIGHT}", "extra MiB", "x plain", "difference")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        spread = "-" if row.one_spread is None else "{:.2f}-{:.2f}".format(*row.one_spread)
        table.add_row(
            MODES[row.mode].title + ("*" if row.note else ""),
            *(_shown(row.one, ".1f"), _shown(row.one_ratio), spread),
            *(_shown(row.eight, ".1f"), _shown(row.eight_ratio)),
            *(_shown(row.memory and row.memory / 2**20, ".0f"), _shown(row.memory_ratio), _shown(row.difference, ".0e")),
        )
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"  * {MODES[row.mode].title}: {row.note}", highlight=False, markup=False)
    console.print()


def _targets(found: list[Verdict], doubt: str) -> Table:
    title = "Targets" + (f" ({doubt})" if doubt else "")
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name in ("", "", "wanted", "measured", ""):
        table.add_column(name, no_wrap=True)
    for verdict in found:
        unjudged = "not measured" if verdict.measured is None else "not judged"
        word = {None: unjudged, True: "met", False: "MISSED"}[verdict.met]
        table.add_row(verdict.network, verdict.what, verdict.wanted, _shown(verdict.measured), word)
    return table


def _named(text: str, known: dict[str, Any]) -> list[str]:
    """The names in `text`, in their usual order."""
    asked = [name.strip() for name in text.split(",")]
    for name in asked:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
    return [name for name in known if name in asked]


def main(
    networks: str = typer.Option(",".join(NETWORKS), help="Networks, separated by commas."),
    modes: str = typer.Option(",".join(MODES), help="Ways to train, separated by commas; plain SGD is always among them."),
    repetitions: int = typer.Option(7, min=1, help="Repetitions of one physical batch; half as many of eight."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    quick: bool = typer.Option(False, "--quick", help="Two repetitions, no memory, targets not judged."),
    all_eight: bool = typer.Option(
        False, "--all-eight", help="Eight physical batches in every mode of Opacus, not only its fastest."
    ),
    json_file: Path | None = typer.Option(None, "--json", help="Write all figures to this file as well."),
) -> None:
    """What privacy costs in time and memory, beside plain SGD and Opacus."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"device {device!r} is none of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device")
    torch.set_num_threads(1)
    keep_memory()  # as a site does; every mode gains by it
    warnings.simplefilter("ignore")  # Opacus and torch warn of their own hooks in every mode
    choice = Choice(
        networks=_named(networks, NETWORKS),
        modes=_named("sgd," + modes, MODES),
        repetitions=2 if quick else repetitions,
        device=device,
        memory=not quick,
        all_eight=all_eight,
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    about = _about(device)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows: list[Row] = []
    judged: list[Verdict] = []
    busy = Busy()
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        line = bar.add_task("starting", total=None)

        def say(text: str) -> None:
            bar.update(line, description=text)

        for name in choice.networks:
            of_one, faster = measured(NETWORKS[name], choice, busy, say)
            _printed(console, NETWORKS[name], of_one)
            rows += of_one
            judged += verdicts(NETWORKS[name], of_one, faster)
        say("noise")
        with busy:
            torchs, ours, ratio = noise_ratio(choice.repetitions, device)
    others = busy.cores
    judged.append(Verdict("all", "secure noise", f"<= {NOISE:.2f} x torch.normal", ratio, ratio <= NOISE))
    doubt = "--quick: too few repetitions to judge" if quick else "" if device == "cpu" else "they are for one thread of a CPU"
    if doubt:
        judged = [replace(verdict, met=None) for verdict in judged]
    console.print(_targets(judged, doubt))
    console.print(f"secure noise: {ours:.1f} ns a value, torch.normal {torchs:.1f}: {ratio:.2f} x")
    console.print(_told(others))
    if json_file:
        everything = {"about": about, "repetitions": choice.repetitions, "others": others, "doubt": doubt}
        tables = {"rows": [asdict(row) for row in rows], "targets": [asdict(verdict) for verdict in judged]}
        noise = {"torch_ns": torchs, "ours_ns": ours, "ratio": ratio}
        json_file.write_text(json.dumps({**everything, **tables, "noise": noise}, indent=1) + "\n")


def _about(device: str) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, 1 thread of {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opacus": opacus.__version__,
    }


def _told(others: float | None) -> str:
    if others is None:
        return "how busy the machine was: not measured"
    warning = "; repeat on a calm machine before quoting" if others > _BUSY else ""
    return f"other programs kept {others:.2f} cores busy meanwhile{warning}"


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
