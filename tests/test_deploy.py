"""What lies in deploy/: commands that exist, units that systemd takes, and no privilege that is not needed."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from wardround.client.policy import SiteConfig
from wardround.common.cli import application
from wardround.server.network.config import CoordinatorConfig

DEPLOY = Path(__file__).parent.parent / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
SHUT = {
    "User": "wardround",
    "Restart": "always",
    "RestartSec": "15",
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "PrivateTmp": "yes",
    "ProtectSystem": "strict",
    "ReadWritePaths": "/var/lib/wardround",
    "StateDirectoryMode": "0700",
    "UMask": "0077",
    "LimitCORE": "0",
}


def unit(path: Path) -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(path.read_text())
    return parser["Service"]


def exists(command: list[str]) -> bool:
    """Whether `wardround` has this verb, and the verb takes one file and these options."""
    verbs = typer.main.get_command(application()).commands  # type: ignore[attr-defined]
    if command == ["--help"]:
        return True
    verb, *rest = command
    if verb not in verbs:
        return False
    known = {option for p in verbs[verb].params for option in p.opts}
    return all(word in known for word in rest if word.startswith("-"))


def test_there_are_units_for_both_sides():
    assert [path.name for path in UNITS] == ["wardround-coordinator.service", "wardround-site.service"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_runs_a_command_that_exists_without_privileges(path: Path):
    service = unit(path)
    program, *command = shlex.split(service["ExecStart"])
    assert program == "/opt/wardround/bin/wardround"
    assert exists(command)
    assert {key: service[key] for key in SHUT} == SHUT
    assert service["MemoryMax"]
    assert "PrivateNetwork" not in service  # it has somebody to call


def test_a_command_that_does_not_exist_is_found():
    assert not exists(["serves", "x.toml"])
    assert not exists(["join", "site.toml", "--daemon"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_takes_the_unit(path: Path, tmp_path: Path):
    text = path.read_text().replace("/opt/wardround/bin/wardround", sys.executable)
    assert verified(tmp_path / path.name, text) == ""
    assert "Restrat" in verified(tmp_path / path.name, text.replace("Restart=", "Restrat="))


def verified(path: Path, text: str) -> str:
    path.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, check=False)
    if "Failed to" in done.stderr and path.name not in done.stderr:
        pytest.skip(f"systemd-analyze does not work here: {done.stderr.strip()[:200]}")
    return done.stderr


def test_the_key_of_checkpoints_is_shown_as_a_credential_and_not_on():
    text = (DEPLOY / "wardround-coordinator.service").read_text()
    assert re.search(r"^#LoadCredential=checkpoint-key:/\S+$", text, re.MULTILINE)
    (key,) = re.findall(r'vault = "(.*)" in coordinator.toml', text)
    assert CoordinatorConfig(vault=key).vault == "credential:checkpoint-key"


def test_the_image_runs_our_command_as_nobody_special():
    text = (DEPLOY / "Containerfile").read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["wardround"]
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    (command,) = re.findall(r"^CMD (.*)$", text, re.MULTILINE)
    assert json.loads(entry) == ["/opt/wardround/bin/wardround"]
    assert exists(json.loads(command))


def test_the_image_holds_what_is_installed_and_no_tests():
    root = DEPLOY.parent
    taken = {
        word
        for line in re.findall(r"^COPY (?!--)(.*) \S+$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
        for word in line.split()
    }
    assert all((root / name).exists() for name in taken)
    assert {"common", "server", "client", "simulations", "pyproject.toml", "__init__.py"} <= taken
    assert not {"tests", ".git", "."} & taken


def test_the_example_of_containers_runs_commands_that_exist_and_shuts_them_in():
    text = (DEPLOY / "compose.yaml").read_text()
    commands = [json.loads(found) for found in re.findall(r"^\s+command: (.*)$", text, re.MULTILINE)]
    assert [command[0] for command in commands] == ["serve", "join"]
    assert all(exists(command) for command in commands)
    assert all(line in text for line in ("read_only: true", "cap_drop: [ALL]", "no-new-privileges:true"))
    assert text.count("ports:") == 1  # a hospital listens to nobody


def test_the_port_of_the_example_is_the_default():
    assert f'"{CoordinatorConfig().port}:{CoordinatorConfig().port}"' in (DEPLOY / "compose.yaml").read_text()
    assert SiteConfig(site="va").network.coordinator is None
