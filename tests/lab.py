"""A consortium in a folder, with real keys: authority, coordinator and hospitals, made by the commands of the handbook."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w
from typer.testing import CliRunner

from wardround.common.agreement import Approval, SignedStudy
from wardround.common.cli import application
from wardround.common.plan import SignedText
from wardround.common.trust.certificates import COORDINATOR
from wardround.common.trust.signing import Signer
from wardround.server.network.shelf import FINISHED, STOPPED, Shelf, Status

SECONDS = 300
REPEATABLE = Path(__file__).parent / "join_with_repeatable_coins.py"
FINGERPRINT = re.compile(r"(?:[0-9A-F]{4}-){15}[0-9A-F]{4}")


@dataclass
class Lab:
    """One consortium on this machine; nothing runs until it is started."""

    folder: Path
    sites: dict[str, Path]  # name -> site file
    port: int = field(default_factory=lambda: free_ports(2)[0])
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def consortium(self) -> Path:
        return self.folder / "consortium"

    @property
    def config(self) -> Path:
        return self.folder / "coordinator.toml"

    @property
    def shelf(self) -> Shelf:
        return Shelf(self.folder / "coordinator")

    def found(self, **settings: object) -> None:
        """Everything the consortium's office and the hospitals do before the first study."""
        control = free_ports(1)[0]
        said = wardround("init-consortium", self.consortium, "--name", "lab", "--coordinator", f"localhost:{self.port}",
                         "--also-host", "127.0.0.1")  # fmt: skip
        (fingerprint,) = FINGERPRINT.findall(said)
        for site in self.sites:
            self.enroll(site, fingerprint)
        table = {
            "host": "127.0.0.1",
            "port": self.port,
            "control_port": control,
            "state": "coordinator",
            "keys": "consortium/coordinator",
            "trust": "consortium/public",
        }
        self.config.write_text(tomli_w.dumps(table | settings))

    def enroll(self, site: str, fingerprint: str) -> None:
        (token,) = re.findall(r"token-[0-9a-f]{64}", wardround("invite", site, "--consortium", self.consortium))
        with contextlib.chdir(self.folder):
            said = wardround("enroll", self.sites[site], "--token", token, "--ca-fingerprint", fingerprint,
                             "--coordinator", f"localhost:{self.port}")  # fmt: skip
            (request,) = set(FINGERPRINT.findall(said)) - {fingerprint}
            wardround("approve", f"{site}.request", "--consortium", self.consortium, "--fingerprint", request)
            wardround("enroll", self.sites[site], "--welcome", f"{site}.welcome")

    def sign(self, study: SignedText, approve: Sequence[str] | None = None) -> Path:
        """The study, signed by the coordinator and approved by sites (all of them, unless told)."""
        plan = self.folder / f"{study.plan.name}.toml"
        plan.write_text(study.text)
        approvals = [self.approve(plan, site) for site in (self.sites if approve is None else approve)]
        signed = self.folder / f"{study.plan.name}.signed"
        coordinator = Signer.load(COORDINATOR, self.consortium / "coordinator" / "sign.key")
        SignedStudy.sign(study, coordinator, approvals).save(signed)
        return signed

    def approve(self, plan: Path, site: str) -> Approval:
        copy = self.folder / f"{site}.approval"
        wardround("approve-plan", plan, "--site", self.sites[site], "--yes", "--out", copy)
        return Approval.parse(copy.read_text())

    def serve(self) -> None:
        self._begin("serve", "-m", "wardround", "serve", self.config)
        wait_for_port(self.port)

    def join(self, *sites: str, repeatable: bool = False) -> None:
        """Start hospitals (all of them, unless told); with coins that repeat, to compare bits."""
        for site in sites or self.sites:
            how = [str(REPEATABLE)] if repeatable else ["-m", "wardround", "join"]
            self._begin(site, *how, self.sites[site])

    def start(self, study: Path, *more: str) -> None:
        wardround("start", study, "--config", self.config, "--no-follow", *more)

    def status(self, name: str) -> Status:
        status = self.shelf.study(name).status
        assert status is not None
        return status

    def wait(self, name: str, *, rounds: int | None = None, seconds: float = SECONDS) -> Status:
        """Until the study is over, or so many rounds are on disk."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.status(name)
            if status.state in (FINISHED, STOPPED) or (rounds is not None and status.round >= rounds):
                return status
            time.sleep(0.1)
        raise AssertionError(f"study {name} is not over after {seconds:g} s: {self.status(name)}\n{self.logs()}")

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(30)

    def close(self) -> None:
        for name in list(self.processes):
            self.kill(name)

    def logs(self) -> str:
        paths = [*self.folder.rglob("*.log"), *self.folder.rglob("log.txt"), *self.folder.rglob("errors.txt")]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2500:]}" for path in paths)

    def _begin(self, name: str, *command: object) -> None:
        with (self.folder / f"{name}.out.log").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip


@contextlib.contextmanager
def lab(folder: Path, sites: dict[str, Path], **settings: object) -> Iterator[Lab]:
    """A consortium that is founded, and cleared away in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    found = Lab(folder, sites)
    found.found(**settings)
    try:
        yield found
    finally:
        found.close()


def wardround(*arguments: object) -> str:
    """The command in this process; what it printed."""
    done = CliRunner().invoke(application(), [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError(f"nobody listens on {port}")
