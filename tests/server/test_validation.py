"""Looks decide what is released and when a study is over, and a site that lies about its tally is left out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from pydantic import ValidationError

from tests.server.conftest import MeddledGrid, coordinate, progress
from tests.server.test_report import a_report
from wardround.client.data import open_parted
from wardround.common.explain import facts, sentences
from wardround.common.metrics import Tally
from wardround.common.plan import StudyPlan
from wardround.common.refusals import REFUSED
from wardround.common.tasks import task_of
from wardround.common.weights import pack
from wardround.server import collect as collect_module
from wardround.server.account import study_facts
from wardround.server.checkpoint import RoundRecord
from wardround.server.report import Report, story, to_html
from wardround.server.validation import best_round, ended_early, with_best
from wardround.simulations.scenario import Scenario

Small = Callable[..., Scenario]
NAMES = ("cleveland", "hungarian", "switzerland", "va")
LOOKS = {"share": 0.4, "every": 1}


class Lying(MeddledGrid):
    """`lie` changes what comes back from a look."""

    def __init__(self, scenario: Scenario, lie: Callable[[str, Message, Message], Message]) -> None:
        super().__init__(scenario)
        self.lie = lie

    def _meddled(self, message: Message) -> list[Message]:
        reply = self._answered(message)
        if message.metadata.message_type != "evaluate":
            return [reply]
        return [self.lie(self.site_of[message.metadata.dst_node_id], message, reply)]


def told(reply: Message, look: Message, **facts: object) -> Message:
    return Message(RecordDict({"facts": ConfigRecord({**reply.content["facts"], **facts})}), reply_to=look)  # type: ignore[arg-type]


def with_sums(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message, Message], Message]:
    def lie(look: Message, reply: Message) -> Message:
        vector = np.frombuffer(reply.content["facts"]["sums"], "<f8").copy()
        return told(reply, look, sums=change(vector).astype("<f8").tobytes())

    return lie


def put(place: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(vector: np.ndarray) -> np.ndarray:
        vector[place] = value
        return vector

    return change


LIES: dict[str, tuple[Callable[[Message, Message], Message], str]] = {
    "one number less": (with_sums(lambda v: v[:-1]), "bytes long"),
    "one number more": (with_sums(lambda v: np.append(v, 0)), "bytes long"),
    "nothing": (with_sums(lambda v: v[:0]), "bytes long"),
    "not a number": (with_sums(put(9, math.nan)), "not finite"),
    "infinity": (with_sums(put(9, math.inf)), "not finite"),
    "a negative count": (with_sums(put(1, -1)), "a sum is negative"),
    "a record more": (with_sums(put(5, 1000)), "contradict each other"),
    "no record": (with_sums(lambda v: v * 0), "no record"),
    "another site": (lambda look, reply: told(reply, look, site="cleveland"), "another site's name"),
    "another round": (lambda look, reply: told(reply, look, round=7), "another look"),
    "another run": (lambda look, reply: told(reply, look, run="0" * 16), "another look"),
    "another study": (lambda look, reply: told(reply, look, study="0" * 64), "another look"),
    "a word for the sums": (lambda look, reply: told(reply, look, sums="1"), "field sums"),
    "a number of patients": (lambda look, reply: told(reply, look, patients=10**9), "other fields"),
    "an update": (lambda look, reply: told(reply, look, kind="update"), "is no tally"),
    "an empty message": (lambda look, reply: Message(RecordDict(), reply_to=look), "nothing else"),
    "a model beside it": (
        lambda look, reply: Message(
            RecordDict({"facts": reply.content["facts"], "model": pack({"w": torch.ones(1)})}), reply_to=look
        ),
        "nothing else",
    ),
    "an error": (lambda look, reply: Message(Error(REFUSED, "no\x1b[31m way"), reply_to=look), "no [31m way"),
}


@pytest.mark.parametrize(("lie", "why"), LIES.values(), ids=LIES)
def test_a_lying_site_is_left_out_of_the_look_and_not_of_the_study(
    small: Small, lie: Callable[[Message, Message], Message], why: str
):
    scenario = small(rounds=1, validation=LOOKS)
    liar = Lying(scenario, lambda site, look, reply: lie(look, reply) if site == "va" else reply)
    assert coordinate(scenario, liar) == ""
    (record,) = progress(scenario).history
    assert list(record.not_validated) == ["va"]
    assert why in record.not_validated["va"]
    assert record.sites == list(NAMES)
    assert record.validation == pytest.approx(over(scenario, NAMES[:3]))


def over(scenario: Scenario, sites: tuple[str, ...]) -> float:
    """AUROC of the last model on the patients these sites set aside, all in one tally."""
    plan, task = scenario.study.plan, task_of(scenario.study.plan)
    together = reduce(add, (open_parted(scenario.source(site), task, plan.validation.share)[1] for site in sites))
    found = task.scores(task.model(plan.model, 0), progress(scenario).weights, together)
    return Tally.of(found).figures()["auroc"]


def test_the_sum_of_what_sites_send_is_the_tally_of_all_their_patients(small: Small):
    scenario = small(rounds=1, validation=LOOKS)
    assert coordinate(scenario, MeddledGrid(scenario)) == ""
    assert progress(scenario).history[0].validation == pytest.approx(over(scenario, NAMES), abs=1e-12)


def test_the_order_of_answers_changes_no_bit(small: Small):
    looks = {**LOOKS, "metric": "log_loss"}  # a sum of fractions, not of whole numbers
    values = []
    for name, order in (("plain", None), ("backwards", lambda replies: replies[::-1])):
        scenario = small(name, validation=looks)
        grid = MeddledGrid(scenario)
        grid.order = order
        assert coordinate(scenario, grid) == ""
        values.append([record.validation for record in progress(scenario).history])
    assert values[0] == values[1]
    assert None not in values[0]


def test_fewer_answers_than_min_sites_are_no_look(small: Small):
    scenario = small(validation={**LOOKS, "patience": 1}, min_sites=3)
    few = Lying(scenario, lambda site, look, reply: reply if site in NAMES[:2] else told(reply, look, round=9))
    assert coordinate(scenario, few) == ""
    found = progress(scenario)
    assert [record.validation for record in found.history] == [None] * 3
    assert found.best == {}
    weights = safetensors.torch.load_file(scenario.folder / "model.safetensors")
    assert all(torch.equal(weights[name], found.weights[name]) for name in weights)  # the last one, for want of a best


def test_a_site_that_never_answers_a_look_is_left_out_at_the_deadline(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collect_module, "_POLL_SECONDS", 0.01)
    scenario = small(rounds=1, deadline_seconds=0.5, validation=LOOKS)

    class Silent(MeddledGrid):
        def _speaks(self, message: Message) -> bool:
            return message.metadata.message_type != "evaluate" or self.site_of[message.metadata.dst_node_id] != "va"

    assert coordinate(scenario, Silent(scenario)) == ""
    (record,) = progress(scenario).history
    assert record.not_validated == {"va": "no answer within 0.5 s"}
    assert record.validation is not None


def test_a_study_that_no_longer_improves_ends_early_and_says_so(small: Small):
    still = {"rule": "sgd", "learning_rate": 1e-12}  # the model stays where it is
    scenario = small(rounds=20, validation={"share": 0.4, "every": 2, "patience": 2}, step=still)
    assert coordinate(scenario, MeddledGrid(scenario)) == ""
    found = progress(scenario)
    assert found.round == 6  # the look after round 2, and two that found nothing better
    assert [record.round for record in found.history if record.validation is not None] == [2, 4, 6]
    outcome = study_facts(scenario.study, found)["outcome"]
    assert outcome["status"] == "completed early"
    assert outcome["rounds_done"] == 6
    assert "after round 2, 2 looks in a row found no better AUROC" in outcome["reason"]
    assert coordinate(scenario, MeddledGrid(scenario)) == ""  # nothing is left to do
    assert progress(scenario).round == 6


def test_without_patience_a_study_takes_all_its_rounds(small: Small):
    scenario = small(rounds=8, validation=LOOKS, step={"rule": "sgd", "learning_rate": 1e-12})
    assert coordinate(scenario, MeddledGrid(scenario)) == ""
    assert study_facts(scenario.study, progress(scenario))["outcome"]["status"] == "completed"


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_model_that_is_kept_is_the_one_released(small: Small, keep: str):
    wild = {"rule": "sgd", "learning_rate": 60.0}  # so that the last round is not the best
    scenario = small(rounds=6, validation={**LOOKS, "keep": keep}, step=wild)
    models: dict[int, dict[str, torch.Tensor]] = {}

    def seen(site: str, look: Message, reply: Message) -> Message:
        arrays = look.content["model"].items()
        models[look.content["facts"]["round"]] = {name: array.tensor.clone() for name, array in arrays}
        return reply

    assert coordinate(scenario, Lying(scenario, seen)) == ""
    values = {record.round: record.validation for record in progress(scenario).history}
    best = max(values, key=lambda round: values[round])
    assert best != 6
    assert best_round(scenario.study.plan, progress(scenario).history) == best
    released = safetensors.torch.load_file(scenario.folder / "model.safetensors")
    wanted = models[best if keep == "best" else 6]
    assert all(torch.equal(released[name], wanted[name]) for name in released)
    known = study_facts(scenario.study, progress(scenario))["validation"]
    assert (known["best_round"], known["best"], known["keep"]) == (best, values[best], keep)


# ---- the decisions, from a history alone


def plan(keys: str) -> StudyPlan:
    head = 'name = "s"\ntask = "heart-disease"\nrounds = 100\nmin_sites = 1\nsites.a = 10\n[validation]\nevery = 1\n'
    return StudyPlan.parse(head + keys)


def history(*values: float | None) -> list[RoundRecord]:
    return [RoundRecord(number, 1, 0.0, ["a"], {}, False, 1.0, {}, {}, value) for number, value in enumerate(values, start=1)]


@pytest.mark.parametrize(("values", "best", "early"), [
    ([], None, False),
    ([None, None, None, None], None, False),  # nobody answered: that is no look without improvement
    ([0.7], 1, False),
    ([0.7, 0.7], 1, False),
    ([0.7, 0.7, 0.7], 1, True),  # an equal is no improvement
    ([0.7, 0.6, None, 0.6], 1, True),
    ([0.7, 0.6, 0.8], 3, False),
    ([0.7, 0.6, 0.8, 0.75, 0.79], 3, True),
])  # fmt: skip
def test_patience_counts_looks_since_the_best(values: list[float | None], best: int | None, early: bool):
    assert best_round(plan("patience = 2"), history(*values)) == best
    assert bool(ended_early(plan("patience = 2"), history(*values))) == early
    assert not ended_early(plan(""), history(*values))


def test_a_metric_where_less_is_better_is_kept_at_its_least():
    assert best_round(plan('metric = "brier"'), history(0.2, 0.1, 0.3)) == 2


def test_the_best_model_is_a_copy():
    current = {"w": torch.ones(2)}
    best = with_best(plan(""), history(0.5), {}, current)
    current["w"].zero_()
    assert best["w"].tolist() == [1, 1]
    assert with_best(plan(""), history(0.5, 0.4), best, current) is best
    assert with_best(plan(""), history(0.5, None), best, current) is best
    assert with_best(plan(""), history(0.5, 0.6), best, current) is not best
    assert with_best(plan('keep = "last"'), history(0.5), {}, current) == {}


def test_a_plan_says_in_sentences_what_a_look_releases(small: Small, study_file: Path):
    study = small(validation={"share": 0.25, "every": 5, "patience": 3}).study
    text = " ".join(sentences(study))
    for said in ("about 25% of each hospital's training patients", "every 5 rounds", "without noise", "ends early after 3"):
        assert said in text
    assert "no counts" not in text.lower()
    assert facts(study)["validation"] == {"metric": "auroc", "bytes_per_look_and_site": 262_584}


# ---- what a report may say


def early(**changes: object) -> dict[str, object]:
    """A report's table of a study that ended early; `changes` replaces parts."""
    text = 'name = "heart"\nrounds = 6\n[validation]\npatience = 2\n'
    table = a_report(private=False).model_dump(by_alias=True)
    table["study"] |= {"plan": text, "digest": hashlib.sha256(text.encode()).hexdigest()}
    table["outcome"] = {"status": "completed early", "reason": "no better AUROC", "rounds_done": 4}
    table["rounds"] = table["rounds"][:4]
    table["validation"] = {
        "metric": "auroc", "share": 0.2, "looks": 4, "best_round": 2, "best": 0.8, "keep": "best",
    }  # fmt: skip
    return table | changes


