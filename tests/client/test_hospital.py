"""The order of things at a site, and that nothing but wardround's own words and one update ever leaves it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from torch import nn

from wardround.client import hospital as house
from wardround.client.app import client_app
from wardround.client.hospital import CoinsFor, Hospital
from wardround.client.ledger import Cohort, Moment
from wardround.common.errors import (
    BudgetExhausted,
    LedgerBroken,
    OrderRefused,
    PlanRefused,
    RoundTaken,
)
from wardround.common.messages import (
    Farewell,
    OrderFacts,
    Present,
    RollCall,
    Settled,
    UpdateFacts,
    pack_with_model,
    unpack_model,
)
from wardround.common.plan import SignedText
from wardround.common.refusals import INTERNAL, REFUSED, ROUND_TAKEN
from wardround.common.tasks import TASKS
from wardround.common.weights import Shapes, Weights, trainable
from wardround.simulations.grid import LocalGrid
from wardround.simulations.scenario import Scenario

Prepared = Callable[..., Scenario]
SECRET = "Hansen, 1952"


@pytest.fixture
def small(scenario: Prepared) -> Scenario:
    return scenario(rounds=4)


@pytest.fixture
def never_opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Fails the test if a record is opened while it runs."""
    opened: list[object] = []
    monkeypatch.setattr(house, "open_records", lambda *given: opened.append(given))
    yield opened
    assert opened == []


def a_model(prepared: Scenario, seed: int = 7) -> Weights:
    return trainable(TASKS[prepared.study.plan.task].model(prepared.study.plan.model, seed))


def an_order(study: SignedText, round: int = 1, *, run: str = "run", attempt: int = 1, head: str = "") -> OrderFacts:
    return OrderFacts(study.digest, run, round, attempt, head)


def edited(prepared: Scenario, site: str, old: str, new: str) -> Path:
    file = prepared.sites[site]
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def exhausted(prepared: Scenario) -> None:
    edited(prepared, "va", "epsilon_lifetime = 15.0", "epsilon_lifetime = 0.5")


# --- the order of things --------------------------------------------------------------------------------------------------


