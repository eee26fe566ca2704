"""Who may import whom, and that every folder is packaged."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "server", "client", "simulations")
MAY_IMPORT = {
    "common": set(),
    "server": {"common"},
    "client": {"common"},
    "simulations": {"common", "server", "client"},
}
# the only places that reach below Flower's public API
FLOWER_INTERNALS = {"simulations/grid.py", "server/network/link.py", "client/network/link.py"}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    return found | {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("wardround.")}
    assert ours - {package} <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_grid_and_the_links_touch_flower_below_its_public_api(path: Path):
    deep = {name for name in imported(path) if name.startswith("flwr.") and name not in PUBLIC}
    assert not deep or str(path.relative_to(ROOT)) in FLOWER_INTERNALS


PUBLIC = {"flwr.app", "flwr.serverapp", "flwr.clientapp"}


def test_the_internals_of_flower_we_lean_on_are_there():
    from flwr.app import Context, Message, RecordDict
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    run = Run.create_empty(run_id=7)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.run_id, 1, 1
    message = Message(RecordDict(), 1000, "train", group_id="1")
    message.metadata.__dict__["_message_id"] = "m1"
    assert message.metadata.message_id == "m1"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "m1"
    assert Context(7, 1, {}, RecordDict(), {}).run_id == 7


def test_every_folder_is_packaged():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(config["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in sources()}
    assert {f"wardround.{'.'.join(folder.parts)}" for folder in folders} | {"wardround"} == listed


def test_every_package_says_what_it_promises():
    for path in sources():
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, f"{path} opens without its promise"


def test_one_word_for_one_thing():
    words = re.compile(r"\b(nodes?|workers?|part(y|ies)|jobs?|experiments?)\b", re.IGNORECASE)
    for path in sources():
        if path.parts[-2:] == ("simulations", "crew.py") or str(path.relative_to(ROOT)) in FLOWER_INTERNALS:
            continue
        for docstring in docstrings(path):
            assert not words.search(docstring), f"{path}: {words.search(docstring)}"


def docstrings(path: Path) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, documented)]
    return [text for text in found if text]
