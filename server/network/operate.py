"""What an operator does with studies: put them on the shelf, watch them, take the wish back."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from wardround.common.agreement import SignedStudy
from wardround.common.errors import ConfigError, StudyStopped
from wardround.common.files import write_atomically
from wardround.common.trust.roster import Roster
from wardround.server.network.config import CoordinatorConfig
from wardround.server.network.shelf import FINISHED, STOPPED, WAITING, Shelf, Status, StudyFolder

_LOOK_SECONDS = 0.5


def start_study(path: Path, file: Path, *, resume: bool, weights: Path | None = None) -> StudyFolder:
    """Queue a signed study.

    Raises:
        ConfigError: it is finished, had stopped and `resume` is not given, or another plan has its name.
        SignatureRefused: it is not signed as its plan asks.
    """
    config = CoordinatorConfig.load(path)
    signed = SignedStudy.load(file)
    signed.check(Roster(config.trust))
    study = signed.study
    digest = study.plan.model.get("weights")
    if digest is not None and weights is None and not (config.state / "studies" / study.plan.name / "start.weights").exists():
        raise ConfigError(f"study {study.plan.name} starts from public weights ({digest}); --weights FILE says where they are")
    folder = Shelf(config.state).put(study.plan.name, study.digest, signed.to_text())
    if weights is not None:
        write_atomically(folder.weights, weights.read_bytes())  # checked against the plan's digest before it is used
    status = folder.status
    assert status is not None  # `put` wrote one
    if status.state == FINISHED:
        raise ConfigError(f"study {folder.name} is finished; its model lies in {folder.path}")
    if status.state == STOPPED:
        if not resume:
            raise ConfigError(
                f"study {folder.name} stopped after round {status.round} ({status.why}); --resume goes on with it"
            )
        folder.write(replace(status, state=WAITING, why=""))
    folder.want("run")
    return folder


def stop_study(path: Path, name: str) -> None:
    """Say that a study is to end; raises `ConfigError` where there is none of that name."""
    folder = Shelf(CoordinatorConfig.load(path).state).study(name)
    folder.want("stop")
    status = folder.status
    if status is not None and status.state == WAITING and not status.connected:
        folder.write(replace(status, state=STOPPED, why="the operator stopped it"))


def print_status(path: Path, name: str | None, *, as_json: bool) -> None:
    """Print where studies stand."""
    shelf = Shelf(CoordinatorConfig.load(path).state)
    found = [shelf.study(name)] if name else list(shelf)
    known = [status for status in (folder.status for folder in found) if status is not None]
    if as_json:
        print(json.dumps([asdict(status) for status in known], indent=2))
        return
    table = Table("study", "state", "round", "sites there", "since", "why", box=None, pad_edge=False)
    for status in known:
        table.add_row(
            status.study,
            status.state,
            f"{status.round}/{status.rounds or '?'}",
            f"{len(status.connected)}/{len(status.sites) or '?'}",
            f"{max(0.0, time.time() - status.updated):.0f} s",
            status.why or _missing(status),
        )
    console = Console()
    console.print(table if known else "no study yet; `wardround start STUDY.signed` queues one")


def follow_study(folder: StudyFolder) -> None:
    """Print a line a round until the study is over; raises `StudyStopped` where it stopped. Ctrl-C stops only the looking."""
    console, shown, told = Console(highlight=False), 0, ""
    while True:
        status = folder.status
        assert status is not None
        if status.round > shown and status.last:
            console.print(_line(status))
            shown = status.round
        said = f"{status.state} {status.why}".strip()
        if said != told and status.state == WAITING:
            console.print(said)
        told = said
        if status.state == FINISHED:
            console.print(f"finished; the model lies in {folder.path}")
            return
        if status.state == STOPPED:
            raise StudyStopped(status.why)
        time.sleep(_LOOK_SECONDS)


def _line(status: Status) -> str:
    last = status.last
    counted = f"{len(last.get('sites', []))} of {len(status.sites)} sites"
    moved = f"update norm {last['update_norm']:.3g}" if last.get("update_norm") is not None else "lost"
    dropped = "".join(f"; {site}: {why}" for site, why in last.get("dropped", {}).items())
    return f"round {status.round}/{status.rounds}  {last.get('seconds', 0.0):6.1f} s  {counted}  {moved}{dropped}"


def _missing(status: Status) -> str:
    away = [site for site in status.sites if site not in status.connected]
    return f"away: {', '.join(away[:5])}" if away and status.state not in (FINISHED, STOPPED) else ""
