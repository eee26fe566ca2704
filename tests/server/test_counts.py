"""Classes are counted once, from sound answers, and what was counted goes into every order ever after."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from tests.server.conftest import MeddledGrid, coordinate, progress
from wardround.client.data import open_records
from wardround.common.refusals import REFUSED
from wardround.common.tasks.of_plan import packed
from wardround.server.account import study_facts
from wardround.server.checkpoint import Counted, Progress
from wardround.server.counts import deviation, shares
from wardround.simulations.scenario import Scenario

Small = Callable[..., Scenario]
NAMES = ("cleveland", "hungarian", "switzerland", "va")
COUNTED = {"class_weights": "counted"}


class Counting(MeddledGrid):
    """`lie` changes what comes back from a count; `orders` holds the shares in every order that went out."""

    def __init__(self, scenario: Scenario, lie: Callable[[str, Message, Message], Message] | None = None) -> None:
        super().__init__(scenario)
        self.lie, self.asked, self.orders = lie, 0, []

    def _answered(self, message: Message) -> Message:
        reply = super()._answered(message)
        kind = message.metadata.message_type
        if kind in ("train", "evaluate"):
            self.orders.append(message.content["facts"]["shares"])
        if kind != "query.counts":
            return reply
        self.asked += 1
        return self.lie(self.site_of[message.metadata.dst_node_id], message, reply) if self.lie else reply


def told(reply: Message, question: Message, **facts: object) -> Message:
    return Message(RecordDict({"facts": ConfigRecord({**reply.content["facts"], **facts})}), reply_to=question)  # type: ignore[arg-type]


def true_counts(scenario: Scenario, sites: tuple[str, ...] = NAMES) -> list[float]:
    labels = [open_records(scenario.source(site), scenario.task)[0].label.numpy() for site in sites]
    return np.bincount(np.concatenate(labels), minlength=2).astype(float).tolist()


def test_without_privacy_the_counts_are_those_of_all_training_patients_and_go_into_every_order(small: Small):
    scenario = small(loss=COUNTED)
    grid = Counting(scenario)
    assert coordinate(scenario, grid) == ""
    found = progress(scenario)
    assert found.counted == Counted(list(NAMES), true_counts(scenario), {})
    total = sum(true_counts(scenario))
    assert shares(scenario.study.plan, found) == pytest.approx([count / total for count in true_counts(scenario)])
    assert grid.orders == [packed(shares(scenario.study.plan, found))] * 12
    assert grid.asked == 4


def test_with_privacy_the_counts_are_noised_and_the_report_says_by_how_much_and_what_it_costs(small: Small):
    scenario = small(privacy=True, loss=COUNTED, validation={"share": 0.4, "every": 1})
    assert coordinate(scenario, Counting(scenario)) == ""
    found, plan = progress(scenario), scenario.study.plan
    assert found.counted is not None
    assert deviation(plan, found.counted) == 20.0  # of the sum of four sites, 10 each
    assert max(abs(a - b) for a, b in zip(found.counted.counts, true_counts(scenario), strict=True)) < 20 * 8 + 300
    assert found.counted.counts != [float(round(count)) for count in found.counted.counts]
    facts = study_facts(scenario.study, found)
    assert facts["class_counts"]["deviation"] == 20.0
    assert math.fsum(facts["class_counts"]["shares"]) == pytest.approx(1)
    va = facts["privacy"]["va"]
    assert va["epsilon"] == max(va["epsilon_training"], va["epsilon_aside"]) <= plan.private().epsilon
    assert va["epsilon"] == plan.cost().epsilon(1e-5) == va["planned"]
    assert va["epsilon_training"] > small("bare", privacy=True).study.plan.cost().epsilon(1e-5)
    assert (va["looks"], va["looks_planned"], va["counts_noise_multiplier"]) == (3, 3, 10.0)


def test_a_resumed_study_asks_nobody_again_and_keeps_its_weights(small: Small):
    scenario = small(privacy=True, loss=COUNTED)
    grid, kept = Counting(scenario), []
    honest = Progress.save

    class Killed(BaseException):
        pass

    def deadly(self: Progress, *given: object) -> None:
        honest(self, *given)  # type: ignore[arg-type]
        if self.round == 1 and not kept:
            kept.append(self.counted)
            raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Progress, "save", deadly)
        with pytest.raises(Killed):
            coordinate(scenario, grid)
        second = Counting(scenario)
        assert coordinate(scenario, second) == ""
    assert (grid.asked, second.asked) == (4, 0)
    assert progress(scenario).counted == kept[0]
    assert set(grid.orders + second.orders) == {packed(shares(scenario.study.plan, progress(scenario)))}


def test_a_coordinator_killed_before_it_wrote_the_counts_down_gets_the_same_ones(small: Small, monkeypatch: pytest.MonkeyPatch):
    scenario = small(privacy=True, loss=COUNTED)
    honest, seen = Progress.save, []

    class Killed(BaseException):
        pass

    def deadly(self: Progress, *given: object) -> None:
        if self.counted is not None:
            seen.append(self.counted)
            if len(seen) == 1:
                raise Killed
        honest(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Progress, "save", deadly)
    with pytest.raises(Killed):
        coordinate(scenario, Counting(scenario))
    second = Counting(scenario)
    assert coordinate(scenario, second) == ""
    assert second.asked == 4
    assert all(counted == seen[0] for counted in seen)


def counts(*values: float) -> bytes:
    return np.array(values, "<f8").tobytes()


LIES: dict[str, tuple[Callable[[Message, Message], Message], str]] = {
    "a class more": (lambda q, r: told(r, q, sums=counts(1, 2, 3)), "those of 2 classes"),
    "nothing": (lambda q, r: told(r, q, sums=b""), "those of 2 classes"),
    "not a number": (lambda q, r: told(r, q, sums=counts(math.nan, 1)), "counts are none"),
    "infinity": (lambda q, r: told(r, q, sums=counts(math.inf, 1)), "counts are none"),
    "less than nobody": (lambda q, r: told(r, q, sums=counts(-5, 1)), "counts are none"),
    "another site": (lambda q, r: told(r, q, site="cleveland"), "another question"),
    "another run": (lambda q, r: told(r, q, run="0" * 16), "another question"),
    "a tally": (lambda q, r: told(r, q, kind="tally"), "is no counts"),
    "an error": (lambda q, r: Message(Error(REFUSED, "no\x1b[31m way"), reply_to=q), "no [31m way"),
    "more beside it": (
        lambda q, r: Message(RecordDict({"facts": r.content["facts"], "more": ConfigRecord()}), reply_to=q), "nothing else",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lie", "why"), LIES.values(), ids=LIES)
def test_a_lying_site_is_left_out_of_the_counts_and_not_of_the_study(
    small: Small, lie: Callable[[Message, Message], Message], why: str
):
    scenario = small(rounds=1, loss=COUNTED)
    liar = Counting(scenario, lambda site, question, reply: lie(question, reply) if site == "va" else reply)
    assert coordinate(scenario, liar) == ""
    found = progress(scenario)
    assert found.counted is not None
    assert found.counted.sites == list(NAMES[:3])
    assert found.counted.counts == true_counts(scenario, NAMES[:3])
    assert why in found.counted.missing["va"]
    assert found.history[0].sites == list(NAMES)


def test_too_few_counts_stop_the_study_before_anything_is_trained(small: Small):
    scenario = small(loss=COUNTED, min_sites=3)
    few = Counting(scenario, lambda site, q, r: r if site in NAMES[:2] else told(r, q, sums=b""))
    assert "only 2 of at least 3 sites counted their classes" in coordinate(scenario, few)
    assert few.orders == []


def test_a_study_that_counts_nothing_asks_nobody_and_sends_no_shares(small: Small):
    scenario = small()
    grid = Counting(scenario)
    assert coordinate(scenario, grid) == ""
    assert (grid.asked, set(grid.orders), progress(scenario).counted) == (0, {b""}, None)
    assert study_facts(scenario.study, progress(scenario))["class_counts"] is None
