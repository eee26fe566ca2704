"""Lines that break, disks that fill, signals, a certificate taken back: what a consortium on loopback makes of real faults."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w

from lab import Lab, lab, wait_for_port, wardround
from wardround.client.ledger import PrivacyLedger
from wardround.common.plan import SignedText, StudyPlan
from wardround.server.checkpoint import Progress, RoundRecord
from wardround.server.network.shelf import FINISHED, STOPPED, Status
from wardround.simulations import STUDIES
from wardround.simulations.scenario import Changes, Scenario

pytestmark = pytest.mark.live

SLOWLY = Path(__file__).parent / "join_slowly.py"
STUDY_NAMES = ["broken-lines", "signals", "small-disk", "left", "right", "taken-back"]


class Cable:
    """A line between hospitals and their coordinator that a test may cut, stall and mend."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]
        self._flows, self._cut = threading.Event(), False
        self._flows.set()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._take, daemon=True).start()

    def cut(self) -> None:
        """Every connection breaks, and none comes about."""
        self._cut = True
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def stall(self) -> None:
        """Connections stay, and nothing goes through: half-open, as after a firewall forgot them."""
        self._flows.clear()

    def mend(self) -> None:
        """As it was."""
        self._cut = False
        self._flows.set()

    def close(self) -> None:
        self.cut()
        self._flows.set()
        self._door.close()

    def _take(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._door.accept()
                if self._cut:
                    near.close()
                else:
                    threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError), near, socket.create_connection(("127.0.0.1", self._to)) as far:
            self._open |= {near, far}
            back = threading.Thread(target=self._pump, args=(far, near), daemon=True)
            back.start()
            self._pump(near, far)
            back.join()
            self._open -= {near, far}

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while found := one.recv(1 << 16):
                self._flows.wait()
                other.sendall(found)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)


class Ward:
    """A consortium whose hospitals are all there, and the cable they call through."""

    def __init__(self, there: Lab, cable: Cable) -> None:
        self.there, self.cable = there, cable

    def all_here(self) -> None:
        """Every hospital is connected, whatever a test before has done."""
        for site in self.there.sites:
            if site not in self.there.processes:
                self.join(site)
        for site in self.there.sites:
            self.wait_for(site, since=0)

    def join(self, site: str) -> int:
        """Start a hospital; how much its process had said before."""
        before = len(self.said(site))
        self.there.join(site)
        return before

    def said(self, site: str) -> str:
        path = self.there.folder / f"{site}.out.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, site: str, since: int) -> None:
        until(lambda: "is connected" in self.said(site)[since:], 90, lambda: self.there.logs())

    def start(self, name: str, **changes: object) -> SignedText:
        table = tomllib.loads((STUDIES / "heart-disease.toml").read_text()) | {"name": name, "deadline_seconds": 90.0} | changes
        table["privacy"] |= {"epsilon": 0.5}
        text = tomli_w.dumps(table)
        study = SignedText(StudyPlan.parse(text), text)
        self.there.start(self.there.sign(study, approve=[]))
        return study

    def until(self, name: str, done: Callable[[Status], bool], seconds: float = 120) -> None:
        def over() -> bool:
            status = self.there.status(name)
            assert done(status) or status.state not in (FINISHED, STOPPED), f"{status}\n{self.there.logs()}"
            return done(status)

        until(over, seconds, lambda: f"{self.there.status(name)}\n{self.there.logs()}")

    def history(self, study: SignedText) -> list[RoundRecord]:
        folder = self.there.shelf.study(study.plan.name).path / "checkpoints"
        found = Progress.latest(folder, study=study.digest)
        assert found is not None
        return list(found.history)

    def whole(self, study: SignedText) -> None:
        """The study is finished: every round once, every hospital in each, nothing spent twice."""
        history = self.history(study)
        assert [record.round for record in history] == list(range(1, study.plan.rounds + 1))
        assert {record.round: record.dropped for record in history if record.dropped} == {}
        assert all(sorted(record.sites) == sorted(self.there.sites) for record in history)


