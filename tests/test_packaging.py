"""Installed in any of the usual ways, wardround is whole and owns one name only."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = """
import wardround.common.cli, wardround.server.app, wardround.client.app, wardround.simulations.run
from wardround.common.studies import find_study
assert find_study("heart-disease").is_file()
print(wardround.common.__file__)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what git tracks, so that builds leave nothing here."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    files = [ROOT / name for name in listed.stdout.split("\0") if name] if listed.returncode == 0 else []
    if not files:
        files = [p for p in ROOT.rglob("*") if p.is_file() and not {".venv", ".git", "build", "runs"} & set(p.parts)]
    for file in files:
        target = tmp_path / "tree" / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return tmp_path / "tree"


@pytest.mark.slow
def test_the_wheel_holds_code_and_data_under_one_name(tree: Path, tmp_path: Path):
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(tree)])
    (wheel,) = tmp_path.glob("wardround-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"wardround", f"wardround-{wheel.name.split('-')[1]}.dist-info"}
    for package in ("common", "server", "client", "simulations"):
        for source in (ROOT / package).rglob("*"):
            if source.is_file() and source.suffix in (".py", ".toml", ".data", ".jinja", ".css", ".typed", ".md"):
                assert f"wardround/{source.relative_to(ROOT)}" in names


@pytest.mark.slow
@pytest.mark.parametrize(
    "install",
    [
        [sys.executable, "-m", "pip", "--python", "{python}", "install", "--no-deps", "{tree}"],
        [sys.executable, "-m", "pip", "--python", "{python}", "install", "--no-deps", "-e", "{tree}"],
        [sys.executable, "-m", "uv", "pip", "install", "--python", "{python}", "--no-deps", "{tree}"],
        [sys.executable, "-m", "uv", "pip", "install", "--python", "{python}", "--no-deps", "-e", "{tree}"],
    ],
    ids=["pip", "pip -e", "uv pip", "uv pip -e"],
)
def test_every_way_to_install_gives_a_whole_package(install: list[str], tree: Path, tmp_path: Path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    run([word.format(python=python, tree=tree) for word in install])
    for path in Path(sysconfig.get_path("purelib")).iterdir():  # the dependencies of the environment that runs the tests
        if "wardround" not in path.name and path.suffix != ".pth" and not (site_packages / path.name).exists():
            (site_packages / path.name).symlink_to(path)
    found = run([str(python), "-c", CHECK], cwd=tmp_path).strip().splitlines()[-1]
    assert Path(found).is_relative_to(tmp_path)
    assert "wardround" in run([str(tmp_path / "venv" / "bin" / "wardround"), "--help"], cwd=tmp_path)


def run(command: list[str], cwd: Path | None = None) -> str:
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
