"""Patients set aside are never trained on, and a site answers a look only where plan and policy allow it."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import tomli_w
import torch
from flwr.app import ConfigRecord, Message

from wardround.client import hospital as house
from wardround.client.app import client_app
from wardround.client.data import open_parted, open_records
from wardround.client.hospital import Hospital
from wardround.common.errors import OrderRefused
from wardround.common.messages import LookFacts, OrderFacts, TallyFacts, pack_with_model
from wardround.common.metrics import Tally
from wardround.common.plan import SignedText
from wardround.common.refusals import REFUSED
from wardround.common.tasks import Records, Task, task_of
from wardround.common.tasks.looks import look_of
from wardround.common.weights import Weights, trainable
from wardround.simulations.grid import LocalGrid
from wardround.simulations.scenario import Changes, Scenario


@pytest.fixture
def looked_at(tmp_path: Path, study_file: Path) -> Callable[..., Scenario]:
    """The shipped study with [validation] in place of [privacy]; keys of the section can be changed."""

    def prepare(**keys: object) -> Scenario:
        table = tomllib.loads(study_file.read_text()) | {"rounds": 6, "validation": {"share": 0.4, "every": 2, **keys}}
        table.pop("privacy")
        path = tmp_path / "study.toml"
        path.write_text(tomli_w.dumps(table))
        return Scenario.prepare(path, tmp_path / "run", Changes())

    return prepare


def a_model(prepared: Scenario) -> Weights:
    return trainable(prepared.task.model(prepared.study.plan.model, 7))


def rows(records: Records) -> list[tuple[float, ...]]:
    values = records.fields["table"].tolist()
    return [(*row, float(label)) for row, label in zip(values, records.label.tolist(), strict=True)]


def test_what_is_trained_on_and_what_is_looked_at_share_no_patient(
    looked_at: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch
):
    prepared, seen = looked_at(), {}
    learn, judge = house.plain_update, Task.scores

    def learning(task: Task, model: object, weights: object, records: Records, **given: object) -> Weights:
        seen["trained on"] = records
        return learn(task, model, weights, records, **given)  # type: ignore[arg-type]

    def judging(self: Task, model: object, weights: object, records: Records) -> object:
        seen["looked at"] = records
        return judge(self, model, weights, records)  # type: ignore[arg-type]

    monkeypatch.setattr(house, "plain_update", learning)
    monkeypatch.setattr(Task, "scores", judging)
    study, source = prepared.study, prepared.source("cleveland")
    for first in ("train", "look"):  # whichever opens the records
        with closing(Hospital(prepared.sites["cleveland"])) as hospital:
            if first == "look":
                hospital.evaluate(study, LookFacts(study.digest, "run", 2), a_model(prepared))
            hospital.train(study, OrderFacts(study.digest, "run", 1, 1, ""), a_model(prepared))
            hospital.evaluate(study, LookFacts(study.digest, "run", 2), a_model(prepared))
        training, held_out = (set(rows(part)) for part in open_records(source, prepared.task))
        trained_on, looked = set(rows(seen["trained on"])), set(rows(seen["looked at"]))
        assert not trained_on & looked
        assert trained_on | looked == training
        assert not looked & held_out
        assert 0.25 < len(looked) / len(training) < 0.55


def test_whether_a_patient_is_set_aside_follows_from_that_patient_alone(looked_at: Callable[..., Scenario], tmp_path: Path):
    prepared = looked_at()
    source = prepared.source("cleveland")
    aside = set(rows(open_parted(source, prepared.task, 0.4)[1]))
    lines = source.path.read_text().splitlines()
    half = tmp_path / "half.csv"
    half.write_text("\n".join(lines[::2]) + "\n")
    fewer = source.model_copy(update={"path": half})
    kept = set(rows(open_parted(fewer, prepared.task, 0.4)[1]))
    assert kept
    assert kept <= aside
    assert set(rows(open_parted(source, prepared.task, 0.1)[1])) < aside


def test_a_look_does_not_depend_on_who_is_held_out(looked_at: Callable[..., Scenario]):
    prepared = looked_at()
    source = prepared.source("cleveland")  # held out by a hash of the same seed
    everybody = source.model_copy(update={"holdout": 0.0})
    training = set(rows(open_records(source, prepared.task)[0]))
    aside = set(rows(open_parted(everybody, prepared.task, 0.4)[1]))
    assert set(rows(open_parted(source, prepared.task, 0.4)[1])) == aside & training
    assert aside - training  # one hash does not decide both


def test_a_site_answers_with_the_sums_over_all_its_patients_set_aside(looked_at: Callable[..., Scenario]):
    prepared = looked_at()
    study, model = prepared.study, a_model(prepared)
    with closing(Hospital(prepared.sites["va"])) as hospital:
        facts = hospital.evaluate(study, LookFacts(study.digest, "run", 6), model)
    assert (facts.site, facts.study, facts.run, facts.round) == ("va", study.digest, "run", 6)
    records = open_parted(prepared.source("va"), prepared.task, 0.4)[1]
    task = task_of(study.plan)
    expected = Tally.of(task.scores(task.model(study.plan.model, 0), model, records))
    found = look_of(task, study.plan).unpack(facts.sums)
    assert all((found.sums[name] == expected.sums[name]).all() for name in found.sums)


@pytest.mark.parametrize(("look", "why"), [
    (lambda study: LookFacts("0" * 64, "run", 2), "another study plan"),
    (lambda study: LookFacts(study.digest, "run", 3), "no look after round 3"),
    (lambda study: LookFacts(study.digest, "run", 0), "no look after round 0"),
    (lambda study: LookFacts(study.digest, "run", -2), "no look after round -2"),
    (lambda study: LookFacts(study.digest, "run", 8), "no look after round 8"),
])  # fmt: skip
def test_a_look_outside_the_plan_opens_no_record(
    looked_at: Callable[..., Scenario], look: Callable[[SignedText], LookFacts], why: str, monkeypatch: pytest.MonkeyPatch
):
    prepared = looked_at()
    monkeypatch.setattr(house, "open_parted", never)
    with closing(Hospital(prepared.sites["va"])) as hospital, pytest.raises(OrderRefused, match=why):
        hospital.evaluate(prepared.study, look(prepared.study), a_model(prepared))


def never(*_: object) -> None:
    raise AssertionError("records were opened")


@pytest.mark.parametrize("without_privacy", [True, False])
def test_a_look_in_a_study_without_validation_opens_no_record(
    scenario: Callable[..., Scenario], without_privacy: bool, monkeypatch: pytest.MonkeyPatch
):
    prepared = scenario(rounds=4, without_privacy=without_privacy)
    monkeypatch.setattr(house, "open_parted", never)
    monkeypatch.setattr(house, "open_records", never)
    with closing(Hospital(prepared.sites["va"])) as hospital, pytest.raises(OrderRefused, match="does not allow to look"):
        hospital.evaluate(prepared.study, LookFacts(prepared.study.digest, "run", 4), a_model(prepared))


@contextmanager
def wire(prepared: Scenario, site: str) -> Iterator[Callable[[object], Message]]:
    with LocalGrid(client_app, [prepared.sites[site]], {"plan": prepared.study.text}) as grid:

        def ask(content: object) -> Message:
            (address,) = grid.get_node_ids()
            (reply,) = grid.send_and_receive([grid.create_message(content, "evaluate", address, "")])  # type: ignore[arg-type]
            return reply

        yield ask


def test_a_look_over_the_wire_holds_facts_and_nothing_else(looked_at: Callable[..., Scenario]):
    prepared = looked_at()
    with wire(prepared, "va") as ask:
        reply = ask(pack_with_model(LookFacts(prepared.study.digest, "run", 2), a_model(prepared)))
    assert set(reply.content.keys()) == {"facts"}
    assert isinstance(reply.content["facts"], ConfigRecord)
    assert TallyFacts.unpack(reply.content).site == "va"


def test_a_site_with_few_patients_set_aside_sends_no_sums_and_names_no_count(
    looked_at: Callable[..., Scenario], caplog: pytest.LogCaptureFixture
):
    prepared = looked_at(share=0.02)
    aside = open_parted(prepared.source("va"), prepared.task, 0.02)[1].patients
    assert 0 < aside < 10
    with wire(prepared, "va") as ask, caplog.at_level(logging.ERROR, "wardround.site"):
        reply = ask(pack_with_model(LookFacts(prepared.study.digest, "run", 2), a_model(prepared)))
    assert (reply.error.code, reply.error.reason) == (REFUSED, "this site cannot evaluate now; see the site's log")
    assert f"{aside} patients are set aside; min_evaluated = 10" in caplog.text


@pytest.mark.parametrize(("floor", "answers"), [(0, True), (1, False)])
def test_a_site_says_itself_how_few_are_too_few(looked_at: Callable[..., Scenario], floor: int, answers: bool):
    prepared = looked_at()
    aside = open_parted(prepared.source("va"), prepared.task, 0.4)[1].patients
    file = prepared.sites["va"]
    text = file.read_text()
    assert "min_evaluated = 10\n" in text
    file.write_text(text.replace("min_evaluated = 10\n", f"min_evaluated = {aside + floor}\n"))
    with wire(prepared, "va") as ask:
        reply = ask(pack_with_model(LookFacts(prepared.study.digest, "run", 2), a_model(prepared)))
    assert reply.has_error() != answers


def test_a_look_with_another_model_or_other_records_is_refused(looked_at: Callable[..., Scenario]):
    prepared = looked_at()
    facts, model = LookFacts(prepared.study.digest, "run", 2), a_model(prepared)
    name = next(iter(model))
    with wire(prepared, "va") as ask:
        assert ask(facts.pack()).error.code == REFUSED
        assert ask(pack_with_model(facts, {**model, name: torch.zeros(1, 1)})).error.code == REFUSED
        assert ask(pack_with_model(facts, {**model, "extra": torch.zeros(1)})).error.code == REFUSED
        assert ask(pack_with_model(OrderFacts(prepared.study.digest, "run", 2, 1, ""), model)).error.code == REFUSED
        content = pack_with_model(facts, model)
        content["more"] = facts.record()
        assert ask(content).error.code == REFUSED


def test_a_look_leaves_the_working_model_as_training_needs_it(looked_at: Callable[..., Scenario]):
    prepared, updates = looked_at(), []
    study = prepared.study
    for look in (False, True):
        with closing(Hospital(prepared.sites["va"])) as hospital:
            if look:
                hospital.evaluate(study, LookFacts(study.digest, "run", 2), a_model(prepared))
            updates.append(hospital.train(study, OrderFacts(study.digest, "run", 3, 1, ""), a_model(prepared))[1])
    assert all(torch.equal(updates[0][name], updates[1][name]) for name in updates[0])