def until(done: Callable[[], bool], seconds: float, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise AssertionError(why())
        time.sleep(0.1)


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    folder = tmp_path_factory.mktemp("faults")
    sites = Scenario.prepare(STUDIES / "heart-disease.toml", folder / "sites", Changes()).sites
    with lab(folder / "lab", sites, studies_at_once=2) as there:
        cable = Cable(there.port)
        for path in sites.values():
            table = tomllib.loads(path.read_text())
            table["allow"] |= {"studies": STUDY_NAMES, "epsilon_lifetime": 1000.0, "min_sites": 2}
            path.write_text(tomli_w.dumps(table | {"network": {"coordinator": f"localhost:{cable.port}"}}))
        there.serve()
        wait_for_port(there.port)
        yield Ward(there, cable)
        there.close()
        cable.close()


@pytest.fixture
def ward(founded: Ward) -> Ward:
    founded.cable.mend()
    founded.all_here()
    return founded


def test_a_hospital_that_waits_takes_next_to_nothing(ward: Ward):
    ward.there.kill("va", signal.SIGTERM)
    ward.wait_for("va", since=ward.join("va"))
    process = Path("/proc") / str(ward.there.processes["va"].pid)
    time.sleep(2)

    def seconds() -> float:
        user, system = process.joinpath("stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    before, began = seconds(), time.monotonic()
    time.sleep(20)
    share = (seconds() - before) / (time.monotonic() - began)
    (memory,) = re.findall(r"VmRSS:\s+(\d+) kB", process.joinpath("status").read_text())
    print(f"idle: {int(memory) / 1024:.0f} MB, {100 * share:.2f} % of a processor")
    assert int(memory) / 1024 < 400
    assert share < 0.03


def test_a_line_that_breaks_or_stalls_costs_time_and_no_round(ward: Ward):
    study = ward.start("broken-lines", rounds=16)
    ward.until("broken-lines", lambda status: status.round >= 2)
    ward.cable.cut()
    time.sleep(5)
    ward.cable.mend()
    before = ward.there.status("broken-lines").round
    ward.until("broken-lines", lambda status: status.round >= before + 2)
    ward.cable.stall()
    time.sleep(3)
    began = time.monotonic()
    assert ward.there.kill("switzerland", signal.SIGTERM) == 0
    assert time.monotonic() - began < 10  # also where nobody takes its farewell
    time.sleep(12)
    before = ward.there.status("broken-lines").round
    assert before < study.plan.rounds
    ward.cable.mend()
    ward.join("switzerland")
    ward.until("broken-lines", lambda status: status.state in (FINISHED, STOPPED))
    assert ward.there.status("broken-lines").state == FINISHED, ward.there.logs()
    ward.whole(study)


def test_a_signal_ends_a_hospital_within_ten_seconds_whatever_it_does(ward: Ward):
    began = time.monotonic()
    assert ward.there.kill("va", signal.SIGTERM) == 0  # it waits for orders
    assert time.monotonic() - began < 10
    since = len(ward.said("va"))
    ward.there._begin("va", SLOWLY, ward.there.sites["va"])
    ward.wait_for("va", since)
    study = ward.start("signals", rounds=4)
    until(ward.there.sites["va"].with_name("begun").exists, 90, ward.there.logs)
    began = time.monotonic()
    assert ward.there.kill("va", signal.SIGTERM) == 0  # it trains
    assert time.monotonic() - began < 10
    ward.join("va")
    ward.until("signals", lambda status: status.state in (FINISHED, STOPPED))
    ward.whole(study)
    with PrivacyLedger(ward.there.sites["va"].parent / "state" / "ledger.sqlite") as ledger:
        (account,) = [account for account in ledger.accounts() if account.study == study.digest]
    assert account.marked == study.plan.rounds


def test_a_hospital_is_served_by_one_process(ward: Ward):
    command = [sys.executable, "-m", "wardround", "join", str(ward.there.sites["va"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "is in use: another `wardround join` serves this site" in done.stderr
    assert ward.there.processes["va"].poll() is None


ON_A_SMALL_DISK = """
set -e
cp -a "$1" "$1.copy"
mount -t tmpfs -o "size=$2k,mode=700" none "$1"
cp -a "$1.copy/." "$1"
rm -r "$1.copy"
exec "$3" -m wardround join "$4"
"""


@pytest.fixture
def small_disk(ward: Ward, tmp_path: Path) -> Iterator[Path]:
    """The state folder of `va` on a disk of its own, as a path from here; skips where none can be mounted."""
    tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no disk can be mounted here: {tried.stderr.strip()[:80]}")
    site = ward.there.sites["va"]
    state = site.parent / "state"
    assert ward.there.kill("va", signal.SIGTERM) == 0
    room = sum(path.stat().st_blocks * 512 for path in state.rglob("*")) // 1024 + 4096
    since = len(ward.said("va"))
    with (ward.there.folder / "va.out.log").open("ab") as out:
        ward.there.processes["va"] = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh", str(state), str(room), sys.executable, str(site)],
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    ward.wait_for("va", since)
    inside = Path(f"/proc/{ward.there.processes['va'].pid}/root{state}")
    yield inside
    if "va" in ward.there.processes:
        (inside / "fill").unlink(missing_ok=True)
    bring_back(ward, inside, state)


def bring_back(ward: Ward, inside: Path, state: Path) -> None:
    """What `va` wrote on its small disk counts from now on; it ends."""
    if "va" in ward.there.processes:
        copy = state.with_name("copy")
        subprocess.run(["cp", "-a", str(inside), str(copy)], check=True)
        assert ward.there.kill("va", signal.SIGTERM) == 0
        shutil.rmtree(state)
        copy.rename(state)


def test_a_full_disk_is_a_refusal_in_our_words_and_the_others_go_on(ward: Ward, small_disk: Path):
    study = ward.start("small-disk", rounds=900)
    ward.until("small-disk", lambda status: status.round >= 2 and "va" in status.last.get("sites", []))
    with (small_disk / "fill").open("wb", buffering=0) as fill, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 12):
            with contextlib.suppress(OSError):
                while fill.write(bytes(size)):
                    pass
    ward.until("small-disk", lambda status: "va" in status.last.get("dropped", {}))
    why = ward.there.status("small-disk").last["dropped"]["va"]
    assert re.search(r"disk is full|cannot be (read or )?written", why), why
    before = ward.there.status("small-disk").round
    ward.until("small-disk", lambda status: status.round >= before + 2)
    assert sorted(ward.there.status("small-disk").last["sites"]) == ["cleveland", "hungarian", "switzerland"]
    (small_disk / "fill").unlink()
    ward.until("small-disk", lambda status: "va" in status.last.get("sites", []))
    wardround("stop", "small-disk", "--config", ward.there.config)
    ward.until("small-disk", lambda status: status.state == STOPPED)
    state = ward.there.sites["va"].parent / "state"
    bring_back(ward, small_disk, state)
    with PrivacyLedger(state / "ledger.sqlite") as ledger:
        ledger.verify()
        (account,) = [account for account in ledger.accounts() if account.study == study.digest]
    took_part = sum("va" in record.sites for record in ward.history(study))
    assert took_part <= account.marked < ward.there.status("small-disk").round
    wardround("audit-log", "verify", state / "audit.jsonl")
    assert re.search(r"log\.disk-full|disk is full|cannot be (read or )?written", (state / "audit.jsonl").read_text())


def test_two_studies_run_side_by_side(ward: Ward):
    studies = [ward.start(name, rounds=6) for name in ("left", "right")]
    ward.until("right", lambda status: status.round >= 1)
    for study in studies:
        ward.until(study.plan.name, lambda status: status.state == FINISHED)
        ward.whole(study)


def test_a_study_goes_on_without_whoever_never_comes_and_whoever_is_taken_back(ward: Ward):
    assert ward.there.kill("switzerland", signal.SIGTERM) == 0
    study = ward.start("taken-back", rounds=500, min_sites=2, deadline_seconds=4.0)
    ward.until("taken-back", lambda status: status.round >= 2)
    assert sorted(ward.there.status("taken-back").last["sites"]) == ["cleveland", "hungarian", "va"]
    wardround("revoke", "va", "--consortium", ward.there.consortium)
    ward.until("taken-back", lambda status: "va" not in status.last.get("sites", []))
    before = ward.there.status("taken-back").round
    began = time.monotonic()
    ward.until("taken-back", lambda status: status.round >= before + 30)
    print(f"30 rounds after a certificate was taken back: {time.monotonic() - began:.0f} s")
    last = ward.there.status("taken-back").last
    assert sorted(last["sites"]) == ["cleveland", "hungarian"]
    wardround("stop", "taken-back", "--config", ward.there.config)
    ward.until("taken-back", lambda status: status.state == STOPPED)
    assert not any(record.lost for record in ward.history(study))
    assert re.search("va.s tls certificate was revoked", (ward.there.folder / "coordinator" / "audit.jsonl").read_text())
    assert ward.there.kill("va", signal.SIGTERM) == 0  # it tries on, and ends when told


def test_after_all_of_it_every_ledger_and_log_holds(founded: Ward):
    founded.there.close()
    for site, path in founded.there.sites.items():
        with PrivacyLedger(path.parent / "state" / "ledger.sqlite") as ledger:
            ledger.verify()
        wardround("audit-log", "verify", path.parent / "state" / "audit.jsonl")
        assert site in founded.there.sites
    for path in founded.there.folder.rglob("audit.jsonl"):
        wardround("audit-log", "verify", path)
