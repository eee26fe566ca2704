"""Simulation beside a plain PyTorch loop that does the same maths: `python -m benchmarks.simulation`.

Every measurement is a fresh process; the rows of one repetition follow each other, and a ratio is the median over the
repetitions. A run during which other programs kept more than a quarter of a core busy is made again, a few times. Memory
is sampled in a run of its own, which is not timed.

Without privacy both must end with the same model. With it no two runs do, since their noise differs; then both models must
have gone equally far from the first one, which is nearly all noise and so tells its scale, and be equally good on test images.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import flwr
import numpy as np
import safetensors.torch
import torch

from benchmarks.memory import peak
from benchmarks.workloads import SEED, WORKLOADS, Workload, prepare, test_images
from wardround.common.metrics import auroc
from wardround.common.tasks import TASKS, ImageSchema
from wardround.common.weights import Weights, trainable

ROOT = Path(__file__).parents[1]
ROWS = {"plain": "plain loop", "1": "wardround, 1 process", "2": "wardround, 2 processes"}
TARGETS = {  # steady round over the plain loop's: 1 process, 2 processes; GB at the peak
    "W1": (1.10, 0.65, 0.8),
    "W2": (1.25, 0.65, 0.8),
    "W3": (1.15, 0.65, 0.8),
    "W4": (1.20, 0.75, 1.1),
}
FIRST_ROUND = 2.5  # seconds, process start included
AGREEMENT = 1e-5
AGREEMENT_NOISED = 0.02  # of how far the models went; two runs of the same loop differ by 0.004 or so
AGREEMENT_AUC = 0.03
_CALM = 0.25  # cores other programs may use during a run
_PATIENCE = 10.0  # seconds to wait for a calm moment before a run


@dataclass(frozen=True)
class Run:
    """What one process told: the moment each round was done, and the model it ended with."""

    marks: list[float]
    cpu: list[float]  # processor time of the process itself by then
    model: dict[str, torch.Tensor]
    peak: int
    others: float  # cores that other programs used meanwhile

    @property
    def first(self) -> float:
        """Seconds from the start of the process to the end of the first round."""
        return self.marks[0]

    @property
    def steady(self) -> float:
        """Seconds of a round; the first one (warming up) and the last one (its checkpoint is written) do not count."""
        return steady(self.marks)

    @property
    def busy(self) -> float:
        """Processor time of a round, in seconds, of the first process alone."""
        return steady(self.cpu)

    @property
    def fastest(self) -> float:
        """Seconds of the fastest of these rounds."""
        return min(after - before for before, after in pairwise(self.marks[:-1]))


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds, memory in bytes."""

    workload: str
    who: str
    steady: float
    ratio: float
    fastest: float  # ratio of the fastest rounds of all repetitions: what a busy machine spoils least
    cpu: float | None  # ratio of processor time; None where processes share the work
    first: float
    peak: int
    others: float
    difference: float
    auc: float | None  # on the test images; None without privacy, or where the images are not at hand
    target: float | None

    @property
    def line(self) -> str:
        """As it is printed."""
        wanted = "" if self.target is None else f" (<= {self.target:.2f})"
        return (
            f"{self.workload:3} {ROWS[self.who]:23} {1e3 * self.steady:8.1f} {f'{self.ratio:.2f}{wanted}':>18} "
            f"{self.fastest:8.2f} {_shown(self.cpu, '.2f'):>5} {self.first:8.2f} {self.peak / 1e6:9.0f} {self.others:7.2f} "
            f"{self.difference:10.1e} {_shown(self.auc, '.3f'):>6}"
        )


HEADER = (
    f"{'':3} {'':23} {'ms/round':>8} {'x plain':>18} {'fastest':>8} {'cpu':>5} {'first s':>8} "
    f"{'peak MB':>9} {'others':>7} {'difference':>10} {'AUC':>6}"
)


def measured(work: Workload, repetitions: int, *, tries: int, memory: bool) -> list[Row]:
    """All rows of one workload."""
    with tempfile.TemporaryDirectory(prefix="wardround-bench-") as name:
        folder = Path(name)
        origin = prepare(work, folder)
        print(f"\n{work.name}: {work.title}; {origin}", flush=True)
        runs: dict[str, list[Run]] = {who: [] for who in ROWS}
        for _ in range(repetitions):
            for who in ROWS:
                runs[who].append(calm_run(who, folder, tries))
        peaks = {who: one_run(who, folder, memory=True).peak if memory else 0 for who in ROWS}
    reference = runs["plain"][0].model
    one, two, _ = TARGETS[work.name]
    targets = {"plain": None, "1": one, "2": two}
    return [
        Row(
            workload=work.name,
            who=who,
            steady=statistics.median(run.steady for run in runs[who]),
            ratio=statistics.median(run.steady / bare.steady for run, bare in zip(runs[who], runs["plain"], strict=True)),
            fastest=min(run.fastest for run in runs[who]) / min(run.fastest for run in runs["plain"]),
            first=statistics.median(run.first for run in runs[who]),
            peak=peaks[who],
            others=statistics.median(run.others for run in runs[who]),
            cpu=None
            if who == "2"
            else statistics.median(a.busy / b.busy for a, b in zip(runs[who], runs["plain"], strict=True)),
            difference=max(difference(work, run.model, reference) for run in runs[who]),
            auc=auc(work, [run.model for run in runs[who]]),
            target=targets[who],
        )
        for who in ROWS
    ]


def calm_run(who: str, folder: Path, tries: int) -> Run:
    """One run while the machine is ours; the calmest of a few where it never is."""
    runs: list[Run] = []
    while len(runs) < tries and (not runs or min(run.others for run in runs) > _CALM):
        if tries > 1:
            _wait_for_calm()
        runs.append(one_run(who, folder))
    return min(runs, key=lambda run: run.others)


