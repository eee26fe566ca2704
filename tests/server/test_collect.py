"""One bad reply costs one site one round, and nothing else."""

from __future__ import annotations

import itertools
import math
import random
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.conftest import MeddledGrid, coordinate, progress, rewritten
from wardround.common.plan import StudyPlan
from wardround.common.refusals import REFUSED, ROUND_TAKEN
from wardround.common.weights import LiveArray, Shapes, Weights, pack
from wardround.server import collect as collect_module
from wardround.server.combine import combiner
from wardround.server.step import learning_rate, released, step
from wardround.simulations.scenario import Scenario

Small = Callable[..., Scenario]
HOSTILE = "\x1b[31mdropped\r\n\0 all tables" + "x" * 10_000
NAMES = ("cleveland", "hungarian", "switzerland", "va")


# ---- bad replies, through the real ServerApp


def poisoned(value: float) -> Callable[[Message, Message], Message]:
    def change(order: Message, reply: Message) -> Message:
        tensors = {name: array.tensor.clone() for name, array in reply.content["model"].items()}
        next(iter(tensors.values())).view(-1)[3] = value
        return rewritten(reply, order, tensors=pack(tensors))

    return change


def with_arrays(change: Callable[[ArrayRecord], ArrayRecord]) -> Callable[[Message, Message], Message]:
    return lambda order, reply: rewritten(reply, order, tensors=change(reply.content["model"]))


def with_facts(**facts: object) -> Callable[[Message, Message], Message]:
    return lambda order, reply: rewritten(reply, order, **facts)


def first_replaced(array: Callable[[Array], Array]) -> Callable[[Message, Message], Message]:
    def change(record: ArrayRecord) -> ArrayRecord:
        return ArrayRecord({name: array(a) if number == 0 else a for number, (name, a) in enumerate(record.items())})

    return with_arrays(change)


