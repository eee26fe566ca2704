"""The same study over a real network: Flower's own SuperLink and SuperNodes, TLS on loopback, a bundle without code."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import tomli_w
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from wardround.server.checkpoint import Progress
from wardround.simulations.run import simulate
from wardround.simulations.scenario import Changes, Scenario

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SECONDS = 480


def test_a_bundle_carries_the_study_and_no_code(tmp_path: Path):
    app = bundle_source(tmp_path)
    run_flwr(["build"], cwd=app, home=tmp_path / "home")
    (bundle,) = app.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.endswith(".py")]
    assert "pyproject.toml" in names


@pytest.mark.live
def test_network_and_simulation_give_the_same_bits(tmp_path: Path, scenario: Callable[..., Scenario]):
    local = scenario("local", rounds=2, without_privacy=True)
    simulate(local, baselines=False)
    remote = scenario("remote", rounds=2, without_privacy=True)
    assert remote.study.text == local.study.text
    with deployment(tmp_path, remote) as home:
        submit(tmp_path, remote, home)
        wait_for(remote.folder / "model.safetensors", home)
    expected = safetensors.torch.load_file(local.folder / "model.safetensors")
    found = safetensors.torch.load_file(remote.folder / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.live
def test_network_and_simulation_decide_the_same_in_looks(tmp_path: Path, study_file: Path):
    table = tomllib.loads(study_file.read_text())
    table.pop("privacy")
    table |= {"rounds": 2, "validation": {"share": 0.4, "every": 2, "metric": "log_loss"}}
    (tmp_path / "looks.toml").write_text(tomli_w.dumps(table))
    local, remote = (Scenario.prepare(tmp_path / "looks.toml", tmp_path / name, Changes()) for name in ("local", "remote"))
    simulate(local, baselines=False)
    with deployment(tmp_path, remote) as home:
        submit(tmp_path, remote, home)
        wait_for(remote.folder / "model.safetensors", home)
    expected, found = (Progress.latest(s.folder / "checkpoints", study=s.study.digest) for s in (local, remote))
    assert expected is not None
    assert found is not None
    assert [record.validation for record in found.history] == [record.validation for record in expected.history]
    assert expected.history[-1].validation is not None
    assert (remote.folder / "model.safetensors").read_bytes() == (local.folder / "model.safetensors").read_bytes()


@contextlib.contextmanager
def deployment(tmp_path: Path, scenario: Scenario) -> Iterator[Path]:
    """A SuperLink and one SuperNode per site; yields FLWR_HOME of the person who submits."""
    certificates(tmp_path)
    link, *ports = free_ports(1 + len(scenario.sites))
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    lab = {"address": f"127.0.0.1:{link}", "root-certificates": str(tmp_path / "ca.crt")}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": "lab", "lab": lab}}))
    tls = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key"]
    with contextlib.ExitStack() as running:
        command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(link), *tls]
        command += ["--database", "state.db", "--disable-runtime-dependency-installation"]
        running.enter_context(started(command, tmp_path, tmp_path / "link"))
        wait_for_port(link)
        for (site, path), port in zip(scenario.sites.items(), ports, strict=True):
            command = ["flower-supernode", "--superlink", f"127.0.0.1:{link}", "--root-certificates", "ca.crt"]
            command += ["--host", "127.0.0.1", "--port", str(port), "--node-config", f'site="{path.resolve()}"']
            running.enter_context(started(command, tmp_path, tmp_path / f"node-{site}"))
        yield home


def submit(tmp_path: Path, scenario: Scenario, home: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps({"plan": scenario.study.text, "folder": str(scenario.folder.resolve())}))
    time.sleep(5)  # the sites register
    run_flwr(["run", ".", "lab", "--run-config", str(config)], cwd=bundle_source(tmp_path), home=home)


def wait_for(path: Path, home: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            logs = "\n".join(log.read_text()[-3000:] for log in home.parent.glob("*.log"))
            pytest.fail(f"no model after {SECONDS} s\n{logs}")
        time.sleep(0.5)


def bundle_source(tmp_path: Path) -> Path:
    app = tmp_path / "wardround"
    if not app.exists():
        app.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
            shutil.copy(ROOT / name, app / name)
        for package in ("common", "server", "client", "simulations"):
            shutil.copytree(ROOT / package, app / package)
    return app


def run_flwr(arguments: list[str], *, cwd: Path, home: Path) -> None:
    done = subprocess.run(
        [str(BIN / "flwr"), *arguments], cwd=cwd, env=environment(home), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def started(command: list[str], cwd: Path, home: Path) -> Iterator[None]:
    home.mkdir()
    with (cwd / f"{home.name}.log").open("w") as log:
        command = [str(BIN / command[0]), *command[1:]]
        process = subprocess.Popen(command, cwd=cwd, env=environment(home), stdout=log, stderr=log, start_new_session=True)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


def environment(home: Path) -> dict[str, str]:
    off = ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION")
    quiet = {"FLWR_TELEMETRY_ENABLED": "0"} | dict.fromkeys(off, "1")
    return {**os.environ, **quiet, "FLWR_HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    pytest.fail("the SuperLink did not start listening")


def certificates(folder: Path) -> None:
    """A certificate authority and a server certificate for loopback."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, issuer: str, *, ca: bool):
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        if not ca:
            loopback = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(loopback), critical=False)
        return builder.sign(signer, hashes.SHA256())

    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(certificate("lab", authority, authority, "lab", ca=True).public_bytes(pem))
    (folder / "server.crt").write_bytes(certificate("localhost", server, authority, "lab", ca=False).public_bytes(pem))
    plain = serialization.NoEncryption()
    (folder / "server.key").write_bytes(server.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
