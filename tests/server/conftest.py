"""A real coordinator over real hospitals, with somebody in between who changes what is said."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import tomli_w
from flwr.app import ConfigRecord, Context, Message, RecordDict

from tests.conftest import repeatable_coins
from wardround.client.app import client_app
from wardround.common.errors import StudyStopped
from wardround.server.app import server_app
from wardround.server.checkpoint import Progress
from wardround.simulations.grid import LocalGrid
from wardround.simulations.scenario import Changes, Scenario

Between = Callable[[str, Message, Message], Message | list[Message]]  # site, order, its honest reply -> what arrives


class MeddledGrid(LocalGrid):
    """A LocalGrid with `between` on the wire; `silent` sites answer no order; `order` says how waiting replies arrive."""

    def __init__(self, scenario: Scenario, between: Between | None = None) -> None:
        self.text = scenario.study.text
        super().__init__(lambda: client_app(repeatable_coins), list(scenario.sites.values()), {"plan": self.text})
        self.between = between
        self.silent: set[str] = set()
        self.order: Callable[[list[Message]], Iterable[Message]] | None = None
        self.site_of = {1000 + number: site for number, site in enumerate(scenario.sites)}

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids)
        mine = [m for m in self._queue if m.metadata.message_id in wanted]
        asked = [m for m in mine if self._speaks(m)]
        if self.order is None:
            asked = asked[:1]
        self._queue = type(self._queue)(m for m in self._queue if m not in asked)
        replies = [reply for message in asked for reply in self._meddled(message)]
        return list(self.order(replies)) if self.order else replies

    def _speaks(self, message: Message) -> bool:
        return message.metadata.message_type != "train" or self.site_of[message.metadata.dst_node_id] not in self.silent

    def _meddled(self, message: Message) -> list[Message]:
        reply = self._answered(message)
        if self.between is None or message.metadata.message_type != "train":
            return [reply]
        changed = self.between(self.site_of[message.metadata.dst_node_id], message, reply)
        return changed if isinstance(changed, list) else [changed]


def coordinate(scenario: Scenario, grid: LocalGrid, **config: str) -> str:
    """Run the ServerApp; returns why the study stopped, or nothing."""
    run_config = {"plan": scenario.study.text, "folder": str(scenario.folder), **config}
    try:
        server_app()(grid, Context(grid.run.run_id, 1, {}, RecordDict(), dict(run_config)))
    except StudyStopped as stopped:
        return str(stopped)
    return ""


def progress(scenario: Scenario) -> Progress:
    found = Progress.latest(scenario.folder / "checkpoints", study=scenario.study.digest)
    assert found is not None
    return found


def rewritten(reply: Message, order: Message, *, tensors: object = None, **facts: object) -> Message:
    """The same reply with other facts or tensors."""
    record = ConfigRecord({**reply.content["facts"], **facts})  # type: ignore[arg-type]
    model = reply.content["model"] if tensors is None else tensors
    return Message(RecordDict({"facts": record, "model": model}), reply_to=order)


@pytest.fixture
def small(tmp_path: Path, study_file: Path) -> Callable[..., Scenario]:
    """A study of four hospitals and three rounds, without privacy: `small(lost_rounds=2)` changes keys of its plan."""

    def prepare(name: str = "run", *, privacy: bool = False, noise: float = 8.0, **keys: object) -> Scenario:
        table = tomllib.loads(study_file.read_text())
        table |= {"rounds": 3, "step": {"rule": "sgd"}}
        table["privacy"] |= {"noise_multiplier": noise, "max_attempts": keys.pop("max_attempts", 1)}
        if not privacy:
            table.pop("privacy")
        for key, value in keys.items():
            table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / f"{name}.toml"
        path.write_text(tomli_w.dumps(table))
        return Scenario.prepare(path, tmp_path / name, Changes())

    return prepare