def test_a_round_is_admitted_reserved_and_marked_before_a_record_is_opened(small: Scenario, monkeypatch: pytest.MonkeyPatch):
    with closing(Hospital(small.sites["va"])) as hospital:
        seen: list[tuple[int, int]] = []
        honest = house.open_records

        def watched(*given: object) -> object:
            (account,) = hospital.ledger.accounts()
            seen.append((account.charged.training[0].steps, account.marked))
            return honest(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(house, "open_records", watched)
        hospital.train(small.study, an_order(small.study), a_model(small))
        assert seen == [(4, 1)]


@pytest.mark.usefixtures("never_opened")
@pytest.mark.parametrize(("order", "refusal"), [
    (lambda study: OrderFacts("0" * 64, "run", 1, 1, ""), "another study plan"),
    (lambda study: an_order(study, 0), "no round 0"),
    (lambda study: an_order(study, -1), "no round -1"),
    (lambda study: an_order(study, 5), "no round 5"),
    (lambda study: an_order(study, attempt=0), "attempt 0"),
    (lambda study: an_order(study, attempt=2), "attempt 2"),
    (lambda study: an_order(study, attempt=2**80), "attempt"),
])  # fmt: skip
def test_an_order_outside_the_plan_opens_no_record(small: Scenario, order: Callable[[SignedText], OrderFacts], refusal: str):
    with closing(Hospital(small.sites["va"])) as hospital, pytest.raises(OrderRefused, match=refusal):
        hospital.train(small.study, order(small.study), a_model(small))


@pytest.mark.usefixtures("never_opened")
def test_no_budget_opens_no_record(small: Scenario):
    exhausted(small)
    with closing(Hospital(small.sites["va"])) as hospital:
        with pytest.raises(BudgetExhausted, match="pass what this site allows") as refusal:
            hospital.train(small.study, an_order(small.study), a_model(small))
        assert "epsilon" not in str(refusal.value)  # what other studies spent here stays here
        assert "epsilon_lifetime = 0.5" in refusal.value.detail
        assert hospital.ledger.accounts() == []


@pytest.mark.usefixtures("never_opened")
def test_a_study_the_site_does_not_admit_opens_no_record(small: Scenario):
    file = edited(small, "va", 'tasks = [\n    "heart-disease",\n]', "tasks = []")
    with closing(Hospital(file)) as hospital:
        with pytest.raises(PlanRefused):
            hospital.train(small.study, an_order(small.study), a_model(small))
        with pytest.raises(PlanRefused):
            hospital.shapes(small.study)  # not even a network of the coordinator's size is built
    assert not (file.parent / "state").exists()


@pytest.mark.usefixtures("never_opened")
def test_a_model_larger_than_the_site_allows_is_refused_before_it_is_built(small: Scenario, monkeypatch: pytest.MonkeyPatch):
    file = edited(small, "va", "parameters = 100000000", "parameters = 100")
    monkeypatch.setattr("wardround.client.hospital.working_model", never)
    with closing(Hospital(file)) as hospital, pytest.raises(PlanRefused, match="a model of 434 numbers is larger than the 100"):
        hospital.shapes(small.study)


def never(*_: object) -> None:
    raise AssertionError("a network was built")


@pytest.mark.usefixtures("never_opened")
def test_a_broken_ledger_opens_no_record(small: Scenario):
    ledger = small.sites["va"].parent / "state" / "ledger.sqlite"
    ledger.parent.mkdir()
    ledger.write_bytes(b"no ledger at all, just text" * 50)
    with closing(Hospital(small.sites["va"])) as hospital, pytest.raises(LedgerBroken):
        hospital.train(small.study, an_order(small.study), a_model(small))


@pytest.mark.usefixtures("never_opened")
def test_a_ledger_older_than_the_coordinator_remembers_opens_no_record(small: Scenario):
    with closing(Hospital(small.sites["va"])) as hospital, pytest.raises(LedgerBroken, match="newer state"):
        hospital.train(small.study, an_order(small.study, head="f" * 64), a_model(small))


def reserved(hospital: Hospital, study: SignedText) -> None:
    plan = study.plan
    hospital.ledger.reserve(
        Cohort("cardiology", 12.0, 1e-5), study=study.digest, name=plan.name, run="run",
        steps=plan.noised_steps(plan.noise_multiplier()), steps_per_round=1,
    )  # fmt: skip


@pytest.mark.usefixtures("never_opened")
def test_a_used_up_or_settled_reservation_opens_no_record(small: Scenario):
    study = small.study
    with closing(Hospital(small.sites["va"])) as hospital:
        reserved(hospital, study)
        for attempt in range(1, 5):
            hospital.ledger.mark(Moment(study.digest, "run", 1, attempt), model="m")
        with pytest.raises(BudgetExhausted, match="all steps reserved"):
            hospital.train(study, an_order(study, 2), a_model(small))
        with pytest.raises(RoundTaken):
            hospital.train(study, an_order(study, 1), a_model(small))
        hospital.ledger.settle(study=study.digest, run="run")
        with pytest.raises(OrderRefused, match="settled"):
            hospital.train(study, an_order(study, 3), a_model(small))


@pytest.mark.usefixtures("never_opened")
def test_a_full_disk_opens_no_record(small: Scenario):
    with closing(Hospital(small.sites["va"])) as hospital:
        reserved(hospital, small.study)
        (pages,) = hospital.ledger._db.execute("PRAGMA page_count").fetchone()
        hospital.ledger._db.execute(f"PRAGMA max_page_count = {pages}")
        order = an_order(small.study, run="x" * 9000)  # longer than what is left of the last page
        with pytest.raises(LedgerBroken, match="cannot be read or written"):
            hospital.train(small.study, order, a_model(small))


def test_a_network_that_mixes_patients_opens_no_record(small: Scenario, monkeypatch: pytest.MonkeyPatch):
    opened: list[object] = []
    monkeypatch.setattr(house, "open_records", lambda *given: opened.append(given))
    monkeypatch.setattr(house, "working_model", lambda *_: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with closing(Hospital(small.sites["va"])) as hospital, pytest.raises(PlanRefused, match=r"layer 1 \(BatchNorm1d\)"):
        hospital.train(small.study, an_order(small.study), a_model(small))
    assert opened == []


@pytest.mark.usefixtures("never_opened")
def test_how_many_patients_are_wanted_is_held_against_the_declared_number_not_the_real_one(small: Scenario):
    file = edited(small, "va", "min_patients = 50", "min_patients = 5000")
    with closing(Hospital(file)) as hospital, pytest.raises(PlanRefused, match="130 patients are fewer than the 5000"):
        hospital.train(small.study, an_order(small.study), a_model(small))


def test_what_one_coordinator_reserved_another_cannot_mark(small: Scenario, scenario: Prepared):
    other = scenario("other", rounds=3)
    with closing(Hospital(small.sites["va"])) as hospital:
        hospital.train(small.study, an_order(small.study), a_model(small))
        with pytest.raises(OrderRefused, match="another plan"):
            hospital.train(other.study, an_order(other.study, 2), a_model(small))


# --- an update ------------------------------------------------------------------------------------------------------------


def test_an_update_holds_the_trainable_tensors_under_torchs_names_and_nothing_else(small: Scenario):
    weights = a_model(small)
    with closing(Hospital(small.sites["va"])) as hospital:
        facts, update = hospital.train(small.study, an_order(small.study), weights)
        head = hospital.ledger.head
    model = TASKS[small.study.plan.task].model(small.study.plan.model, 0)
    assert {name: tensor.shape for name, tensor in update.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(tensor.dtype == torch.float32 for tensor in update.values())
    assert facts == UpdateFacts("va", small.study.digest, "run", 1, 1, head, 1)


@pytest.mark.parametrize("without_privacy", [True, False])
def test_float16_rounds_an_update_after_the_noise(scenario: Prepared, coins_for: CoinsFor, without_privacy: bool):
    prepared = scenario(rounds=1, without_privacy=without_privacy)
    halved = SignedText.received(f'update_numbers = "float16"\n{prepared.study.text}')
    found = []
    for number, study in enumerate((prepared.study, halved)):
        with closing(Hospital(prepared.sites["va"], coins_for)) as hospital:
            found.append(hospital.train(study, an_order(study, run=f"run-{number}"), a_model(prepared))[1])
    whole, half = found
    assert all(torch.equal(half[name], whole[name].half().float()) for name in whole)
    assert any(not torch.equal(half[name], whole[name]) for name in whole)


def test_a_private_update_is_never_the_bare_gradient(scenario: Prepared):
    small = scenario(rounds=4, epsilon=0.2)  # so that what is left of the gradients drowns in the noise
    weights = a_model(small)
    with closing(Hospital(small.sites["va"])) as one, closing(Hospital(small.sites["cleveland"])) as other:
        _, first = one.train(small.study, an_order(small.study), weights)
        _, second = one.train(small.study, an_order(small.study, 2), weights)
        _, third = other.train(small.study, an_order(small.study), weights)
    a, b, c = (torch.cat([tensor.flatten() for tensor in update.values()]) for update in (first, second, third))
    sigma, plan = small.study.plan.noise_multiplier(), small.study.plan
    noise = sigma * plan.private().clip_norm / (plan.private().sampling_rate * plan.sites["va"])
    assert float((a - b).std()) == pytest.approx(noise * 2**0.5, rel=0.25)  # same round's model, same patients: only noise
    assert abs(float(torch.corrcoef(torch.stack([a - b, c]))[0, 1])) < 0.3  # six standard deviations; shared noise gives 0.5


def test_the_head_in_an_update_already_knows_the_answer(small: Scenario):
    # so a copy of the ledger taken between mark and answer is found out, instead of training the round a second time
    with closing(Hospital(small.sites["va"])) as hospital:
        backup: list[bytes] = []
        honest = hospital.ledger.answer
        file = hospital.ledger.path

        def copied(*given: object, **named: object) -> None:
            hospital.ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            backup.append(file.read_bytes())
            honest(*given, **named)  # type: ignore[arg-type]

        hospital.ledger.answer = copied  # type: ignore[assignment, method-assign]
        facts, _ = hospital.train(small.study, an_order(small.study), a_model(small))
    file.write_bytes(backup[0])
    with closing(Hospital(small.sites["va"])) as hospital, pytest.raises(LedgerBroken, match="newer state"):
        hospital.train(small.study, an_order(small.study, head=facts.ledger_head), a_model(small))


def test_epsilon_over_restarts_of_the_hospital_is_counted_once(small: Scenario):
    head = ""
    for round in range(1, 5):
        with closing(Hospital(small.sites["va"])) as hospital:
            facts, _ = hospital.train(small.study, an_order(small.study, round, head=head), a_model(small, round))
            head = facts.ledger_head
            assert facts.steps_spent == round


def test_an_answer_that_cannot_be_stored_does_not_leave(small: Scenario):
    with closing(Hospital(small.sites["va"])) as hospital:
        hospital.ledger.answer = refuse  # type: ignore[assignment, method-assign]
        with pytest.raises(LedgerBroken):
            hospital.train(small.study, an_order(small.study), a_model(small))


def refuse(*_: object, **__: object) -> None:
    raise LedgerBroken("the ledger cannot be read or written")


def test_settling_gives_back_what_was_not_spent(small: Scenario):
    with closing(Hospital(small.sites["va"])) as hospital:
        hospital.train(small.study, an_order(small.study), a_model(small))
        settled = hospital.settle(small.study, Farewell(small.study.digest, "run"))
        assert settled == Settled("va", small.study.digest, hospital.ledger.head, 1)
        assert hospital.ledger.accounts()[0].charged.training[0].steps == 1
        with pytest.raises(OrderRefused, match="settled"):
            hospital.train(small.study, an_order(small.study, 2), a_model(small))
        with pytest.raises(OrderRefused, match="another study plan"):
            hospital.settle(small.study, Farewell("0" * 64, "run"))


def test_a_study_without_privacy_touches_no_ledger(scenario: Prepared):
    plain = scenario(rounds=2, without_privacy=True)
    with closing(Hospital(plain.sites["va"])) as hospital:
        facts, _ = hospital.train(plain.study, an_order(plain.study), a_model(plain))
        assert (facts.ledger_head, facts.steps_spent) == ("", 0)
        assert hospital.settle(plain.study, Farewell(plain.study.digest, "run")).steps_spent == 0
    assert not (plain.sites["va"].parent / "state").exists()


# --- over the wire --------------------------------------------------------------------------------------------------------


class Wire:
    """Messages to the site "va", as the coordinator sends them."""

    def __init__(self, prepared: Scenario, grid: LocalGrid) -> None:
        self.prepared, self.grid, self.study = prepared, grid, prepared.study
        (self.node,) = grid.get_node_ids()

    def send(self, content: object, kind: str) -> Message:
        (reply,) = self.grid.send_and_receive([self.grid.create_message(content, kind, self.node, "")])  # type: ignore[arg-type]
        return reply

    def train(self, order: OrderFacts | None = None, weights: Weights | None = None) -> Message:
        model = a_model(self.prepared) if weights is None else weights
        return self.send(pack_with_model(order or an_order(self.study), model), "train")

    def refused(self, order: OrderFacts | None = None, weights: Weights | None = None) -> tuple[int, str]:
        reply = self.train(order, weights)
        assert reply.has_error()
        assert not reply.has_content()
        return reply.error.code, reply.error.reason or ""


@contextmanager
def wire_to(prepared: Scenario) -> Iterator[Wire]:
    with LocalGrid(client_app, [prepared.sites["va"]], {"plan": prepared.study.text}) as grid:
        yield Wire(prepared, grid)


def bytes_of(reply: Message) -> list[tuple[str, bytes]]:
    return [(name, array.data) for name, array in sorted(reply.content.array_records["model"].items())]


def test_a_lost_reply_is_sent_again_byte_for_byte(small: Scenario):
    with wire_to(small) as wire:
        first, again = wire.train(), wire.train()
        assert bytes_of(first) == bytes_of(again)
        assert first.content["facts"] == again.content["facts"]
    with wire_to(small) as wire:  # another process, other coins
        later = wire.train()
        assert bytes_of(first) == bytes_of(later)
        assert UpdateFacts.unpack(later.content).steps_spent == 1
        code, _ = wire.refused(weights=a_model(small, seed=8))
        assert code == ROUND_TAKEN


def test_a_reply_holds_facts_and_one_model(small: Scenario):
    with wire_to(small) as wire:
        reply = wire.train()
        assert set(reply.content.keys()) == {"facts", "model"}
        assert set(reply.content["facts"]) == {
            "kind", "site", "study", "run", "round", "attempt", "ledger_head", "steps_spent"
        }  # fmt: skip
        unpack_model(reply.content, Shapes.like(a_model(small)))


def test_the_whole_conversation_of_a_study(small: Scenario):
    with wire_to(small) as wire:
        present = Present.unpack(wire.send(RollCall(small.study.digest, "run").pack(), "query").content)
        assert (present.site, present.refusal) == ("va", "")
        facts = UpdateFacts.unpack(wire.train(an_order(small.study, head=present.ledger_head)).content)
        settled = Settled.unpack(wire.send(Farewell(small.study.digest, "run").pack(), "query.close").content)
        assert (facts.steps_spent, settled.steps_spent) == (1, 1)


def test_another_librarys_words_never_leave(small: Scenario, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def careless(*_: object, **__: object) -> Weights:
        raise KeyError(SECRET)

    monkeypatch.setattr(house, "private_update", careless)
    with wire_to(small) as wire, caplog.at_level(logging.ERROR, "wardround.site"):
        code, said = wire.refused()
    assert code == INTERNAL
    assert SECRET not in said
    assert said.startswith("internal error, see the site's log, ref ")
    assert said.rsplit(" ", 1)[1] in caplog.text
    assert SECRET in caplog.text  # who may read the log may know


def test_a_rounds_mark_stays_when_training_fails_and_the_round_can_be_trained_later(
    small: Scenario, monkeypatch: pytest.MonkeyPatch
):
    with wire_to(small) as wire:
        with monkeypatch.context() as broken:
            broken.setattr(house, "private_update", lambda *_, **__: {}["x"])
            assert wire.refused()[0] == INTERNAL
        assert UpdateFacts.unpack(wire.train().content).steps_spent == 1


@pytest.mark.parametrize("reason", ["bad plan", "bad site file", "no site file"])
def test_a_wrong_file_is_never_quoted(small: Scenario, reason: str, caplog: pytest.LogCaptureFixture):
    if reason == "bad site file":
        edited(small, "va", "min_sites = 3", 'min_sites = "Hansen, 1952"')
    elif reason == "no site file":
        small.sites["va"].unlink()
    plan = "nonsense = 'Hansen, 1952'" if reason == "bad plan" else small.study.text
    with LocalGrid(client_app, [small.sites["va"]], {"plan": plan}) as grid:
        code, said = Wire(small, grid).refused()
    assert code == REFUSED
    assert said == "the plan or this site's file is not valid"
    assert reason == "bad plan" or str(small.sites["va"]) in caplog.text


@pytest.mark.parametrize("damage", ["missing", "implausible", "latin-1", "text"])
def test_a_refusal_of_records_names_no_path_no_line_and_no_value(
    small: Scenario, damage: str, caplog: pytest.LogCaptureFixture
):
    records = small.folder / "hansen-1952.csv"
    lines = small.source("va").path.read_text().splitlines()
    first = lines[0].split(",")
    if damage != "missing":
        first[3] = {"implausible": "5123", "latin-1": "M\xfcller", "text": SECRET.replace(",", "")}[damage]
        records.write_bytes("\n".join([",".join(first), *lines[1:]]).encode("latin-1"))
    edited(small, "va", str(small.source("va").path), str(records))
    with wire_to(small) as wire, caplog.at_level(logging.WARNING, "wardround.site"):
        code, said = wire.refused()
    assert (code, said) == (REFUSED, "this site cannot train now; see the site's log")  # why is a figure of patients
    for word in (str(small.folder), "hansen", "5123", "ller", "1952", "line 1", "1 records"):
        assert word not in said.lower()
    assert str(records) in caplog.text or damage == "implausible"
    assert "(" in caplog.text  # the detail


def test_a_client_without_a_site_file_says_so(small: Scenario):
    with wire_to(small) as wire:
        for context in wire.grid._contexts.values():
            context.node_config.clear()
        assert wire.refused() == (REFUSED, "this client was started without a site file")


def test_an_order_with_other_records_or_other_tensors_is_refused(small: Scenario):
    with wire_to(small) as wire:
        model = a_model(small)
        name = next(iter(model))
        assert wire.refused(weights={})[0] == REFUSED
        assert wire.refused(weights={**model, "extra": torch.zeros(1)})[0] == REFUSED
        assert wire.refused(weights={**model, name: torch.zeros(1, 1)})[0] == REFUSED
        content = pack_with_model(an_order(small.study), model)
        content["more"] = Farewell("", "").record()
        assert wire.send(content, "train").error.code == REFUSED
        assert wire.send(RollCall(small.study.digest, "run").pack(), "train").error.code == REFUSED
        with closing(Hospital(small.sites["va"])) as hospital:
            assert hospital.ledger.accounts() == []


def test_two_runs_of_a_study_are_two_charges(small: Scenario):
    with wire_to(small) as wire:
        for run in ("first", "second"):
            assert not wire.train(an_order(small.study, run=run)).has_error()
    with closing(Hospital(small.sites["va"])) as hospital:
        assert [account.charged.training[0].steps for account in hospital.ledger.accounts()] == [4, 4]


def test_coins_of_a_deployment_are_the_operating_systems(small: Scenario):
    with closing(Hospital(small.sites["va"])) as hospital:
        assert type(hospital._coins_for("va", 1)).__name__ == "OsCoins"
        assert hospital._coins_for("va", 1) is not hospital._coins_for("va", 1)
