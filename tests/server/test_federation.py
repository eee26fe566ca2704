"""A round of a federation is the mathematics it claims to be, among the hospitals it names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message, RecordDict

from tests.server.conftest import Between, MeddledGrid, coordinate, progress
from wardround.client.data import open_records
from wardround.common.errors import ConfigError
from wardround.common.messages import Present
from wardround.common.plan import SignedText
from wardround.common.refusals import REFUSED
from wardround.common.tasks import Records, Task
from wardround.common.vault import Vault
from wardround.common.weights import Weights, trainable
from wardround.server.federation import opened
from wardround.server.roll import call_the_roll
from wardround.simulations.scenario import Scenario

Small = Callable[..., Scenario]
HOSTILE = "\x1b[31mno\r\n" + "x" * 900


def loss_gradient(task: Task, weights: Weights, records: Records, weight: torch.Tensor | None = None) -> Weights:
    """By plain autograd, in float64, with a weight for each record."""
    model = task.model({"hidden": [16]}, 0).double()
    free = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    fields = {name: tensor.double() for name, tensor in records.fields.items()}
    each = task.loss(torch.func.functional_call(model, free, args=(), kwargs=fields), records.label)
    value = each.mean() if weight is None else (each * weight).sum()
    return dict(zip(free, torch.autograd.grad(value, list(free.values())), strict=True))


def first_model(scenario: Scenario) -> Weights:
    return trainable(scenario.task.model(scenario.study.plan.model, scenario.study.plan.seed))


def at_sites(scenario: Scenario) -> dict[str, Records]:
    return {site: open_records(scenario.source(site), scenario.task)[0] for site in scenario.sites}


def close(a: Weights, b: Weights, tolerance: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n].double(), b[n].double(), rtol=0, atol=tolerance) for n in a)


def test_a_round_of_fedsgd_is_one_centralised_gradient_step(small: Small):
    scenario = small(rounds=1, local={"steps": 1, "learning_rate": 0.5})
    coordinate(scenario, MeddledGrid(scenario))
    start, sites = first_model(scenario), at_sites(scenario)
    share = scenario.study.plan.weights()
    weight = torch.cat([torch.full((len(r),), share[site] / len(r), dtype=torch.float64) for site, r in sites.items()])
    gradient = loss_gradient(scenario.task, start, reduce(add, sites.values()), weight)
    assert close(progress(scenario).weights, {name: start[name] - 0.5 * gradient[name] for name in start})
    assert not close(progress(scenario).weights, start, 1e-4)


def test_fedavg_is_the_mean_of_what_each_site_learnt_alone(small: Small):
    scenario = small(
        rounds=3, weighting="equal", local={"steps": 4, "learning_rate": 0.2, "proximal": 0.3, "weight_decay": 0.01}
    )
    coordinate(scenario, MeddledGrid(scenario))
    weights: Weights = {name: tensor.double() for name, tensor in first_model(scenario).items()}
    for _ in range(3):
        learnt = []
        for records in at_sites(scenario).values():
            local = dict(weights)
            for _ in range(4):
                g = loss_gradient(scenario.task, local, records)
                local = {n: w - 0.2 * (g[n] + 0.01 * w + 0.3 * (w - weights[n])) for n, w in local.items()}
            learnt.append(local)
        weights = {name: torch.stack([local[name] for local in learnt]).mean(0) for name in weights}
    assert close(progress(scenario).weights, weights, 1e-5)


def test_the_first_model_follows_from_the_plans_seed(small: Small):
    one, two, other = (opened(small(name, seed=seed).study, None) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert close(one.weights, two.weights, 0)
    assert not close(one.weights, other.weights, 1e-3)
    assert one.run != two.run


# ---- who takes part


class Saying(MeddledGrid):
    """A grid on which some sites answer the roll call in other words."""

    def __init__(self, scenario: Scenario, words: dict[str, Callable[[Message, Message], Message]]) -> None:
        super().__init__(scenario)
        self.words = words

    def _meddled(self, message: Message) -> list[Message]:
        replies = super()._meddled(message)
        site = self.site_of[message.metadata.dst_node_id]
        if message.metadata.message_type == "query" and site in self.words:
            return [self.words[site](message, reply) for reply in replies]
        return replies


def saying(**facts: str) -> Callable[[Message, Message], Message]:
    def change(order: Message, reply: Message) -> Message:
        return Message(
            RecordDict({"facts": Present(**{**vars(Present.unpack(reply.content)), **facts}).record()}), reply_to=order
        )

    return change


def refusing(why: str) -> Callable[[Message, Message], Message]:
    return saying(refusal=why)


def test_only_sites_that_the_plan_names_take_part(small: Small):
    scenario = small()
    assert coordinate(scenario, Saying(scenario, {"va": saying(site="elsewhere")})) == ""
    assert progress(scenario).history[0].sites == ["cleveland", "hungarian", "switzerland"]


def test_a_site_that_means_another_study_does_not_take_part(small: Small):
    scenario = small()
    coordinate(scenario, Saying(scenario, {"va": saying(study="0" * 64)}))
    assert "va" not in progress(scenario).history[0].sites


def test_two_sites_with_one_name_stop_the_study(small: Small):
    scenario = small()
    assert coordinate(scenario, Saying(scenario, {"va": saying(site="cleveland")})) == "two sites call themselves cleveland"
    assert not (scenario.folder / "model.safetensors").exists()


class Late(MeddledGrid):
    """`va` connects only after the first round; somebody else may then claim to be cleveland."""

    def __init__(self, scenario: Scenario, between: Between | None = None) -> None:
        super().__init__(scenario, between)
        self.hidden = {number for number, site in self.site_of.items() if site == "va"}
        self.trained = 0

    def get_node_ids(self) -> list[int]:
        hidden = self.hidden if self.trained < 4 else set()
        return [number for number in super().get_node_ids() if number not in hidden]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        waiting = list(messages)
        self.trained += sum(message.metadata.message_type == "train" for message in waiting)
        return super().push_messages(waiting)


def test_a_site_that_connects_later_takes_part_from_then_on(small: Small):
    scenario = small()
    assert coordinate(scenario, Late(scenario)) == ""
    took_part = [record.sites for record in progress(scenario).history]
    assert "va" not in took_part[0]
    assert "va" in took_part[2]


def test_a_newcomer_cannot_take_the_name_of_a_connected_site(small: Small):
    scenario = small()

    class Impostor(Late):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            asked = list(messages)
            replies = list(super().send_and_receive(asked, timeout=timeout))
            orders = {message.metadata.message_id: message for message in asked}
            return [self.lying(orders[reply.metadata.reply_to_message_id], reply) for reply in replies]

        def lying(self, order: Message, reply: Message) -> Message:
            mine = order.metadata.dst_node_id in self.hidden and order.metadata.message_type == "query"
            return saying(site="cleveland")(order, reply) if mine else reply

    grid = Impostor(scenario)
    coordinate(scenario, grid)
    for record in progress(scenario).history:
        assert record.sites == ["cleveland", "hungarian", "switzerland"]


def test_one_answer_that_arrives_twice_is_one_site(small: Small):
    scenario = small()
    grid = MeddledGrid(scenario)
    send = grid.send_and_receive
    grid.send_and_receive = lambda messages, **options: [r for reply in send(messages, **options) for r in (reply, reply)]  # type: ignore[method-assign]
    assert list(call_the_roll(grid, scenario.study, "run").addresses) == list(scenario.sites)


def test_every_site_that_refuses_or_is_absent_is_named_with_its_reason(small: Small):
    scenario = small()
    words = {
        "cleveland": refusing("cleveland does not take part: epsilon 3 is too much"),
        "va": refusing("va does not take part: no such task"),
        "switzerland": lambda order, reply: Message(Error(REFUSED, HOSTILE), reply_to=order),
    }
    reason = coordinate(scenario, Saying(scenario, words))
    assert reason.startswith("1 of at least 3 sites take part. ")
    for said in ("cleveland does not take part: epsilon 3 is too much", "va does not take part", "not connected: switzerland"):
        assert said in reason


def test_what_a_site_says_at_the_roll_call_is_fit_for_a_terminal(small: Small, caplog: pytest.LogCaptureFixture):
    scenario = small(min_sites=4)
    words = {"va": refusing(HOSTILE), "cleveland": lambda order, reply: Message(Error(REFUSED, HOSTILE), reply_to=order)}
    reason = coordinate(scenario, Saying(scenario, words))
    assert reason.isprintable()
    assert len(reason) < 1000
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_one_refusal_does_not_stop_a_study_of_enough_others(small: Small):
    scenario = small()
    assert coordinate(scenario, Saying(scenario, {"va": refusing("va does not take part: too busy")})) == ""
    assert progress(scenario).round == 3
    assert progress(scenario).history[-1].sites == ["cleveland", "hungarian", "switzerland"]


def test_a_full_disk_stops_the_study_with_the_reason(small: Small, monkeypatch: pytest.MonkeyPatch):
    scenario, whole = small(), Vault.write

    def full(self: Vault, path: Path, *content: bytes, label: str) -> None:
        if path.name.startswith("round-000002"):
            raise OSError(28, "No space left on device")
        whole(self, path, *content, label=label)

    monkeypatch.setattr(Vault, "write", full)
    assert coordinate(scenario, MeddledGrid(scenario)) == "the checkpoint of round 2 cannot be written: No space left on device"
    assert progress(scenario).round == 1
    monkeypatch.undo()
    assert coordinate(scenario, MeddledGrid(scenario)) == ""
    assert progress(scenario).round == 3


def test_a_finished_study_stays_finished_when_the_sites_have_left(small: Small):
    scenario = small()
    coordinate(scenario, MeddledGrid(scenario))
    before = (scenario.folder / "model.safetensors").read_bytes()
    away = Saying(scenario, dict.fromkeys(scenario.sites, refusing("the study is over")))
    assert coordinate(scenario, away) == ""
    assert (scenario.folder / "model.safetensors").read_bytes() == before


def test_a_coordinator_without_a_plan_says_so(small: Small):
    for nothing in (None, "", 7, b"name"):
        with pytest.raises(ConfigError, match="no study plan came with the run"):
            SignedText.received(nothing)


class Restarting(MeddledGrid):
    """`va` comes back under another number while the old one is still listed for two more rounds."""

    def __init__(self, scenario: Scenario, between: Between | None = None) -> None:
        super().__init__(scenario, between)
        (self.old,) = (number for number, site in self.site_of.items() if site == "va")
        self.new, self.rounds = 2000, 0
        self._contexts[self.new] = self._contexts[self.old]
        self.site_of[self.new] = "va"

    def get_node_ids(self) -> list[int]:
        gone = {self.new} if self.rounds < 1 else {self.old} if self.rounds >= 3 else set()
        return [number for number in super().get_node_ids() if number not in gone]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        waiting = list(messages)
        self.rounds += any(message.metadata.message_type == "train" for message in waiting)
        return super().push_messages(waiting)

    def _speaks(self, message: Message) -> bool:
        return message.metadata.dst_node_id != self.old or self.rounds <= 1


def test_a_site_that_restarts_is_found_again_once_its_old_connection_is_gone(small: Small):
    scenario = small(rounds=6, deadline_seconds=0.3)
    assert coordinate(scenario, Restarting(scenario)) == ""
    took_part = ["va" in record.sites for record in progress(scenario).history]
    assert took_part[0]
    assert took_part[-1]
