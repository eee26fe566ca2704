"""What the benchmark of secure sums times is a secure sum: the sum is right, and every target can be missed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from benchmarks import secure_sum as benchmark

SIZE = 5_000


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> benchmark.Row:
    monkeypatch.setattr(benchmark, "SIZE", SIZE)
    return benchmark.measured(4, np.linspace(-1, 1, SIZE, dtype=np.float32), 1)


GOOD = benchmark.Row(4, 0.1, 1.0, 0.1, 1.0, 1.0, 2.0, 2.1, 1e-8)
MISSED = {
    "client 5.0 x": {"flower_client": 0.5},
    "unmasking 5.0 x": {"flower_unmask": 0.5},
    "upload 2": {"upload": 2.0},
    "peak 3.5": {"peak": 3.5},
    "error 1e-06": {"error": 1e-6},
}


def test_what_is_timed_gives_the_sum_and_uploads_a_vector(row: benchmark.Row):
    assert row.error <= 1e-7
    assert row.flower_upload == pytest.approx(2, abs=0.1)
    assert row.upload == pytest.approx(1, abs=0.1)  # of so short a vector the statement is a part that shows
    assert min(row.client, row.flower_client, row.unmask, row.flower_unmask) > 0
    assert len(row.line) == len(benchmark.HEADER)


@pytest.mark.parametrize("what", MISSED)
def test_a_target_that_is_missed_is_named(what: str):
    assert benchmark.misses([GOOD], 8.0, 10.0) == benchmark.misses([GOOD], 1.0, None) == []
    (line,) = benchmark.misses([dataclasses.replace(GOOD, **MISSED[what])], 8.0, 10.0)
    assert what in line


def test_a_slow_mask_is_named():
    (line,) = benchmark.misses([GOOD], 7.0, 10.0)
    assert line == "mask expansion: 0.70 x openssl speed, wanted 0.80"


def test_without_openssl_there_is_a_rate_and_no_ratio(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "SIZE", SIZE)
    monkeypatch.setattr(benchmark.shutil, "which", lambda name: None)
    mine, bare = benchmark.expansion(1)
    assert math.isfinite(mine)
    assert bare is None