def huge(array: Array) -> Array:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    return Array("float32", array.shape, "numpy.ndarray", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def hollow(order: Message, reply: Message) -> Message:
    return Message(RecordDict(), reply_to=order)


BAD: dict[str, tuple[Callable[[Message, Message], Message], str]] = {
    "not a number": (poisoned(math.nan), "not finite"),
    "infinity": (poisoned(math.inf), "not finite"),
    "a length beyond float32": (poisoned(3e38), "not finite"),
    "wrong shape": (first_replaced(lambda a: LiveArray(a.tensor.T)), "should have shape"),
    "a shape that would broadcast": (first_replaced(lambda a: LiveArray(torch.ones(1))), "should have shape"),
    "float64": (first_replaced(lambda a: Array(a.tensor.double().numpy())), "should be float32"),
    "10^12 numbers": (first_replaced(huge), "is not a float32 array"),
    "a tensor less": (with_arrays(lambda r: ArrayRecord(dict(list(r.items())[1:]))), "is missing"),
    "a tensor more": (with_arrays(lambda r: ArrayRecord({**r, "x": LiveArray(torch.ones(1))})), "not part of the model"),
    "another site's name": (with_facts(site="cleveland"), "another site's name"),
    "another round": (with_facts(round=7), "another round"),
    "another attempt": (with_facts(attempt=2), "another round"),
    "another run": (with_facts(run="0" * 16), "another round"),
    "another study": (with_facts(study="0" * 64), "another round"),
    "negative steps": (with_facts(steps_spent=-1), "counts its steps wrongly"),
    "9 * 10^18 steps": (with_facts(steps_spent=9 * 10**18), "counts its steps wrongly"),
    "a number of patients": (with_facts(num_examples=10**9), "has other fields"),
    "a weight": (with_facts(weight=1e9), "has other fields"),
    "nothing": (hollow, "the message is no update"),
    "facts without fields": (lambda o, r: Message(RecordDict({"facts": ConfigRecord({"kind": "update"})}), reply_to=o),
                             "has other fields"),
    "facts without a model": (lambda o, r: Message(RecordDict({"facts": r.content["facts"]}), reply_to=o), "facts and one"),
    "an error without a reason": (lambda o, r: Message(Error(REFUSED, ""), reply_to=o), "no reason given"),
    "an error in hostile words": (lambda o, r: Message(Error(REFUSED, HOSTILE), reply_to=o), "dropped"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "why"), BAD.values(), ids=BAD)
def test_a_bad_reply_is_dropped_and_named_and_the_study_goes_on(
    small: Small, change: Callable[[Message, Message], Message], why: str
):
    scenario = small()

    def between(site: str, order: Message, reply: Message) -> Message:
        return change(order, reply) if site == "va" else reply

    assert coordinate(scenario, MeddledGrid(scenario, between)) == ""
    found = progress(scenario)
    assert found.round == 3
    for record in found.history:
        assert not record.lost
        assert record.sites == ["cleveland", "hungarian", "switzerland"]
        assert list(record.dropped) == ["va"]
        assert why in record.dropped["va"]
        assert len(record.dropped["va"]) <= 300
        assert record.dropped["va"].isprintable()
    assert all(tensor.isfinite().all() for tensor in found.weights.values())


def test_a_dropped_site_leaves_the_mean_of_the_others():
    plan = plan_with()
    answers = updates(4)
    assert same(folded(plan, dict(zip(NAMES[:3], answers[:3], strict=True))), mean(plan, answers[:3]), 1e-6)


def test_a_reply_that_comes_twice_counts_once(small: Small):
    once, twice = small("once"), small("twice", deadline_seconds=5.0)
    coordinate(once, MeddledGrid(once))
    coordinate(twice, MeddledGrid(twice, lambda site, order, reply: [reply, reply]))
    assert same(progress(once).weights, progress(twice).weights)
    assert progress(twice).history[0].sites == list(NAMES)


def test_a_reply_to_a_question_nobody_asked_is_ignored(small: Small):
    scenario, honest = small(), small("honest")

    def between(site: str, order: Message, reply: Message) -> list[Message]:
        stray = rewritten(reply, order, site="va", tensors=pack({"x": torch.ones(1)}))
        stray.metadata.__dict__["_reply_to_message_id"] = "nobody"
        return [stray, reply] if site == "cleveland" else [reply]

    coordinate(honest, MeddledGrid(honest))
    assert coordinate(scenario, MeddledGrid(scenario, between)) == ""
    assert same(progress(scenario).weights, progress(honest).weights)
    assert not progress(scenario).history[0].dropped


# ---- lost rounds, deadlines, order


def test_a_round_below_min_sites_changes_nothing_and_the_third_in_a_row_ends_the_study(small: Small):
    scenario = small(rounds=10, min_sites=4, local={"learning_rate": 0.5})
    state: list[Weights] = []

    def between(site: str, order: Message, reply: Message) -> Message:
        state.append({name: a.tensor.clone() for name, a in order.content.array_records["model"].items()})
        number = order.content.config_records["facts"]["round"]
        return poisoned(math.nan)(order, reply) if site == "va" and number not in (1, 4) else reply

    reason = coordinate(scenario, MeddledGrid(scenario, between))
    assert reason.startswith("3 rounds in a row had fewer than 4 sites (va: the update holds numbers that are not finite")
    found = progress(scenario)
    assert found.round == 7
    assert [record.lost for record in found.history] == [False, True, True, False, True, True, True]
    assert [record.update_norm is None for record in found.history] == [record.lost for record in found.history]
    models = state[::4]
    assert not same(models[0], models[1])
    assert same(models[1], models[2])  # round 2 was lost
    assert same(models[2], models[3])
    assert same(found.weights, models[6])


def test_a_study_in_which_every_round_was_lost_is_never_called_completed(small: Small):
    scenario = small(rounds=2, lost_rounds=3)
    reason = coordinate(scenario, MeddledGrid(scenario, lambda site, order, reply: poisoned(math.nan)(order, reply)))
    assert reason.startswith("none of 2 rounds had 3 sites")
    assert not (scenario.folder / "model.safetensors").exists()


def test_a_site_that_never_answers_is_dropped_at_the_deadline(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collect_module, "_POLL_SECONDS", 0.01)
    scenario = small(rounds=2, deadline_seconds=0.5)
    grid = MeddledGrid(scenario)
    grid.silent = {"va"}
    assert coordinate(scenario, grid) == ""
    for record in progress(scenario).history:
        assert record.dropped == {"va": "no answer within 0.5 s"}
        assert record.sites == ["cleveland", "hungarian", "switzerland"]


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_arrival_does_not_change_a_bit(small: Small, seed: int):
    first, second = small("first"), small("second")
    coordinate(first, MeddledGrid(first))
    grid, coins = MeddledGrid(second), random.Random(seed)
    grid.order = lambda replies: coins.sample(replies, len(replies))
    coordinate(second, grid)
    assert same(progress(first).weights, progress(second).weights)
    assert progress(second).history[0].sites == list(NAMES)


def test_the_coordinator_holds_one_update_at_a_time(small: Small):
    seen: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def between(site: str, order: Message, reply: Message) -> Message:
        nonlocal most
        tensors = {name: array.tensor.clone() for name, array in reply.content["model"].items()}
        seen.append(weakref.ref(next(iter(tensors.values()))))
        most = max(most, sum(tensor() is not None for tensor in seen))
        return rewritten(reply, order, tensors=pack(tensors))

    scenario = small()
    coordinate(scenario, MeddledGrid(scenario, between))
    assert most == 1


# ---- attempts


@pytest.mark.parametrize(("allowed", "expected"), [(1, 1), (2, 2), (3, 2)])
def test_a_taken_round_is_ordered_anew_only_as_often_as_the_plan_pays_for(small: Small, allowed: int, expected: int):
    scenario = small(privacy=True, noise=40.0, max_attempts=allowed, rounds=1)
    asked: list[int] = []

    def between(site: str, order: Message, reply: Message) -> Message:
        if site != "va":
            return reply
        attempt = order.content.config_records["facts"]["attempt"]
        asked.append(attempt)
        return Message(Error(ROUND_TAKEN, "taken"), reply_to=order) if attempt == 1 else reply

    assert coordinate(scenario, MeddledGrid(scenario, between)) == ""
    assert asked == list(range(1, expected + 1))
    (record,) = progress(scenario).history
    assert record.attempt == expected
    assert ("va" in record.sites) == (allowed > 1)


def test_a_site_that_always_says_taken_is_asked_a_bounded_number_of_times(small: Small):
    scenario = small(privacy=True, noise=40.0, max_attempts=3, rounds=1)
    asked = []

    def between(site: str, order: Message, reply: Message) -> Message:
        asked.append(site)
        return Message(Error(ROUND_TAKEN, "taken"), reply_to=order) if site == "va" else reply

    coordinate(scenario, MeddledGrid(scenario, between))
    assert asked.count("va") == 3
    assert progress(scenario).history[0].dropped == {"va": "taken"}


# ---- combining


def updates(count: int, seed: int = 0) -> list[Weights]:
    random = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(3, 2, generator=random), "b": torch.randn(2, generator=random)} for _ in range(count)]


