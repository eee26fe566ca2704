"""Questions beside training: no patient moves an answer by more than 1; it is charged first, and drawn once."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import repeatable_coins
from wardround.client import hospital as house
from wardround.client.data import open_parted
from wardround.client.dp import Coins, OsCoins
from wardround.client.hospital import Hospital
from wardround.client.ledger import StudyAccount
from wardround.client.queries import class_vectors, loss_vectors, summed
from wardround.common.errors import BudgetExhausted, DataRefused, OrderRefused, RoundTaken
from wardround.common.messages import CountFacts, Farewell, LookFacts, OrderFacts
from wardround.common.privacy import Cost, NoisedSteps, spent
from wardround.common.tasks import TASKS, Records
from wardround.common.tasks.looks import NoisedLook
from wardround.common.tasks.of_plan import packed
from wardround.common.weights import Weights, trainable
from wardround.simulations.scenario import Changes, Scenario

TASK = TASKS["heart-disease"]
SHARES = packed((0.6, 0.4))
few = settings(max_examples=40, deadline=None, derandomize=True)


def records_of(patients: list[list[int]], seed: int) -> Records:
    """One list of labels a patient."""
    patient = torch.tensor([number for number, labels in enumerate(patients) for _ in labels], dtype=torch.int64)
    table = torch.randn(len(patient), *TASK.blank(1).fields["table"].shape[1:], generator=torch.Generator().manual_seed(seed))
    label = torch.tensor([label for labels in patients for label in labels], dtype=torch.int64)
    return Records({"table": table}, label, patient)


def numbers(sums: bytes) -> np.ndarray:
    return np.frombuffer(sums, "<f8")


PATIENTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=12)


@given(PATIENTS, st.integers(0, 11), st.integers(0, 1000))
@few
def test_one_patient_moves_an_answer_by_no_more_than_one(patients: list[list[int]], who: int, seed: int):
    records = records_of(patients, seed)
    rest = records.of_patients(torch.arange(records.patients) != who % records.patients)
    moved = numbers(summed(class_vectors(records, 2))) - numbers(summed(class_vectors(rest, 2)))
    assert np.linalg.norm(moved) <= 1
    model, look = TASK.model({}, 1), NoisedLook(1.5, 3.0)
    weights = {name: 40 * tensor for name, tensor in trainable(model).items()}  # sure of itself, so that losses reach the cap
    before, after = (numbers(summed(loss_vectors(look, TASK, model, weights, part))) for part in (records, rest))
    assert np.linalg.norm(before - after) <= 1
    assert np.linalg.norm(before - after) > 0.4  # the count alone


def test_a_patient_of_many_records_counts_as_one():
    vectors = class_vectors(records_of([[0, 0, 0, 1], [1]], 0), 3)
    assert vectors.tolist() == [[0.75, 0.25, 0], [0, 1, 0]]
    assert class_vectors(records_of([], 0), 2).shape == (0, 2)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_model_that_is_no_number_moves_no_sum_beyond_the_cap(broken: float):
    records, look, model = records_of([[0, 1], [1]], 3), NoisedLook(1.5, 3.0), TASK.model({}, 1)
    weights = {name: torch.full_like(tensor, broken) for name, tensor in trainable(model).items()}
    vectors = loss_vectors(look, TASK, model, weights, records)
    assert np.isfinite(vectors).all()
    assert (np.linalg.norm(vectors, axis=1) <= 1).all()


def test_a_look_is_the_mean_over_patients_of_their_mean_loss():
    records, look, model = records_of([[0, 1, 1], [1]], 3), NoisedLook(100.0, 1e-9), TASK.model({}, 1)
    weights = trainable(model)
    with torch.no_grad():
        loss = TASK.loss(torch.func.functional_call(model, weights, args=(), kwargs=dict(records.fields)), records.label)
    found = look.figure(look.unpack(summed(loss_vectors(look, TASK, model, weights, records))))
    assert found == pytest.approx(float((loss[:3].mean() + loss[3]) / 2), rel=1e-3)
    assert model.training  # as it was


@pytest.mark.parametrize("sigma", [0.5, 10.0])
def test_the_noise_is_there_and_as_large_as_was_charged(sigma: float):
    count = 20_000
    noise = numbers(summed(np.zeros((3, count)), noise_multiplier=sigma, coins=OsCoins()))
    # bounds of eight standard errors: each fails less than once in 10^14
    assert abs(noise.std() / sigma - 1) < 8 / math.sqrt(2 * count)
    assert abs(noise.mean()) < 8 * sigma / math.sqrt(count)
    again = numbers(summed(np.zeros((3, count)), noise_multiplier=sigma, coins=OsCoins()))
    assert abs(np.corrcoef(noise, again)[0, 1]) < 8 / math.sqrt(count)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_coins_without_a_multiplier_are_refused_rather_than_ignored(sigma: float):
    with pytest.raises(ValueError, match="noise cannot have multiplier"):
        summed(np.zeros((3, 2)), noise_multiplier=sigma, coins=OsCoins())


# --- at a hospital -------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path, study_file: Path) -> Callable[..., Scenario]:
    """The shipped study with counted classes and looks; `prepared(private=False)`, other sections by name."""

    def prepare(*, private: bool = True, **sections: object) -> Scenario:
        table = tomllib.loads(study_file.read_text()) | {"rounds": 4}
        table |= {"validation": {"share": 0.4, "every": 2}, "loss": {"class_weights": "counted"}, **sections}
        if not private:
            table.pop("privacy")
        (tmp_path / "study.toml").write_text(tomli_w.dumps(table))
        return Scenario.prepare(tmp_path / "study.toml", tmp_path / "run", Changes())

    return prepare


def a_model(of: Scenario, seed: int = 7) -> Weights:
    return trainable(of.task.model(of.study.plan.model, seed))


def a_count(of: Scenario, head: str = "") -> CountFacts:
    return CountFacts(of.study.digest, "run", head)


def a_look(of: Scenario, round: int = 2, shares: bytes = SHARES) -> LookFacts:
    return LookFacts(of.study.digest, "run", round, "", shares)


def an_order(of: Scenario, round: int = 1, shares: bytes = SHARES) -> OrderFacts:
    return OrderFacts(of.study.digest, "run", round, 1, "", shares)


def account(hospital: Hospital) -> StudyAccount:
    (found,) = hospital.ledger.accounts()
    return found


def test_every_question_is_reserved_and_marked_before_a_record_is_opened(
    prepared: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch
):
    of = prepared()
    seen: list[tuple[int, int, int]] = []
    honest = house.open_parted
    with closing(Hospital(of.sites["va"])) as hospital:

        def watched(*given: object) -> object:
            found = account(hospital)
            seen.append((found.counted, found.looked, found.marked))
            assert found.charged == of.study.plan.cost()
            return honest(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(house, "open_parted", watched)
        for ask in (
            lambda: hospital.count(of.study, a_count(of)),
            lambda: hospital.train(of.study, an_order(of), a_model(of)),
            lambda: hospital.evaluate(of.study, a_look(of), a_model(of)),
        ):
            hospital._parted.clear()
            ask()
    assert seen == [(1, 0, 0), (1, 0, 1), (1, 1, 1)]


def test_what_the_ledger_charges_is_what_an_accountant_composes(prepared: Callable[..., Scenario]):
    of = prepared()
    plan = of.study.plan
    with closing(Hospital(of.sites["va"])) as hospital:
        hospital.count(of.study, a_count(of))
        for round in (1, 2):
            hospital.train(of.study, an_order(of, round), a_model(of))
        hospital.evaluate(of.study, a_look(of, 2), a_model(of))
        assert account(hospital).charged == plan.cost()
        assert plan.cost().epsilon(1e-5) <= 3.0
        hospital.settle(of.study, Farewell(of.study.digest, "run"))
        found = account(hospital).charged
    sigma, looks = plan.noise_multiplier(), plan.looks_query()
    assert looks is not None
    assert found == Cost(
        (NoisedSteps(0.5, sigma, 2), NoisedSteps(1.0, 10.0, 1)), (NoisedSteps(1.0, looks.noise_multiplier, 1),)
    )
    both = spent([NoisedSteps(0.5, sigma, 2), NoisedSteps(1.0, 10.0, 1)], 1e-5)
    assert both > spent([NoisedSteps(0.5, sigma, 2)], 1e-5)
    assert found.epsilon(1e-5) == max(both, spent([looks], 1e-5) if looks.steps == 1 else spent(found.aside, 1e-5))


def test_an_answer_is_drawn_once_and_sent_as_often_as_asked(prepared: Callable[..., Scenario]):
    of, drawn = prepared(), []

    def coins(site: str, round: int) -> Coins:
        drawn.append(round)
        return OsCoins()

    answers = set()
    for _ in range(2):  # also over a restart
        with closing(Hospital(of.sites["va"], coins)) as hospital:
            for _ in range(2):
                counted = hospital.count(of.study, a_count(of)).sums
                looked = hospital.evaluate(of.study, a_look(of), a_model(of)).sums
                answers.add((counted, looked))
            assert (account(hospital).counted, account(hospital).looked) == (1, 1)
    assert len(answers) == 1
    assert len(drawn) == 2  # one for each question
    with closing(Hospital(of.sites["va"], coins)) as hospital:
        for round in (1, 2, 3, 4):
            hospital.train(of.study, an_order(of, round), a_model(of))
        assert hospital.count(of.study, a_count(of)).sums == counted  # however late


def test_an_answer_is_noised(prepared: Callable[..., Scenario]):
    of = prepared()
    training = open_parted(of.source("va"), of.task, 0.4)[0]
    exact = class_vectors(training, 2).sum(axis=0)
    with closing(Hospital(of.sites["va"])) as hospital:
        found = numbers(hospital.count(of.study, a_count(of)).sums)
    assert (found != np.round(found)).any()
    assert np.abs(found - exact).max() < 8 * 10.0


def test_a_round_or_a_look_already_begun_is_refused_to_another_model_or_other_shares(prepared: Callable[..., Scenario]):
    of = prepared()
    with closing(Hospital(of.sites["va"])) as hospital:
        hospital.evaluate(of.study, a_look(of), a_model(of))
        hospital.train(of.study, an_order(of), a_model(of))
        for shares, seed in ((SHARES, 8), (packed((0.5, 0.5)), 7)):
            with pytest.raises(RoundTaken):
                hospital.evaluate(of.study, a_look(of, shares=shares), a_model(of, seed))
            with pytest.raises(RoundTaken):
                hospital.train(of.study, an_order(of, shares=shares), a_model(of, seed))
        assert (account(hospital).looked, account(hospital).marked) == (1, 1)


def never(*_: object) -> None:
    raise AssertionError("records were opened")


def test_a_question_outside_the_plan_opens_no_record(prepared: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch):
    of = prepared()
    for name in ("open_parted", "open_records"):
        monkeypatch.setattr(house, name, never)
    with closing(Hospital(of.sites["va"])) as hospital:
        with pytest.raises(OrderRefused, match="another study plan"):
            hospital.count(of.study, CountFacts("0" * 64, "run", ""))
        with pytest.raises(OrderRefused, match="their shares did not come"):
            hospital.train(of.study, an_order(of, shares=b""), a_model(of))
        with pytest.raises(OrderRefused, match="their shares did not come"):
            hospital.evaluate(of.study, a_look(of, shares=b""), a_model(of))
        with pytest.raises(OrderRefused, match="no look after round 3"):
            hospital.evaluate(of.study, a_look(of, 3), a_model(of))


def test_classes_of_a_plan_that_does_not_count_them_open_no_record(
    prepared: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch
):
    of = prepared(loss={"focal": 1.0})
    monkeypatch.setattr(house, "open_parted", never)
    with closing(Hospital(of.sites["va"])) as hospital, pytest.raises(OrderRefused, match="has no classes counted"):
        hospital.count(of.study, a_count(of))


def test_a_budget_that_the_whole_would_pass_answers_no_question(
    prepared: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch
):
    of = prepared()
    monkeypatch.setattr(house, "open_parted", never)
    file = of.sites["va"]
    text = file.read_text()
    assert "epsilon_lifetime = 15.0" in text
    file.write_text(text.replace("epsilon_lifetime = 15.0", "epsilon_lifetime = 3.2"))
    with closing(Hospital(file)) as hospital:
        for ask in (
            lambda: hospital.count(of.study, a_count(of)),
            lambda: hospital.evaluate(of.study, a_look(of), a_model(of)),
        ):
            with pytest.raises(BudgetExhausted):
                ask()
        assert hospital.ledger.accounts() == []


def test_without_privacy_counts_are_exact_and_those_of_few_patients_stay(prepared: Callable[..., Scenario]):
    of = prepared(private=False)
    training = open_parted(of.source("va"), of.task, 0.4)[0]
    with closing(Hospital(of.sites["va"])) as hospital:
        found = hospital.count(of.study, a_count(of))
        assert numbers(found.sums).tolist() == torch.bincount(training.label, minlength=2).tolist()
        assert found.ledger_head == ""
    file = of.sites["va"]
    file.write_text(file.read_text().replace("min_evaluated = 10\n", f"min_evaluated = {training.patients + 1}\n"))
    with closing(Hospital(file)) as hospital, pytest.raises(DataRefused, match="too few patients to count") as refusal:
        hospital.count(of.study, a_count(of))
    assert str(training.patients) not in str(refusal.value)


def test_a_private_look_says_nothing_of_how_many_are_set_aside(prepared: Callable[..., Scenario]):
    of = prepared(validation={"share": 0.001, "every": 2})
    with closing(Hospital(of.sites["va"], repeatable_coins)) as hospital:
        assert open_parted(of.source("va"), of.task, 0.001)[1].patients < 10
        facts = hospital.evaluate(of.study, a_look(of), a_model(of))
    assert len(facts.sums) == 16
