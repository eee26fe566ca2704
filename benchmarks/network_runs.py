"""The runs that `benchmarks.network` times: a consortium on loopback, each hospital a process, beside stock Flower.

What makes a consortium, and what starts stock Flower, is what the tests use (`tests/lab.py`, `tests/test_live.py`), so what
is timed here is what is tested there.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from wardround.simulations import STUDIES
from wardround.simulations.scenario import Changes, Scenario

_ROOT = Path(__file__).parents[1]
sys.path.append(str(_ROOT / "tests"))

from lab import Lab, free_ports, lab  # noqa: E402

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
_LARGE = [3340, 3340]  # hidden layers of 11.2 million parameters
_SETTLE = 10.0  # seconds until an idle hospital is one
_PATIENCE = 600.0


@dataclass(frozen=True)
class Rounds:
    """Seconds of each round but the first and the last: `whole` between two checkpoints, `beyond` without the training."""

    whole: list[float]
    beyond: list[float]


@dataclass(frozen=True)
class Idle:
    """A hospital that waits: share of one core in percent, resident bytes."""

    cpu: float
    memory: int


def prepared(folder: Path, *, rounds: int, sites: int, large: bool = False) -> Scenario:
    """Heart disease without privacy, for the first `sites` hospitals, with a network of 45 MB if `large`."""
    table = tomllib.loads((STUDIES / "heart-disease.toml").read_text())
    table.pop("privacy")
    table["sites"] = {name: table["sites"][name] for name in HOSPITALS[:sites]}
    table |= {"rounds": rounds, "min_sites": sites}
    if large:
        table["model"] = {"hidden": _LARGE}
        table["step"] = {"rule": "sgd", "learning_rate": 0.01}
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "asked.toml"
    plan.write_text(tomli_w.dumps(table))
    return Scenario.prepare(plan, folder / "run", Changes())


@contextlib.contextmanager
def consortium(folder: Path, scenario: Scenario) -> Iterator[Lab]:
    """A coordinator that serves and hospitals that have joined, each with a stopwatch."""
    with lab(folder / "lab", scenario.sites) as there:
        there.serve()
        for site, path in scenario.sites.items():
            with (there.folder / f"{site}.out.log").open("ab") as out:
                there.processes[site] = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.network_site", str(path)],
                    cwd=_ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )  # fmt: skip
        yield there


def timed(there: Lab, scenario: Scenario) -> Rounds:
    """Carry the study out and time its rounds."""
    name = scenario.study.plan.name
    there.start(there.sign(scenario.study))
    marks = _marks(there.shelf.study(name).path / "checkpoints", scenario.study.plan.rounds)
    status = there.wait(name)
    if status.state != "finished":
        raise SystemExit(f"the study did not finish: {status.why}\n{there.logs()}")
    training = [_training(path.parent / "training.txt") for path in scenario.sites.values()]
    longest = {number: max(times[number] for times in training) for number in training[0]}
    return _rounds(marks, longest)


def stock(folder: Path, scenario: Scenario) -> Rounds:
    """The same study, carried by `flower-superlink`, a `flower-supernode` for each site and `flwr run`."""
    import test_live

    folder.mkdir(parents=True, exist_ok=True)
    with test_live.deployment(folder, scenario) as home:
        test_live.submit(folder, scenario, home)
        return _rounds(_marks(scenario.folder / "checkpoints", scenario.study.plan.rounds), {})


def idle(there: Lab, site: str, seconds: float) -> Idle:
    """What a hospital that has connected costs while nobody wants anything of it."""
    time.sleep(_SETTLE)
    process = Path("/proc") / str(there.processes[site].pid)
    before = _busy(process)
    time.sleep(seconds)
    lines = (process / "status").read_text().splitlines()
    (resident,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))
    return Idle(100 * (_busy(process) - before) / seconds, resident)


def keys(there: Lab) -> tuple[tuple[Path, Path, Path], list[tuple[Path, Path]]]:
    """(certificate, key, authority) of the coordinator, and (certificate, key) of each site."""
    public = there.consortium / "public"
    server = (public / "roster" / "coordinator.tls.crt", there.consortium / "coordinator" / "tls.key", public / "ca.crt")
    states = {site: path.parent / "state" for site, path in there.sites.items()}
    sites = [(state / "trust" / "roster" / f"{site}.tls.crt", state / "keys" / "tls.key") for site, state in states.items()]
    return server, sites


def free_port() -> int:
    """One on loopback."""
    return free_ports(1)[0]


def _rounds(marks: dict[int, float], training: dict[int, float]) -> Rounds:
    """From the moments at which rounds were on disk; the first round warms up, the last one writes the report."""
    counted = sorted(marks.keys() - {0, 1, max(marks)})  # before round 1 there is a checkpoint, too
    whole = {number: marks[number] - marks[number - 1] for number in counted if number - 1 in marks}
    return Rounds(list(whole.values()), [seconds - training.get(number, 0.0) for number, seconds in whole.items()])


def _marks(folder: Path, rounds: int) -> dict[int, float]:
    """When each round's checkpoint appeared, as they appear."""
    found: dict[int, float] = {}
    deadline = time.monotonic() + _PATIENCE
    while rounds not in found:
        if time.monotonic() > deadline:
            raise SystemExit(f"no round {rounds} after {_PATIENCE:g} s in {folder}")
        with contextlib.suppress(FileNotFoundError):
            for path in folder.iterdir():
                if path.name.startswith("round-"):
                    found.setdefault(int(path.stem.removeprefix("round-")), path.stat().st_mtime)
        time.sleep(0.01)
    return found


def _training(notes: Path) -> dict[int, float]:
    return {int(number): float(seconds) for number, seconds in (line.split() for line in notes.read_text().splitlines())}


def _busy(process: Path) -> float:
    fields: list[Any] = (process / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