def folded(plan: StudyPlan, answers: dict[str, Weights]) -> Weights:
    shapes = Shapes({"w": (3, 2), "b": (2,)})
    line = combiner(plan, shapes)
    for site, update in answers.items():
        line.add({name: tensor.clone() for name, tensor in update.items()}, plan.weights()[site])
    return line.result()


def mean(plan: StudyPlan, answers: list[Weights]) -> Weights:
    share = [plan.weights()[site] for site in NAMES[: len(answers)]]
    return {
        name: torch.from_numpy(np.average([a[name].double().numpy() for a in answers], axis=0, weights=share)).float()
        for name in ("w", "b")
    }


def same(a: Weights, b: Weights, tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance) for name in a)


def plan_with(**keys: object) -> StudyPlan:
    sites = {"cleveland": 200, "hungarian": 200, "switzerland": 82, "va": 130}
    table = {"name": "laws", "task": "heart-disease", "rounds": 3, "min_sites": 3, "sites": sites}
    return StudyPlan.build(table | keys, source="a test")


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed-mean"])
def test_what_all_sites_agree_on_is_the_outcome(rule: str):
    plan = plan_with(combine=rule)
    (update,) = updates(1)
    assert same(folded(plan, dict.fromkeys(NAMES, update)), update, 1e-6)


def test_the_mean_counts_sites_by_their_declared_patients():
    plan = plan_with()
    answers = updates(4)
    assert same(folded(plan, dict(zip(NAMES, answers, strict=True))), mean(plan, answers), 1e-6)
    equal = plan_with(weighting="equal")
    plain = {name: torch.stack([a[name] for a in answers]).mean(0) for name in ("w", "b")}
    assert same(folded(equal, dict(zip(NAMES, answers, strict=True))), plain, 1e-6)
    assert not same(folded(plan, dict(zip(NAMES, answers, strict=True))), plain, 1e-3)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
@pytest.mark.parametrize("lie", [1e9, -1e9])
def test_one_liar_moves_a_robust_rule_no_further_than_the_honest_ones(rule: str, lie: float):
    plan = plan_with(combine=rule)
    answers = updates(4)
    liar = {name: torch.full_like(tensor, lie) for name, tensor in answers[3].items()}
    found = folded(plan, dict(zip(NAMES, [*answers[:3], liar], strict=True)))
    for name in ("w", "b"):
        honest = torch.stack([a[name] for a in answers[:3]])
        assert (found[name] >= honest.min(0).values).all()
        assert (found[name] <= honest.max(0).values).all()
    assert folded(plan_with(), {"cleveland": answers[0], "va": liar})["b"].abs().max() > 1e6  # a mean is no defence


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_a_robust_rule_does_not_care_who_said_what(rule: str):
    plan = plan_with(combine=rule)
    answers = updates(4)
    first = folded(plan, dict(zip(NAMES, answers, strict=True)))
    for order in itertools.permutations(answers):
        assert same(folded(plan, dict(zip(NAMES, order, strict=True))), first, 1e-7)


