"""Who may import whom, and that every folder is packaged."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import logging
import operator
import re
import ssl
import tomllib
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

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


LINKS = sorted(FLOWER_INTERNALS - {"simulations/grid.py"})
CALLED = {  # what the links call of what they import: the parameters they name, or the fields
    "flwr.supercore.inflatable.inflatable_utils:pull_objects": {
        "pull_object_fn", "initial_backoff", "backoff_cap", "max_tries_per_object",
    },
    "flwr.supercore.inflatable.inflatable_utils:push_object_contents_from_iterable": {"push_object_fn"},
    "flwr.supernode.fleet_http_client:FleetHttpClient": {"interceptors"},
    "flwr.superlink.grid.http_grid:HttpGrid": {"insecure", "token"},
    "flwr.supercore.run:Run.create_empty": {"run_id"},
}  # fmt: skip
FIELDS = {
    "fleet_pb2": {
        "ActivateNodeRequest": {"public_key", "heartbeat_interval"}, "ActivateNodeResponse": {"node_id"},
        "DeactivateNodeRequest": {"node_id"}, "PullMessagesRequest": {"node"},
        "PullMessagesResponse": {"messages_list", "message_object_trees"},
        "PushMessagesRequest": {"node", "messages_list", "message_object_trees", "clientapp_runtime_list"},
        "PushMessagesResponse": {"objects_to_push", "session_id"},
    },
    "heartbeat_pb2": {"SendNodeHeartbeatRequest": {"node", "heartbeat_interval"}},
    "message_pb2": {
        "PullObjectRequest": {"node", "run_id", "object_id"},
        "PullObjectResponse": {"object_found", "object_available", "object_content"},
        "PushObjectRequest": {"node", "run_id", "object_id", "object_content", "session_id"},
        "PushObjectResponse": {"stored"}, "ConfirmMessageReceivedRequest": {"node", "run_id", "message_object_id"},
        "ObjectTree": {"object_id"},
    },
    "run_pb2": {"GetRunRequest": {"node", "run_id"}, "GetRunResponse": {"run"}, "Run": {"override_config"}},
    "node_pb2": {"Node": {"node_id"}},
}  # fmt: skip


@pytest.mark.parametrize("path", LINKS)
def test_what_a_link_imports_of_flower_is_there(path: str):
    tree = ast.parse((ROOT / path).read_text())
    lines = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("flwr")]
    assert lines
    for line in lines:
        module = importlib.import_module(str(line.module))
        for name in line.names:
            assert hasattr(module, name.name) or importlib.util.find_spec(f"{line.module}.{name.name}"), name.name


@pytest.mark.parametrize("where", CALLED)
def test_what_a_link_calls_takes_what_it_is_given(where: str):
    module, _, name = where.partition(":")
    called = operator.attrgetter(name)(importlib.import_module(module))
    assert inspect.signature(called).parameters.keys() >= CALLED[where]


@pytest.mark.parametrize("module", FIELDS)
def test_flowers_messages_have_the_fields_a_link_reads_and_writes(module: str):
    found = importlib.import_module(f"flwr.proto.{module}")
    for name, fields in FIELDS[module].items():
        assert {field.name for field in getattr(found, name).DESCRIPTOR.fields} >= fields, name


def test_flowers_server_does_what_the_coordinators_link_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from wardround.common import service
    from wardround.common.errors import LinkRefused
    from wardround.server.network import link

    for name in ("FLWR_HOME", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
    service.quiet_flower(tmp_path / "flower")
    logger = logging.getLogger("flwr")
    level, handlers = logger.level, list(logger.handlers)
    found = link.SuperLink(tmp_path / "superlink.sqlite", port=1, secret=b"x" * 32)

    def connected() -> dict[bytes, str]:
        """As the network's grid reads it: Flower key -> since when, of all that are there."""
        return {node.public_key: node.last_activated_at for node in found._state.get_node_info(statuses=["online"])}

    try:
        assert (tmp_path / "superlink.sqlite").stat().st_mode & 0o077 == 0
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", link.flower_version())
        key = public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())
        number = found.register(key)
        assert found.register(key) == number
        assert connected() == {}
        assert found._state.activate_node(number, 30.0)
        (since,) = connected().values()
        assert list(connected()) == [key]
        assert since
        assert found._state.acknowledge_node_heartbeat(number, 30.0)
        assert list(connected().values()) == [since]  # a beat is no new connection
        first, second = found.begin_run({"plan": "a"}), found.begin_run({"plan": "b"})
        assert first.run_id != second.run_id
        assert first.token != second.token
        assert found.keep_alive(first)
        (run,) = found._state.get_run_info(run_ids=[first.run_id])
        assert dict(run.override_config) == {"plan": "a"}
        for _ in range(2):
            found.end_run(first.run_id)
        assert not found.keep_alive(first)
        assert found.keep_alive(second)
        assert found.end_all_runs() == 1
        assert found.end_all_runs() == 0
        assert not found.keep_alive(second)
        monkeypatch.setattr(found._state, "claim_task", lambda task: None)
        with pytest.raises(LinkRefused, match="Flower did not begin the run"):
            found.begin_run({})
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def test_flowers_client_can_be_given_our_own_line():
    from wardround.client.network.link import Line

    line = Line("localhost:1", ssl.create_default_context(), ec.generate_private_key(ec.SECP384R1()), None)
    client = line._client
    for call in ("ActivateNode", "DeactivateNode", "PullMessages", "PushMessages", "GetRun", "PullObject", "PushObject",
                 "ConfirmMessageReceived", "SendNodeHeartbeat"):  # fmt: skip
        assert callable(getattr(client, call)), call
    assert client._base_url == "https://localhost:1"
    assert isinstance(client._client, httpx.Client)
    assert not client._client.is_closed
    line.close()
    assert client._client.is_closed


def test_flowers_grid_speaks_for_a_ticket():
    from wardround.server.network.link import Ticket, inner_grid

    grid = inner_grid(1, Ticket(7, 8, "token"), most=100, seconds=1.0)
    assert grid.run.run_id == 7
    for call in ("get_nodes", "push_messages", "pull_messages", "set_run"):
        assert callable(getattr(grid, call)), call
    assert callable(grid._runtime_client.PullMessages)
    assert callable(grid._runtime_client.PullObject)
    grid.close()


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
