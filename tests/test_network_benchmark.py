"""The network's benchmark can be asked for, and what it writes down is what it says; nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_live import certificates

from benchmarks.network import Row, parser, table
from benchmarks.network_bytes import mover
from benchmarks.network_runs import _rounds, free_port

ROWS = [Row("met", 1.0, "s", 2.0), Row("missed", 3.0, "s", 2.0), Row("only to compare with", 9.0, "s")]


def test_the_command_says_how_it_is_used():
    said = subprocess.run([sys.executable, "-m", "benchmarks.network", "--help"], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1]).stdout  # fmt: skip
    assert all(option in said for option in ("--json", "--rounds", "--sites", "--no-stock"))


def test_what_is_written_down_has_every_row_and_every_target_that_was_missed():
    found = json.loads(json.dumps(table(ROWS, rounds=12, sites=4)))
    assert found.keys() == {"versions", "cores", "load", "rounds", "sites", "rows", "missed"}
    assert found["missed"] == ["missed"]
    assert found["rows"][0] == {"what": "met", "value": 1.0, "unit": "s", "target": 2.0}


def test_a_study_without_sites_enough_is_not_asked_for():
    assert parser().parse_args([]).sites == 4
    with pytest.raises(SystemExit):
        parser().parse_args(["--sites", "1"])


def test_the_first_and_the_last_round_do_not_count_and_training_is_taken_off():
    found = _rounds({0: 1.0, 1: 10.0, 2: 12.0, 3: 15.0, 4: 99.0}, {2: 0.5, 3: 1.0})
    assert (found.whole, found.beyond) == ([2.0, 3.0], [1.5, 2.0])


def test_bytes_are_moved_over_tls(tmp_path: Path):
    certificates(tmp_path)
    own = (tmp_path / "server.crt", tmp_path / "server.key")
    with mover(free_port(), 6 << 20, (*own, tmp_path / "ca.crt"), [own, own]) as bare:
        assert bare.seconds() > 0


def test_a_hospital_that_waits_has_not_loaded_torch():
    code = "import sys, wardround.client.network.join, wardround.client.network.desk; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
