"""A hospital trains in its own hours; an order that comes outside of them is kept."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.client.network import join
from wardround.client.policy import Compute, SiteConfig
from wardround.common.errors import ConfigError

DAY = 24 * 3600.0


def at(clock: str) -> datetime:
    return datetime.fromisoformat(f"2026-11-21T{clock}")


@pytest.mark.parametrize(("hours", "clock", "seconds"), [
    (None, "12:00:00", 0), ("20:00-06:00", "20:00:00", 0), ("20:00-06:00", "23:59:59", 0), ("20:00-06:00", "00:00:00", 0),
    ("20:00-06:00", "05:59:59", 0), ("20:00-06:00", "06:00:00", 14 * 3600), ("20:00-06:00", "19:59:30", 30),
    ("08:00-18:00", "08:00:00", 0), ("08:00-18:00", "17:59:59", 0), ("08:00-18:00", "18:00:00", 14 * 3600),
    ("08:00-18:00", "07:59:59", 1), ("00:00-23:59", "23:59:30", 30),
    ("12:00-12:00", "12:00:00", 0), ("12:00-12:00", "03:00:00", 0),
])  # fmt: skip
def test_the_seconds_until_the_hours_begin(hours: str | None, clock: str, seconds: float):
    assert Compute(hours=hours).closed_for(at(clock)) == pytest.approx(seconds)


TIMES = st.tuples(st.integers(0, 23), st.integers(0, 59))


@given(TIMES, TIMES, st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_after_the_wait_the_hours_have_begun(
    opens: tuple[int, int], closes: tuple[int, int], hour: int, minute: int, second: int
):
    compute = Compute(hours=f"{opens[0]:02}:{opens[1]:02}-{closes[0]:02}:{closes[1]:02}")
    now = datetime(2026, 11, 21, hour, minute, second)
    wait = compute.closed_for(now)
    assert 0 <= wait < DAY
    if wait:
        then = (hour * 3600 + minute * 60 + second + wait) % DAY
        assert then == pytest.approx(opens[0] * 3600 + opens[1] * 60, abs=1e-3) or then == pytest.approx(DAY, abs=1e-3)


@pytest.mark.parametrize("hours", ["24:00-06:00", "8:00-18:00", "20:60-06:00", "20:00", "20:00-06:00 ", "nights", ""])
def test_anything_else_is_no_hours(hours: str):
    with pytest.raises(ConfigError):
        SiteConfig.build({"site": "va", "compute": {"hours": hours}}, source="test")


def test_training_waits_for_the_hours_and_questions_do_not(monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    closed = iter([90.0, 30.0, 0.0])
    monkeypatch.setattr(Compute, "closed_for", lambda self, now: next(closed))
    monkeypatch.setattr(join.time, "sleep", slept.append)
    config = SiteConfig.build({"site": "va", "compute": {"hours": "20:00-06:00"}}, source="test")
    join._wait_for_hours(config, "query")
    assert slept == []
    join._wait_for_hours(config, "train")
    assert slept == [60.0, 30.0]