def one_run(who: str, folder: Path, *, memory: bool = False) -> Run:
    """One process from start to end."""
    with tempfile.TemporaryDirectory(prefix="out-", dir=folder) as name:
        out = Path(name)
        for ledger in folder.glob("sites/*/state"):  # the last run's; every run begins with its budget whole
            shutil.rmtree(ledger)
        command = [sys.executable, "-m", "benchmarks.one_run", who, str(folder), str(out)]
        busy, own, began = _busy(), _own(), time.time()
        process = subprocess.Popen([*command, repr(began)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        highest = peak(process) if memory else 0
        if process.wait():
            raise SystemExit(f"{' '.join(command)} failed")
        others = max(0.0, (_busy() - busy - (_own() - own)) / (time.time() - began))
        marks = json.loads((out / "marks.json").read_text())
        return Run(
            marks["wall"], marks["cpu"], safetensors.torch.load((out / "model.safetensors").read_bytes()), highest, others
        )


def _wait_for_calm() -> None:
    """Return after a second in which nobody else worked, or after `_PATIENCE` seconds."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        before = _busy()
        time.sleep(1)
        if _busy() - before < _CALM / 2:
            return


def _busy() -> float:
    """Seconds all cores together have worked since the machine started."""
    fields = Path("/proc/stat").read_text().split()[1:]
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Seconds this process and its ended children have worked."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def rounds_of_four() -> float:
    """Milliseconds of a round of the shipped four-hospital study without privacy."""
    from benchmarks.one_run import wardround
    from wardround.simulations import STUDIES
    from wardround.simulations.scenario import Changes, Scenario

    with tempfile.TemporaryDirectory(prefix="wardround-bench-") as name:
        folder = Path(name) / "run"
        Scenario.prepare(STUDIES / "heart-disease.toml", folder, Changes(without_privacy=True, rounds=200))
        marks = wardround(folder, folder, 1)
    return 1e3 * steady([mark.wall for mark in marks])


def steady(marks: list[float]) -> float:
    """The median time between two marks, the first and the last round left out."""
    return statistics.median(after - before for before, after in pairwise(marks[:-1]))


def misses(rows: list[Row]) -> list[str]:
    """Every target that was not met, in words."""
    found = []
    for row in rows:
        what = f"{row.workload}, {ROWS[row.who]}"
        private = WORKLOADS[row.workload].privacy is not None
        if row.difference > (AGREEMENT_NOISED if private else AGREEMENT):
            found.append(f"{what}: the final model differs by {row.difference:.1e}")
        plain = next(other for other in rows if other.workload == row.workload and other.who == "plain")
        if row.auc is not None and plain.auc is not None and abs(row.auc - plain.auc) > AGREEMENT_AUC:
            found.append(f"{what}: AUC {row.auc:.3f}, of the plain loop {plain.auc:.3f}")
        if row.target is None:
            continue
        if row.ratio > row.target:
            found.append(f"{what}: {row.ratio:.2f} x plain, wanted {row.target:.2f}")
        if row.first > FIRST_ROUND:
            found.append(f"{what}: first round after {row.first:.2f} s, wanted {FIRST_ROUND}")
        if row.peak > 1e9 * TARGETS[row.workload][2]:
            found.append(f"{what}: {row.peak / 1e9:.2f} GB, wanted {TARGETS[row.workload][2]}")
    return found


def difference(work: Workload, one: Weights, other: Weights) -> float:
    """The largest difference between two numbers; with privacy, of how far the models went, as a share of it."""
    if work.privacy is None:
        return max(float((one[name] - other[name]).abs().max()) for name in other)
    return abs(_way(work, one) / _way(work, other) - 1)


def _way(work: Workload, model: Weights) -> float:
    start = trainable(TASKS[work.task].model({"network": work.network}, SEED))
    return float(torch.cat([(model[name] - start[name]).flatten() for name in start]).double().norm())


def auc(work: Workload, models: list[Weights]) -> float | None:
    """The median area under the ROC curve on the real test images; None without privacy, or without these images."""
    images = test_images()
    if work.privacy is None or images is None:
        return None
    task = TASKS[work.task]
    assert isinstance(task.schema, ImageSchema)
    image, label = images
    records = task.schema.encode_arrays(image, label, [str(number) for number in range(len(label))])
    model = task.model({"network": work.network}, SEED)
    return float(np.median([auroc(task.scores(model, weights, records)) for weights in models]))


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, separated by commas")
    parser.add_argument("--reps", type=int, default=3, help="repetitions")
    parser.add_argument("--tries", type=int, default=3, help="how often a run is made, at most, until the machine is calm")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--no-memory", action="store_true", help="leave out the runs that sample memory")
    parser.add_argument("--rounds-of-four", action="store_true", help="time the four-hospital study instead")
    asked = parser.parse_args()
    if asked.rounds_of_four:
        print(f"a round of four hospitals: {rounds_of_four():.2f} ms (target: below 60)")
        return
    versions = {"python": platform.python_version(), "torch": torch.__version__, "flwr": flwr.__version__}
    print(f"{os.cpu_count()} cores, 1 thread a process; " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    rows: list[Row] = []
    for name in asked.only.split(","):
        rows += measured(WORKLOADS[name], asked.reps, tries=asked.tries, memory=not asked.no_memory)
        print(HEADER, *(row.line for row in rows if row.workload == name), sep="\n", flush=True)
    missed = misses(rows)
    print("\n" + ("\n".join(f"missed: {line}" for line in missed) or "every target is met"))
    if asked.json:
        table = {"versions": versions, "cores": os.cpu_count(), "repetitions": asked.reps, "rows": [asdict(r) for r in rows]}
        asked.json.write_text(json.dumps({**table, "missed": missed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