def test_median_and_trimmed_mean_are_numpys():
    for count in (3, 4):
        answers = updates(count)
        values = np.stack([a["w"].numpy() for a in answers])
        given_to = dict(zip(NAMES, answers, strict=False))
        median = folded(plan_with(combine="median"), given_to)["w"]
        assert np.allclose(median, np.median(values, axis=0), atol=1e-7)
        trimmed = folded(plan_with(combine="trimmed-mean", trim=0.25), given_to)["w"]
        assert np.allclose(trimmed, np.sort(values, axis=0)[1:-1].mean(0), atol=1e-7)


# ---- stepping


def walk(plan: StudyPlan, seen: list[Weights]) -> tuple[Weights, dict[str, torch.Tensor]]:
    weights: Weights = {"w": torch.ones(3, 2), "b": torch.zeros(2)}
    state: dict[str, torch.Tensor] = {}
    for number, update in enumerate(seen, start=1):
        before = {name: tensor.clone() for name, tensor in weights.items()}
        moved, state = step(weights, update, state, plan, number)
        assert same(weights, before)  # nothing is written in place
        weights = moved
    return weights, state


def test_sgd_adds_the_update_times_its_rate():
    seen = updates(3)
    found, _ = walk(plan_with(step={"learning_rate": 0.5}), seen)
    assert same(found, {n: (torch.ones(3, 2) if n == "w" else 0) + 0.5 * sum(u[n] for u in seen) for n in ("w", "b")}, 1e-6)


def test_adam_is_torchs_adam_on_minus_the_update():
    plan = plan_with(rounds=9, step={"rule": "adam", "learning_rate": 0.1, "second_momentum": 0.95, "epsilon": 1e-2})
    seen = updates(9)
    found, _ = walk(plan, seen)
    parameters = {"w": torch.ones(3, 2, requires_grad=True), "b": torch.zeros(2, requires_grad=True)}
    adam = torch.optim.Adam(parameters.values(), lr=0.1, betas=(0.9, 0.95), eps=1e-2)
    for update in seen:
        for name, parameter in parameters.items():
            parameter.grad = -update[name]
        adam.step()
    assert same(found, {name: p.detach() for name, p in parameters.items()}, 1e-5)


def test_momentum_is_torchs_momentum():
    plan = plan_with(rounds=9, step={"rule": "momentum", "learning_rate": 0.1, "momentum": 0.7})
    seen = updates(9)
    found, _ = walk(plan, seen)
    parameters = {"w": torch.ones(3, 2, requires_grad=True), "b": torch.zeros(2, requires_grad=True)}
    sgd = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.7)
    for update in seen:
        for name, parameter in parameters.items():
            parameter.grad = -update[name]
        sgd.step()
    assert same(found, {name: p.detach() for name, p in parameters.items()}, 1e-5)


@given(st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_yogi_follows_its_paper(values: list[float]):
    plan = StudyPlan.parse(
        'name = "y"\ntask = "t"\nrounds = 8\n[sites]\na = 10\nb = 10\n'
        '[step]\nrule = "yogi"\nlearning_rate = 0.1\nmomentum = 0.8\nsecond_momentum = 0.9'
    )
    weights: Weights = {"w": torch.zeros(())}
    state: dict[str, torch.Tensor] = {}
    w = m = v = 0.0
    for t, value in enumerate(values, start=1):
        weights, state = step(weights, {"w": torch.tensor(value)}, state, plan, t)
        m = 0.8 * m + 0.2 * value
        v = v - 0.1 * value**2 * np.sign(v - value**2)
        w += 0.1 * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-3)
        assert float(weights["w"]) == pytest.approx(w, rel=1e-3, abs=1e-4)


def test_the_rate_falls_in_a_straight_line_to_its_share():
    plan = plan_with(rounds=5, step={"learning_rate": 2.0, "decay_to": 0.2})
    assert [learning_rate(plan, number) for number in range(1, 6)] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])
    assert learning_rate(plan_with(rounds=1, step={"decay_to": 0.5}), 1) == 1.0


@pytest.mark.parametrize(("rounds", "share", "last"), [(10, 0.5, 5), (10, 0.3, 3), (10, 0.9, 9), (100, 0.07, 7), (7, 0.5, 4)])
def test_the_released_model_is_the_mean_of_the_last_rounds(rounds: int, share: float, last: int):
    plan = plan_with(rounds=rounds, step={"average_last": share})
    seen = updates(rounds)
    weights, state = walk(plan, seen)
    path = torch.ones(3, 2) + torch.stack([update["w"] for update in seen]).cumsum(0)
    assert torch.allclose(released(weights, state)["w"], path[-last:].mean(0), atol=1e-5)
    assert torch.allclose(weights["w"], path[-1], atol=1e-5)


def test_without_averaging_the_newest_model_is_released():
    weights, state = walk(plan_with(), updates(3))
    assert same(released(weights, state), weights)
