"""A study under fire: `python -m benchmarks.soak --rounds 100 --sites 6 --kill-every 5`.

Every so many seconds one process is killed with SIGKILL, a hospital, the coordinator or the study's own, and started again
where nobody else does that. At the end the study must be finished, with every round once; every ledger must hold and have
charged no round that it was not asked for; every audit log must hold; and no process may be left.

The consortium is founded with the tests' own lab, so this runs in a checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from wardround.client.ledger import PrivacyLedger
from wardround.common.plan import SignedText, StudyPlan
from wardround.server.checkpoint import Progress
from wardround.server.network.shelf import FINISHED, STOPPED
from wardround.simulations import STUDIES
from wardround.simulations.scenario import Changes, Scenario

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

if TYPE_CHECKING:
    from lab import Lab


def main() -> None:
    """Soak, print what happened, and exit with 1 if anything was not as it must be."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=100)
    options.add_argument("--sites", type=int, default=6)
    options.add_argument("--kill-every", type=float, default=5.0, help="seconds, on average")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--most-seconds", type=float, default=3600.0)
    options.add_argument("--json", type=Path, help="write the figures there, too")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        found = soak(Path(folder), given.rounds, given.sites, given.kill_every, given.seed, given.most_seconds)
    text = json.dumps(found, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")
    sys.exit(1 if found["wrong"] else 0)


def soak(folder: Path, rounds: int, sites: int, every: float, seed: int, most: float) -> dict[str, Any]:
    """One study under fire; what happened, and under "wrong" what should not have."""
    from lab import lab

    scenario = Scenario.prepare(STUDIES / "heart-disease.toml", folder / "run", Changes(sites=sites, partition="iid"))
    table = tomllib.loads(scenario.study.text) | {"name": "soak", "rounds": rounds, "min_sites": 2, "deadline_seconds": 300.0}
    text = tomli_w.dumps(table)
    study = SignedText(StudyPlan.parse(text), text)
    for path in scenario.sites.values():
        site = tomllib.loads(path.read_text())
        site["allow"] |= {"studies": ["soak"], "epsilon_per_study": 10.0, "epsilon_lifetime": 10.0}
        path.write_text(tomli_w.dumps(site))
    with lab(folder / "lab", scenario.sites) as there:
        there.serve()
        there.join()
        there.start(there.sign(study, approve=[]))
        began = time.monotonic()
        kills = _under_fire(there, random.Random(seed), every, began + most)
        seconds = time.monotonic() - began
        time.sleep(3)
        for name in list(there.processes):
            there.kill(name, signal.SIGTERM)
        wrong, facts = _examined(there, study)
        leftovers = _alive(folder)
    if leftovers:
        wrong.append(f"processes are left: {leftovers}")
    return {"seconds": round(seconds, 1), "kills": kills, **facts, "wrong": wrong}


def _under_fire(there: Lab, chance: random.Random, every: float, until: float) -> dict[str, int]:
    """Kill until the study is over; how often whom."""
    kills, last = {"site": 0, "serve": 0, "study": 0}, -1
    due = time.monotonic() + every
    while time.monotonic() < until:
        if there.status("soak").state in (FINISHED, STOPPED):
            break
        time.sleep(0.1)
        if time.monotonic() < due:
            continue
        what = chance.choice(("site", "site", "serve", "study"))
        if what == "site":
            site = chance.choice(sorted(there.sites))
            there.kill(site)
            there.join(site)
        elif what == "serve":
            there.kill("serve")
            there.serve()
        else:
            log = (there.folder / "coordinator" / "coordinator.log").read_text()
            numbers = re.findall(r"study soak: process (\d+)$", log, re.MULTILINE)
            if not numbers or not _is_study(int(numbers[-1])) or there.status("soak").round == last:
                continue  # one that dies five times without a round between is stopped, as it should be
            last = there.status("soak").round
            os.kill(int(numbers[-1]), signal.SIGKILL)
        kills[what] += 1
        print(f"{there.status('soak').round:4d}  killed {what}", file=sys.stderr, flush=True)
        due = time.monotonic() + chance.uniform(0.5, 1.5) * every
    return kills


def _examined(there: Lab, study: SignedText) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with what the study left behind, and its figures."""
    from lab import wardround

    wrong, status = [], there.status("soak")
    if status.state != FINISHED:
        wrong.append(f"the study is {status.state} in round {status.round}: {status.why}")
    progress = Progress.latest(there.shelf.study("soak").path / "checkpoints", study=study.digest)
    history = progress.history if progress else ()
    if [record.round for record in history] != list(range(1, study.plan.rounds + 1)):
        wrong.append(f"rounds are missing, or there twice: {[record.round for record in history]}")
    dropped: dict[str, int] = {}
    for record in history:
        for why in record.dropped.values():
            dropped[why] = dropped.get(why, 0) + 1
    for site, path in there.sites.items():
        state = path.parent / "state"
        with PrivacyLedger(state / "ledger.sqlite") as ledger:
            ledger.verify()
            marked = sum(account.marked for account in ledger.accounts() if account.study == study.digest)
        took_part = sum(site in record.sites for record in history)
        if not took_part <= marked <= study.plan.rounds:
            wrong.append(f"{site} took part in {took_part} rounds and was charged for {marked} of {study.plan.rounds}")
    for log in there.folder.parent.rglob("audit.jsonl"):
        try:
            wardround("audit-log", "verify", log)
        except AssertionError as error:
            wrong.append(f"{log.relative_to(there.folder.parent)}: {error}")
    lost = sum(record.lost for record in history)
    whole = sum(len(record.sites) == len(there.sites) for record in history)
    return wrong, {"rounds": len(history), "lost": lost, "with_all_sites": whole, "dropped": dropped}


def _is_study(number: int) -> bool:
    try:
        return b"wardround.server.network.study" in Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return False


def _alive(folder: Path) -> list[str]:
    """Command lines of processes that work in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = path.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            files = [str(link.readlink()) for link in path.joinpath("fd").iterdir()]
        except OSError:
            continue
        if path.name != str(os.getpid()) and (str(folder) in words or any(file.startswith(str(folder)) for file in files)):
            found.append(words[:100])
    return found


if __name__ == "__main__":
    main()
