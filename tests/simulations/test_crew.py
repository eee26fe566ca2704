"""Forked processes: the same bits as one process, and a death among them is not the study's."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from tests.conftest import repeatable_coins
from tests.forked import Forked
from wardround.client.app import client_app
from wardround.common.messages import OrderFacts, UpdateFacts, pack_with_model
from wardround.common.weights import Shapes, Weights, pack, unpack
from wardround.server.app import server_app
from wardround.server.checkpoint import Progress, RoundRecord
from wardround.server.federation import Observer
from wardround.simulations.grid import LocalGrid
from wardround.simulations.scenario import Scenario

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def trained(scenario: Scenario, processes: int, observer: Observer | None = None) -> Progress:
    run_config = {"plan": scenario.study.text, "folder": str(scenario.folder)}
    app, sites = server_app(observer), list(scenario.sites.values())
    with LocalGrid(lambda: client_app(repeatable_coins), sites, run_config, processes) as grid:
        app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), dict(run_config)))
    found = Progress.latest(scenario.folder / "checkpoints", study=scenario.study.digest)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    with pytest.raises(ChildProcessError):  # neither running nor a zombie
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("without_privacy", [True, False], ids=["plain", "private"])
def test_the_bits_do_not_depend_on_the_number_of_processes(scenario: Callable[..., Scenario], without_privacy: bool):
    runs = [
        trained(scenario(f"with-{processes}", rounds=4, without_privacy=without_privacy), processes) for processes in (1, 2, 3)
    ]
    for other in runs[1:]:
        assert all(torch.equal(runs[0].weights[name], other.weights[name]) for name in runs[0].weights)
        assert [record.sites for record in other.history] == [record.sites for record in runs[0].history]
        assert [record.steps_spent for record in other.history] == [record.steps_spent for record in runs[0].history]
        assert other.history[-1].sites == ["cleveland", "hungarian", "switzerland", "va"]


def test_forty_sites_on_two_processes(scenario: Callable[..., Scenario]):
    one = trained(scenario("one", rounds=3, without_privacy=True, sites=40), 1)
    two = trained(scenario("two", rounds=3, without_privacy=True, sites=40), 2)
    assert len(two.history[-1].sites) == 40
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)


def test_the_parent_opens_no_ledger(scenario: Callable[..., Scenario]):
    # SQLite must not be carried through a fork
    prepared = scenario(rounds=2)
    opened: list[str] = []

    def look(record: RoundRecord) -> None:
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                opened.append(str(link.readlink()))

    trained(prepared, 2, Observer(round_done=look))
    assert opened
    assert not [path for path in opened if path.startswith(str(prepared.folder.resolve() / "sites"))]


def test_a_killed_process_costs_its_replies_and_no_more(scenario: Callable[..., Scenario]):
    prepared = scenario(rounds=4, sites=8, without_privacy=True)

    def kill(record: RoundRecord) -> None:
        if record.round == 2:
            os.kill(children()[0], signal.SIGKILL)

    history = trained(prepared, 2, Observer(round_done=kill)).history
    assert [len(record.sites) for record in history[:2]] == [8, 8]
    assert 4 <= len(history[2].sites) < 8
    assert set(history[2].dropped.values()) == {"the process that served this site died"}
    assert len(history[3].sites) == 8


# Below: a client app of our own, which does what the `run` of an order says.

SHAPES = Shapes({"w": (3,), "b": ()})


def acting_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = OrderFacts.unpack(message.content)
        record = message.content.array_records["model"]
        weights = unpack(record, Shapes({name: tuple(array.shape) for name, array in record.items()}))
        what, _, how = order.run.partition(" ")
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "sleep":
            time.sleep(float(how))
        elif what == "raise":
            raise RuntimeError("KeyError: 'Hansen, 1952'")
        elif what == "refuse":
            return Message(Error(700, "not here"), reply_to=message)
        elif what == "misshape":
            weights = {"w": torch.zeros(7)}
        facts = UpdateFacts(str(os.getpid()), "s", order.run, order.round, 1, "", context.node_id)
        return Message(pack_with_model(facts, {n: t * context.node_id for n, t in weights.items()}), reply_to=message)

    return app


def grid_of(sites: int, processes: int) -> LocalGrid:
    return LocalGrid(acting_app, [Path(f"site-{number}") for number in range(sites)], {}, processes)


def ones(shapes: Shapes = SHAPES) -> Weights:
    return {name: torch.ones(shape) for name, shape in shapes.of.items()}


def orders(grid: LocalGrid, weights: Weights, *, run: str = "", only: list[int] | None = None) -> list[Message]:
    model = pack(weights)
    facts = OrderFacts("s", run, 1, 1, "")
    wanted = list(grid.get_node_ids()) if only is None else [list(grid.get_node_ids())[number] for number in only]
    return [Message(pack_with_model(facts, model), site, "train", group_id="1") for site in wanted]


def answers(grid: LocalGrid, ids: list[str]) -> list[tuple[int, Message, dict[str, float]]]:
    """(site, reply, one number of each tensor), read while the reply is good."""
    found, left = [], list(ids)
    while left and (arrived := list(grid.pull_messages(left))):
        (reply,) = arrived
        left.remove(reply.metadata.reply_to_message_id)
        record = {} if reply.has_error() else reply.content.array_records["model"]
        values = {name: float(array.__dict__["tensor"].reshape(-1)[-1]) for name, array in record.items()}
        found.append((reply.metadata.src_node_id, reply, values))
    return found


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text().split()]


def test_thousands_of_questions_wait_in_the_parent_and_not_in_a_pipe():
    with grid_of(3000, 2) as grid:
        ids = list(grid.push_messages(orders(grid, ones())))
        found = answers(grid, ids)
        assert [site for site, _, _ in found] == list(grid.get_node_ids())  # in the order of the questions
        assert all(values == {"w": site, "b": site} for site, _, values in found)  # nobody's memory was used twice


def test_a_site_lives_in_one_process():
    with grid_of(10, 3) as grid:
        homes = []
        for _ in range(3):
            found = answers(grid, list(grid.push_messages(orders(grid, ones()))))
            homes.append([reply.content.config_records["facts"]["site"] for _, reply, _ in found])
        assert homes[0] == homes[1] == homes[2]
        assert len(set(homes[0])) == 3
        assert str(os.getpid()) not in homes[0]


def test_more_processes_than_sites():
    with grid_of(2, 16) as grid:
        assert len(children()) == 2
        assert len(answers(grid, list(grid.push_messages(orders(grid, ones()))))) == 2


def test_models_of_other_shapes_and_other_numbers_come_in_turn():
    with grid_of(6, 2) as grid:
        other = Shapes({"x": (40, 40)})
        batches = [orders(grid, ones()), orders(grid, {n: 2 * t for n, t in ones().items()}), orders(grid, ones(other))]
        ids = [key for batch in batches for key in grid.push_messages(batch)]  # all at once: the third waits for the second
        found = answers(grid, ids)
        assert [values for _, _, values in found[:6]] == [{"w": site, "b": site} for site in grid.get_node_ids()]
        assert [values for _, _, values in found[6:12]] == [{"w": 2 * site, "b": 2 * site} for site in grid.get_node_ids()]
        assert [values for _, _, values in found[12:]] == [{"x": site} for site in grid.get_node_ids()]


@pytest.mark.parametrize(
    ("run", "reason"),
    [("raise", "the client app failed"), ("refuse", "not here"), ("misshape", "tensor w should have shape [3]")],
)
def test_error_replies_free_their_places(run: str, reason: str):
    with grid_of(30, 2) as grid:
        found = answers(grid, list(grid.push_messages(orders(grid, ones(), run=run))))
        assert [reply.error.reason for _, reply, _ in found] == [reason] * 30
        assert len(answers(grid, list(grid.push_messages(orders(grid, ones()))))) == 30


def test_deaths_in_the_middle_of_a_round():
    with grid_of(20, 2) as grid:
        first = orders(grid, ones(), only=list(range(7)))
        fatal = orders(grid, ones(), run="die", only=[7])
        last = orders(grid, ones(), only=list(range(8, 20)))
        ids = [key for batch in (first, fatal, last) for key in grid.push_messages(batch)]
        found = answers(grid, ids)
        assert [site for site, _, _ in found] == list(grid.get_node_ids())
        dead = [number for number, (_, reply, _) in enumerate(found) if reply.has_error()]
        assert 7 in dead
        assert all(number % 2 == 1 for number in dead)  # the sister's replies are all there
        assert not any(reply.has_error() for _, reply, _ in answers(grid, list(grid.push_messages(orders(grid, ones())))))


def test_a_round_that_was_given_up_does_not_block_the_next():
    # the deadline passed: some replies are done and unread, some orders are under way, most were never sent
    with grid_of(40, 2) as grid:
        slow = list(grid.push_messages(orders(grid, ones(), run="sleep 0.05")))
        assert len(list(grid.pull_messages(slow))) == 1
        time.sleep(0.2)
        began = time.monotonic()
        found = answers(grid, list(grid.push_messages(orders(grid, {n: 3 * t for n, t in ones().items()}))))
        assert [values for _, _, values in found] == [{"w": 3 * site, "b": 3 * site} for site in grid.get_node_ids()]
        assert time.monotonic() - began < 1.5  # 40 slow orders would take longer


def test_a_reply_is_good_until_the_next_pull():
    with grid_of(12, 2) as grid:
        ids = list(grid.push_messages(orders(grid, ones())))
        for site in grid.get_node_ids():
            (reply,) = grid.pull_messages(ids)
            time.sleep(0.01)  # whoever may write is writing now
            assert reply.content.array_records["model"]["w"].__dict__["tensor"].tolist() == [site] * 3
            ids.remove(reply.metadata.reply_to_message_id)


def started(act: Callable[[LocalGrid], object], sleep: float) -> tuple[Forked, list[int]]:
    """A process with a grid of two that are busy, which goes on with `act`; and the two."""

    def parent() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
        with grid_of(4, 2) as grid:
            grid.push_messages(orders(grid, ones(), run=f"sleep {sleep}"))
            print(*children(), flush=True)
            act(grid)

    process = Forked(parent)
    return process, [int(pid) for pid in process.stdout.readline().split()]


def gone(pids: list[int], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_parent_leaves_nobody_behind():
    parent, pids = started(lambda _: time.sleep(60), sleep=0.3)
    assert len(pids) == 2
    parent.kill()
    parent.communicate()
    assert gone(pids, 10)


def test_ctrl_c_ends_all_at_once():
    parent, pids = started(lambda grid: list(grid.pull_messages(["m4"])), sleep=60)
    assert len(pids) == 2
    for pid in (parent.pid, *pids):  # a terminal sends it to the whole group
        os.kill(pid, signal.SIGINT)
    _, text = parent.communicate(timeout=10)
    assert gone(pids, 5)
    assert text.count("KeyboardInterrupt") == 1  # the parent's
