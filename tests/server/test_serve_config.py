"""`wardround serve` begins only with a port, a state folder and keys that are its own."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Lab
from wardround.common.errors import ConfigError, TrustRefused, WardroundError
from wardround.server.network.config import CoordinatorConfig
from wardround.server.network.serve import serve


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two consortia without hospitals."""
    labs = [Lab(tmp_path_factory.mktemp(name), {}) for name in ("one", "other")]
    for one in labs:
        one.found()
    return labs[0].folder, labs[1].folder


@pytest.fixture
def there(master: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A coordinator's file whose folder a test may break; serving in this process leaves no trace."""
    shutil.copytree(master[0], tmp_path / "lab")
    for name in ("FLWR_HOME", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    monkeypatch.setenv("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
    mask, level = os.umask(0o077), logging.getLogger("wardround").level
    yield tmp_path / "lab" / "coordinator.toml"
    os.umask(mask)
    logging.getLogger("wardround").setLevel(level)


def refusal(config: Path, kind: type[WardroundError]) -> str:
    with pytest.raises(kind) as refused:
        serve(config)
    return str(refused.value)


def test_a_port_that_is_taken_is_named(there: Path):
    with socket.create_server(("127.0.0.1", CoordinatorConfig.load(there).port)):
        said = refusal(there, ConfigError)
    assert said.startswith(f"cannot listen on 127.0.0.1:{CoordinatorConfig.load(there).port}: ")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the other port's socket ends with the process
def test_the_loopback_port_too(there: Path):
    with socket.create_server(("127.0.0.1", CoordinatorConfig.load(there).control_port)):
        assert refusal(there, ConfigError).startswith("cannot listen on 127.0.0.1:")


def test_a_second_one_on_the_same_folder_is_refused(there: Path):
    state = CoordinatorConfig.load(there).state
    state.mkdir()
    with (state / "serve.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert refusal(there, ConfigError) == f"{state} is in use: another `wardround serve` is running"


@pytest.mark.parametrize(("name", "said"), [("tls", "TLS key and certificate cannot be used"), ("sign", "is not the key of")])
def test_a_key_of_another_certificate_is_refused(there: Path, master: tuple[Path, Path], name: str, said: str):
    keys = CoordinatorConfig.load(there).keys
    shutil.copy(master[1] / "consortium" / "coordinator" / f"{name}.key", keys / f"{name}.key")
    (keys / f"{name}.key").chmod(0o600)
    assert said in refusal(there, TrustRefused)


@pytest.mark.parametrize("name", ["tls", "sign"])
def test_a_key_that_others_can_read_is_refused(there: Path, name: str):
    key = CoordinatorConfig.load(there).keys / f"{name}.key"
    key.chmod(0o644)
    assert f"{name}.key" in refusal(there, ConfigError)


@pytest.mark.parametrize("name", ["tls", "sign"])
def test_a_key_that_is_a_link_is_refused(there: Path, name: str):
    key = CoordinatorConfig.load(there).keys / f"{name}.key"
    key.rename(key.with_name("elsewhere"))
    key.symlink_to("elsewhere")
    refusal(there, ConfigError)


@pytest.mark.parametrize("gone", ["coordinator.tls.crt", "coordinator.sign.crt"])
def test_without_its_certificate_it_does_not_begin(there: Path, gone: str):
    (CoordinatorConfig.load(there).trust / "roster" / gone).unlink()
    refusal(there, TrustRefused)


@pytest.mark.parametrize("line", [
    "port = 0", "port = 65536", 'host = "somewhere/else"', "studies_at_once = 0", "nonsense = 1", 'vault = "key.pem"',
    'state = ["x"]', "requests_per_second = 0",
])  # fmt: skip
def test_a_file_that_is_wrong_begins_nothing(there: Path, line: str):
    kept = [old for old in there.read_text().splitlines() if old.split(" =")[0] != line.split(" =")[0]]
    there.write_text("\n".join([line, *kept]))
    assert line.split(" =")[0] in refusal(there, ConfigError)
    assert not (there.parent / "coordinator").exists()


def test_folders_start_at_the_files_own(tmp_path: Path):
    file = tmp_path / "coordinator.toml"
    file.write_text('state = "a"\nkeys = "/b"\nvault = "file:c"\n')
    config = CoordinatorConfig.load(file)
    assert (config.state, config.keys, config.trust) == (tmp_path / "a", Path("/b"), tmp_path / "public")
    assert config.vault == f"file:{tmp_path / 'c'}"
