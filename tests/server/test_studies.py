"""Whoever serves: the queue, processes that die and are started again, wishes, and what is left when it goes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rosters import PLAN, Consortium, a_study
from wardround.common.agreement import SignedStudy
from wardround.common.errors import LinkRefused
from wardround.server.network import studies as module
from wardround.server.network.link import Ticket
from wardround.server.network.shelf import FINISHED, RUNNING, STOPPED, WAITING, Shelf, Status, StudyFolder
from wardround.server.network.studies import Studies
from wardround.server.network.study import Orders

# a study's process in miniature: reads its orders, then does what the file `do` says
CHILD = """
import json, pathlib, sys, time
orders = json.loads(sys.stdin.readline())
folder = pathlib.Path(orders["folder"])
with (folder / "began").open("a") as began:
    began.write(str(orders["ticket"]["run_id"]) + "\\n")
do = (folder / "do").read_text()
status = json.loads((folder / "status.json").read_text())


def write(changed):
    (folder / "draft").write_text(json.dumps(changed))
    (folder / "draft").replace(folder / "status.json")


if do == "finish":
    write(status | {"state": "finished"})
if do == "one round":
    write(status | {"round": status["round"] + 1})
if do == "stay":
    time.sleep(60)
sys.exit(0 if do == "finish" else 9)
"""


class Link:
    """Flower's server, as far as studies see it."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.beaten: list[int] = []
        self.alive = True
        self.refuses = ""

    def begin_run(self, settings: dict[str, str]) -> Ticket:
        assert SignedStudy.parse(settings["signatures"]).text == settings["plan"]
        if self.refuses:
            raise LinkRefused(self.refuses)
        self.begun.append(len(self.begun) + 1)
        return Ticket(self.begun[-1], self.begun[-1], "token")

    def keep_alive(self, ticket: Ticket) -> bool:
        self.beaten.append(ticket.run_id)
        return self.alive

    def end_run(self, run_id: int) -> None:
        self.ended.append(run_id)


class Ward:
    """A shelf of studies, and somebody who looks after them."""

    def __init__(self, folder: Path, at_once: int) -> None:
        self.folder, self.link, self.shelf = folder, Link(), Shelf(folder / "state")
        self.coordinator = Consortium(folder / "public", ("coordinator",)).signers["coordinator"]
        self.asked = 0
        self.children: list[subprocess.Popen[str]] = []
        self.commands: list[list[str]] = []
        self.studies = self.opened(at_once)

    def opened(self, at_once: int) -> Studies:
        link: Any = self.link
        return Studies(self.shelf, link, config=self.folder / "coordinator.toml", port=1, at_once=at_once)

    def popen(self, command: list[str], **more: Any) -> subprocess.Popen[str]:
        self.commands.append(command)
        if "wardround.server.network.study" not in command:  # the report of a study that was stopped
            command = [sys.executable, "-c", ""]
        else:
            command = [sys.executable, "-S", "-E", "-c", CHILD]
        self.children.append(subprocess.Popen(command, **more))
        return self.children[-1]

    def start(self, name: str, do: str) -> StudyFolder:
        study = a_study(PLAN.replace('"heart"', f'"{name}"'))
        folder = self.shelf.put(name, study.digest, SignedStudy.sign(study, self.coordinator).to_text())
        (folder.path / "do").write_text(do)
        folder.want("run")
        self.asked += 1
        os.utime(folder.path / "wish", (self.asked, self.asked))
        return folder

    def until(self, done: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline
            self.studies.look_after()
            time.sleep(0.02)

    def began(self, folder: StudyFolder) -> int:
        path = folder.path / "began"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ward]]:
    wards: list[Ward] = []

    def make(at_once: int = 1) -> Ward:
        ward = Ward(tmp_path, at_once)
        names = SimpleNamespace(
            Popen=ward.popen, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
        )
        monkeypatch.setattr(module, "subprocess", names)
        wards.append(ward)
        return ward

    yield make
    for ward in wards:
        ward.studies.close()
        for child in ward.children:
            child.kill()
            child.wait()


def state(folder: StudyFolder) -> tuple[str, str]:
    assert folder.status is not None
    return folder.status.state, folder.status.why


def test_studies_run_one_after_another_in_the_order_they_were_asked_for(opened: Callable[..., Ward]):
    ward = opened()
    folders = [ward.start(name, "finish") for name in ("c", "a", "b")]
    ward.studies.look_after()
    assert len(ward.link.begun) == 1
    ward.until(lambda: all(state(folder)[0] == FINISHED for folder in folders))
    assert [(folder.path / "began").read_text().strip() for folder in folders] == ["1", "2", "3"]
    ward.until(lambda: ward.link.ended == [1, 2, 3])


def test_as_many_run_side_by_side_as_the_coordinator_allows(opened: Callable[..., Ward]):
    ward = opened(2)
    folders = [ward.start(name, "stay") for name in ("a", "b", "c")]
    ward.until(lambda: ward.began(folders[0]) == ward.began(folders[1]) == 1)
    ward.studies.look_after()
    assert len(ward.link.begun) == 2
    folders[0].want("stop")
    ward.until(lambda: ward.began(folders[2]) == 1)
    assert state(folders[0]) == (STOPPED, "the operator stopped it")


def test_a_process_that_dies_is_started_again_under_a_new_run(opened: Callable[..., Ward]):
    ward = opened()
    folder = ward.start("a", "die")
    ward.until(lambda: ward.began(folder) == 2)
    (folder.path / "do").write_text("finish")
    ward.until(lambda: state(folder)[0] == FINISHED)
    ward.until(lambda: ward.link.ended == ward.link.begun)