def test_completed_early_is_told_as_such():
    report = Report.model_validate(early())
    text = " ".join(story.summary(report))
    assert "ended early, as its plan provides, after 4 of 6 planned rounds: no better AUROC." in text
    assert "completed its" not in text
    page = to_html(report)
    assert 'class="status completed early">completed early after 4 of 6 rounds' in page


@pytest.mark.parametrize(("changes", "why"), [
    ({"validation": None}, "no validation.patience"),
    ({"study": a_report(private=False).model_dump()["study"]}, "no validation.patience"),
    ({"outcome": {"status": "completed early", "reason": "r", "rounds_done": 6}}, "after all 6 rounds"),
    ({"outcome": {"status": "completed early", "reason": "", "rounds_done": 4}}, "says why"),
    ({"outcome": {"status": "completed", "reason": "", "rounds_done": 4}}, "completed after 4 of 6"),
])  # fmt: skip
def test_a_report_that_ends_early_without_a_ground_is_refused(changes: dict[str, object], why: str):
    with pytest.raises(ValidationError, match=why):
        Report.model_validate(early(**changes))


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_released_model_is_called_what_it_is(keep: str):
    of = early()["validation"] | {"keep": keep}  # type: ignore[operator]
    text = story.validation(Report.model_validate(early(validation=of)))
    assert ("did best there" in text) == (keep == "best")
    assert ("that of the last round" in text) == (keep == "last")
    unseen = of | {"looks": 0, "best_round": None, "best": None}
    assert "No look at them came about" in story.validation(Report.model_validate(early(validation=unseen)))
