"""Whoever serves looks after the studies: starts the next, starts again what was killed, ends what is no longer wanted."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from wardround.common.agreement import SignedStudy
from wardround.common.errors import WardroundError
from wardround.server.network.link import SuperLink, Ticket
from wardround.server.network.shelf import FINISHED, STOPPED, WAITING, Shelf, Status, StudyFolder
from wardround.server.network.study import Orders

_BEAT_SECONDS = 10.0  # Flower takes a run for dead after 60
_MOST_DEATHS = 5  # of a study's process in a row without a finished round between; then something is wrong with it
_GRACE_SECONDS = 8.0

log = logging.getLogger("wardround.coordinator")


def _begun(folder: StudyFolder, orders: Orders) -> subprocess.Popen[str]:
    """A study's process, told its orders; raises `OSError` where it cannot be started."""
    with (folder.path / "errors.txt").open("a") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "wardround.server.network.study"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            text=True,
        )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it is dead already, which is seen soon
        child.stdin.write(orders.text() + "\n")
        child.stdin.flush()
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    return child


@dataclass
class _Process:
    """A study's process."""

    folder: StudyFolder
    ticket: Ticket
    child: subprocess.Popen[str]
    beaten: float = field(default_factory=time.monotonic)


class Studies:
    """All studies that are under way.

    Args:
        shelf: where they lie.
        link: Flower's server.
        config: the coordinator's file, for the studies' processes.
        port: of the loopback listener.
        at_once: how many may run side by side.
    """

    def __init__(self, shelf: Shelf, link: SuperLink, *, config: Path, port: int, at_once: int) -> None:
        self._shelf, self._link, self._config, self._port, self._at_once = shelf, link, config, port, at_once
        self._running: dict[str, _Process] = {}
        self._reports: list[subprocess.Popen[bytes]] = []  # that are being written
        self._deaths: dict[str, tuple[int, int]] = {}  # study -> (its round then, deaths there)
        self._unreadable: dict[str, str] = {}  # study -> what was said of its status

    def look_after(self) -> None:
        """Do what is due; called again and again."""
        self._reports = [report for report in self._reports if report.poll() is None]
        for name, process in list(self._running.items()):
            if process.child.poll() is not None:
                self._ended(name, process)
            elif process.folder.wish == "stop":
                self._end(name, process, "the operator stopped it")
            elif time.monotonic() - process.beaten > _BEAT_SECONDS:
                process.beaten = time.monotonic()
                if not self._link.keep_alive(process.ticket):
                    log.warning("Flower ended the run of %s; it is begun anew", name)
                    self._end(name, process, "")
        for folder in self._shelf:
            if folder.name in self._running or not self._under_way(folder):
                continue
            if folder.wish == "stop":  # its process was gone before it could be told
                self._note(folder, state=STOPPED, why="the operator stopped it")
            elif folder.wish == "run" and len(self._running) < self._at_once:
                self._start(folder)

    def close(self) -> None:
        """End every process; the next one that serves goes on where they were."""
        for process in self._running.values():
            process.child.terminate()  # all at once, so that they take their time together
        for name, process in list(self._running.items()):
            self._end(name, process, "")

    def _under_way(self, folder: StudyFolder) -> bool:
        try:
            status = folder.status
        except WardroundError as error:
            if self._unreadable.get(folder.name) != str(error):  # once, not twice a second
                log.error("%s", error)
            self._unreadable[folder.name] = str(error)
            return False
        return status is None or status.state not in (FINISHED, STOPPED)

    def _note(self, folder: StudyFolder, *, state: str, why: str) -> None:
        folder.write(replace(folder.status or Status(folder.name, ""), state=state, why=why, connected=[]))

    def _start(self, folder: StudyFolder) -> None:
        try:
            signed = SignedStudy.load(folder.signed)
            ticket = self._link.begin_run({"plan": signed.text, "signatures": signed.to_text()})
        except (WardroundError, OSError) as error:
            log.error("study %s cannot be begun: %s", folder.name, error)
            self._note(folder, state=STOPPED, why=str(error))
            return
        try:
            child = _begun(folder, Orders(str(folder.path), str(self._config), self._port, ticket))
        except OSError:  # no memory, a full disk: it is tried again
            self._link.end_run(ticket.run_id)
            raise
        self._running[folder.name] = _Process(folder, ticket, child)
        log.info("study %s: process %d", folder.name, child.pid)

    def _ended(self, name: str, process: _Process) -> None:
        del self._running[name]
        self._link.end_run(process.ticket.run_id)
        status, code = process.folder.status, process.child.returncode
        if status is None or status.state in (FINISHED, STOPPED):
            log.info("study %s: %s", name, status.state if status else "gone")
            return
        at, deaths = self._deaths.get(name, (-1, 0))
        deaths = deaths + 1 if at == status.round else 1
        self._deaths[name] = (status.round, deaths)
        log.warning("the process of study %s ended with %s; it goes on after round %d", name, code, status.round)
        if deaths >= _MOST_DEATHS:
            why = f"its process ended {deaths} times in round {status.round + 1}; see errors.txt in {process.folder.path}"
            process.folder.write(replace(status, state=STOPPED, why=why))

    def _end(self, name: str, process: _Process, why: str) -> None:
        del self._running[name]
        process.child.terminate()
        try:
            process.child.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.child.kill()
            process.child.wait()
        self._link.end_run(process.ticket.run_id)
        status = process.folder.status
        if status is not None and status.state not in (FINISHED, STOPPED):
            process.folder.write(replace(status, state=STOPPED if why else WAITING, why=why, connected=[]))
            if why:  # in a process of its own: a report needs torch, and whoever serves does not
                command = [sys.executable, "-m", "wardround", "report", name, "--config", str(self._config)]
                self._reports.append(subprocess.Popen(command))
