"""Who holds a site's seat, as connections come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import pytest
from flwr.app import Message

from tests.server.conftest import MeddledGrid
from wardround.common.messages import Present
from wardround.server import roll
from wardround.server.roll import Roll, call_the_roll, with_newcomers
from wardround.simulations.scenario import Scenario

Small = Callable[..., Scenario]


class Coming(MeddledGrid):
    """Only `connected` is there; each number answers with the name in `names`, or not at all."""

    def __init__(self, scenario: Scenario, names: dict[int, str]) -> None:
        super().__init__(scenario)
        self.study, self.names, self.connected, self.asked = scenario.study, names, set(names), 0

    def get_node_ids(self) -> list[int]:
        return sorted(self.connected)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            self.asked += 1
            if name := self.names[message.metadata.dst_node_id]:
                replies.append(Message(Present(name, self.study.digest, "", "").pack(), reply_to=message))
        return replies


def at(grid: Coming, known: Roll, connected: set[int]) -> Roll:
    grid.connected = connected
    return with_newcomers(grid, grid.study, "run", known)


def test_a_seat_taken_while_its_site_was_away_comes_back_once_the_other_has_gone(small: Small):
    grid = Coming(small(), {1: "va", 2: "cleveland", 9: "va"})
    grid.connected = {1, 2}
    known = call_the_roll(grid, grid.study, "run")
    assert known.addresses == {"cleveland": 2, "va": 1}
    known = at(grid, known, {2, 9})
    assert known.addresses["va"] == 9
    known = at(grid, known, {1, 2, 9})
    assert known.addresses["va"] == 9  # whoever is connected keeps it
    assert at(grid, known, {1, 2}).addresses["va"] == 1


def test_who_does_not_answer_is_asked_ever_more_rarely_and_may_still_come(small: Small):
    grid = Coming(small(), {1: "va", 2: "cleveland", 7: ""})
    grid.connected = {1, 2}
    known = call_the_roll(grid, grid.study, "run")
    for _ in range(31):
        known = at(grid, known, {1, 2, 7})
    assert grid.asked == 2 + 6  # in rounds 1, 2, 3, 4, 8 and 16
    assert at(grid, known, {1, 2}).addresses == {"cleveland": 2, "va": 1}
    grid.names[7] = "hungarian"  # its other study is over
    assert at(grid, known, {1, 2, 7}).addresses["hungarian"] == 7


class Training(Coming):
    """Its only site is busy for the first questions; what is asked then is answered late, which is never."""

    busy = 2
    leaves = False

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        self.busy -= 1
        if self.busy < 0:
            return super().send_and_receive(messages, timeout=timeout)
        self.asked += len(list(messages))
        time.sleep(timeout or 0)
        self.connected -= {1} if self.leaves else set()
        return []


def test_the_roll_waits_for_a_site_that_trains(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roll, "_SECONDS", 0.02)
    grid = Training(small(), {1: "va"})
    assert call_the_roll(grid, grid.study, "run").addresses == {"va": 1}
    assert grid.asked == 3


def test_the_roll_does_not_wait_for_a_site_that_has_gone(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roll, "_SECONDS", 0.02)
    grid = Training(small(), {1: "va"})
    grid.leaves = True
    assert call_the_roll(grid, grid.study, "run").addresses == {}
    assert grid.asked == 1


def test_the_roll_does_not_wait_longer_than_a_round(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roll, "_SECONDS", 0.02)
    grid = Training(small(), {1: "va"})
    grid.study.plan.__dict__["deadline_seconds"] = 0.05
    grid.busy = 1000
    assert call_the_roll(grid, grid.study, "run").addresses == {}
    assert grid.asked <= 4