def test_one_that_dies_five_times_in_a_round_is_stopped_with_the_reason(opened: Callable[..., Ward]):
    ward = opened()
    folder = ward.start("a", "die")
    ward.until(lambda: state(folder)[0] == STOPPED)
    assert ward.began(folder) == 5
    assert state(folder)[1].startswith("its process ended 5 times in round 1; see errors.txt in ")
    ward.studies.look_after()
    assert len(ward.link.begun) == 5


def test_one_that_gets_a_round_further_each_time_is_not(opened: Callable[..., Ward]):
    ward = opened()
    folder = ward.start("a", "one round")
    ward.until(lambda: ward.began(folder) >= 7)
    assert state(folder)[0] != STOPPED


def test_a_stop_ends_the_process_and_leaves_a_report(opened: Callable[..., Ward]):
    ward = opened()
    folder = ward.start("a", "stay")
    ward.until(lambda: ward.began(folder) == 1)
    folder.want("stop")
    began = time.monotonic()
    ward.studies.look_after()
    assert time.monotonic() - began < 8
    assert state(folder) == (STOPPED, "the operator stopped it")
    assert ward.children[0].poll() is not None
    assert ward.commands[-1][1:5] == ["-m", "wardround", "report", "a"]
    assert ward.link.ended == [1]


def test_a_stop_said_while_nobody_served_counts(opened: Callable[..., Ward]):
    ward = opened()
    folder = ward.start("a", "finish")
    assert folder.status is not None
    folder.write(replace(folder.status, state=RUNNING, connected=["va"]))  # as a kill -9 leaves it
    folder.want("stop")
    ward.studies.look_after()
    assert state(folder) == (STOPPED, "the operator stopped it")
    assert ward.link.begun == []


def test_whoever_goes_leaves_studies_waiting_and_the_next_one_goes_on(opened: Callable[..., Ward]):
    ward = opened(2)
    folders = [ward.start(name, "stay") for name in ("a", "b")]
    ward.until(lambda: all(ward.began(folder) == 1 for folder in folders))
    for folder in folders:
        assert folder.status is not None
        folder.write(replace(folder.status, state=RUNNING, round=3, connected=["va"]))
    ward.studies.close()
    assert [state(folder) for folder in folders] == [(WAITING, "")] * 2
    assert all(folder.status and folder.status.round == 3 and not folder.status.connected for folder in folders)
    assert all(child.poll() is not None for child in ward.children)
    assert sorted(ward.link.ended) == [1, 2]
    ward.studies = ward.opened(2)
    ward.until(lambda: all(ward.began(folder) == 2 for folder in folders))


def test_runs_are_kept_alive_and_begun_anew_when_flower_has_ended_them(
    opened: Callable[..., Ward], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.0)
    ward = opened()
    folder = ward.start("a", "stay")
    ward.until(lambda: ward.began(folder) == 1)
    ward.studies.look_after()
    assert ward.link.beaten[-1] == 1
    ward.link.alive = False
    ward.studies.look_after()
    ward.link.alive = True
    ward.until(lambda: ward.began(folder) == 2)
    assert 1 in ward.link.ended
    assert state(folder)[0] == WAITING


def test_a_study_that_cannot_be_begun_is_stopped_with_the_reason(opened: Callable[..., Ward]):
    ward = opened()
    ward.link.refuses = "Flower did not begin the run"
    refused = ward.start("a", "finish")
    ward.studies.look_after()
    assert state(refused) == (STOPPED, "Flower did not begin the run")
    ward.link.refuses = ""
    damaged = ward.start("b", "finish")
    damaged.signed.write_text("no study")
    ward.studies.look_after()
    assert state(damaged)[0] == STOPPED


def test_a_study_that_cannot_be_read_holds_up_no_other(opened: Callable[..., Ward]):
    ward = opened()
    broken, good = ward.start("a", "finish"), ward.start("b", "finish")
    (broken.path / "status.json").write_text("{")
    ward.until(lambda: state(good)[0] == FINISHED)


def test_a_process_that_cannot_be_started_leaves_no_run_behind(opened: Callable[..., Ward], monkeypatch: pytest.MonkeyPatch):
    ward = opened()
    folder = ward.start("a", "finish")

    def no_memory(*given: object, **more: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(module.subprocess, "Popen", no_memory)
    with pytest.raises(OSError, match="memory"):
        ward.studies.look_after()
    assert ward.link.ended == ward.link.begun == [1]
    assert state(folder)[0] == WAITING
    monkeypatch.setattr(module.subprocess, "Popen", ward.popen)
    ward.until(lambda: state(folder)[0] == FINISHED)


def test_a_process_that_is_dead_before_it_reads_takes_nobody_with_it(
    opened: Callable[..., Ward], monkeypatch: pytest.MonkeyPatch
):
    ward = opened()
    folder = ward.start("a", "finish")

    def dead(command: list[str], **more: Any) -> subprocess.Popen[str]:
        child = subprocess.Popen(["true"], **more)
        ward.children.append(child)
        child.wait()
        return child

    monkeypatch.setattr(module.subprocess, "Popen", dead)
    ward.studies.look_after()
    monkeypatch.setattr(module.subprocess, "Popen", ward.popen)
    ward.until(lambda: state(folder)[0] == FINISHED)


def test_orders_come_out_of_the_pipe_as_they_went_in():
    orders = Orders("/folder", "/config", 8444, Ticket(7, 8, "token"))
    assert Orders.parse(orders.text()) == orders
    assert Status("a", "b").state == WAITING
