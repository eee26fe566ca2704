"""A tally as it travels: what a site may send, and what is dropped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.errors import ConfigError, OrderRefused, UpdateRefused
from wardround.common.messages import LookFacts, TallyFacts
from wardround.common.metrics import METRICS, Scores, Tally
from wardround.common.plan import StudyPlan
from wardround.common.privacy import NoisedSteps, spent
from wardround.common.tasks import task_of
from wardround.common.tasks.looks import Look, NoisedLook, look_of

PLAN = 'name = "s"\ntask = "{task}"\nrounds = 9\nmin_sites = 1\nsites.a = 10\n[validation]\n{keys}\n'
AUROC = Look(METRICS["auroc"], 2)


def plan(keys: str = "", task: str = "heart-disease", more: str = "") -> StudyPlan:
    return StudyPlan.parse(PLAN.format(task=task, keys=keys) + more)


def scores(records: int, seed: int = 0, classes: int = 2) -> Scores:
    random = np.random.default_rng(seed)
    return Scores(random.dirichlet(np.ones(classes), records), random.integers(0, classes, records))


def sums(records: int = 30, seed: int = 0) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in Tally.of(scores(records, seed)).sums.items()}


def sent(of: dict[str, np.ndarray]) -> bytes:
    return Tally("classes", 2, of).to_vector().astype("<f8").tobytes()


@given(st.integers(1, 200), st.integers(0, 10**6), st.integers(2, 6))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_what_was_packed_is_what_arrives(records: int, seed: int, classes: int):
    look, found = Look(METRICS["log_loss"], classes), scores(records, seed, classes)
    tally = look.unpack(look.pack(found))
    assert np.array_equal(tally.to_vector(), Tally.of(found).to_vector())
    assert look.figure(tally) == pytest.approx(METRICS["log_loss"](found))


def test_records_in_several_tallies_are_those_in_one():
    parts = [scores(20, seed) for seed in range(3)]
    first, second, third = (AUROC.unpack(AUROC.pack(part)) for part in parts)
    together = AUROC.unpack(AUROC.pack(parts[0] + parts[1] + parts[2]))
    assert AUROC.figure(first + second + third) == AUROC.figure(together)


@given(st.binary(max_size=300) | st.integers(0, 3 * AUROC.nbytes).map(bytes))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_bytes_of_another_length_are_refused(data: bytes):
    if len(data) == AUROC.nbytes:
        return
    with pytest.raises(UpdateRefused, match="bytes long"):
        AUROC.unpack(data)


@given(st.integers(0, AUROC.nbytes // 8 - 1), st.sampled_from([float("nan"), float("inf"), -float("inf")]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_one_number_that_is_not_finite_is_refused_wherever_it_stands(place: int, value: float):
    vector = np.frombuffer(sent(sums()), "<f8").copy()
    vector[place] = value
    with pytest.raises(UpdateRefused, match="not finite"):
        AUROC.unpack(vector.tobytes())


@given(st.integers(0, AUROC.nbytes // 8 - 1))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_one_negative_number_is_refused_wherever_it_stands(place: int):
    vector = np.frombuffer(sent(sums()), "<f8").copy()
    vector[place] = -1.0
    with pytest.raises(UpdateRefused, match="negative"):
        AUROC.unpack(vector.tobytes())


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_bytes_without_meaning_are_refused(seed: int):
    with pytest.raises(UpdateRefused):
        AUROC.unpack(np.random.default_rng(seed).bytes(AUROC.nbytes))


def changed(name: str, place: tuple[int, ...], by: float) -> dict[str, np.ndarray]:
    of = sums()
    of[name][place] += by
    return of


@pytest.mark.parametrize(("of", "why"), [
    (changed("counts", (2, 0), 0.5), "whole number"),
    (changed("histogram", (0, 1, 7), 0.25), "whole number"),
    (changed("counts", (2, 0), 1), "contradict"),  # one record more, only here
    (changed("counts", (0, 1), 40), "contradict"),  # more right answers than answers
    (changed("losses", (2,), 1), "contradict"),
    (changed("losses", (0,), 1e6), "contradict"),  # a surprise that no record can give
    (changed("losses", (1,), 1e3), "contradict"),
    (changed("calibration", (0, 1), 100), "contradict"),
    (changed("calibration", (0, 0), 100), "contradict"),
    (changed("calibration", (0, 2), 1), "contradict"),
    (changed("histogram", (0, 0, 0), 1), "contradict"),
    (changed("histogram", (0, 1, 0), 1), "contradict"),
    (changed("unsound", (0,), 1), "void tally holds sums"),
    ({name: array * 2.0**60 for name, array in sums().items()}, "too many"),
    ({name: array * 0 for name, array in sums().items()}, "no record"),
])  # fmt: skip
def test_sums_that_no_records_have_are_refused(of: dict[str, np.ndarray], why: str):
    with pytest.raises(UpdateRefused, match=why):
        AUROC.unpack(sent(of))


def test_a_model_that_is_no_number_leaves_no_figure_and_is_no_lie():
    broken = Scores(np.full((5, 2), np.nan), np.zeros(5, dtype=np.int64))
    sound = AUROC.unpack(AUROC.pack(scores(20)))
    assert AUROC.figure(sound) is not None
    assert AUROC.figure(sound + AUROC.unpack(AUROC.pack(broken))) is None


def test_a_figure_that_is_undefined_is_none():
    assert AUROC.figure(AUROC.unpack(AUROC.pack(Scores(np.full((4, 2), 0.5), np.zeros(4, dtype=np.int64))))) is None


def test_better_follows_the_metric():
    assert AUROC.better(0.8, 0.7)
    assert not AUROC.better(0.7, 0.7)
    loss = Look(METRICS["log_loss"], 2)
    assert loss.better(0.3, 0.4)
    assert not loss.better(0.4, 0.4)


def test_the_headline_is_looked_at_where_the_plan_names_no_metric():
    assert look_of(task_of(plan()), plan()).metric.name == "auroc"
    other = plan('metric = "log_loss"')
    assert look_of(task_of(other), other).metric.name == "log_loss"


def test_a_metric_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match=r"validation\.metric: there is no metric 'auprocs'; known: auroc"):
        plan('metric = "auprocs"')


def test_a_metric_of_other_answers_is_refused():
    with pytest.raises(ConfigError, match=r"validation\.metric: dice is no figure of a tally of the 2 classes"):
        task_of(plan('metric = "dice"'))


PRIVATE = "[privacy]\nepsilon = 3.0\n"


def test_with_privacy_a_look_sees_the_clipped_loss_and_its_noise_is_calibrated_to_all_looks():
    private = plan("every = 4\ncap = 1.5", more=PRIVATE)
    look = look_of(task_of(private), private)
    assert isinstance(look, NoisedLook)
    assert look.cap == 1.5
    assert private.looks == 3
    assert 2.9 < spent([NoisedSteps(1.0, look.noise_multiplier, 3)], 1e-5) <= 3.0


def test_what_cannot_be_looked_at_under_privacy_is_refused_by_its_key():
    with pytest.raises(ConfigError, match=r"validation\.metric: with \[privacy\] a look sees the mean loss"):
        plan('metric = "auroc"', more=PRIVATE)
    with pytest.raises(ConfigError, match=r"validation\.cap: does nothing without \[privacy\]"):
        plan("cap = 3.0")
    for cap in ("0.0", "-1.0", "1e9", "nan"):
        with pytest.raises(ConfigError, match=r"validation\.cap"):
            plan(f"cap = {cap}", more=PRIVATE)
    pictures = plan(task="image-synthesis", more=PRIVATE)
    with pytest.raises(ConfigError, match=r"validation: with .privacy. a look is a loss of answers, and task image-synthesis"):
        task_of(pictures)


@given(st.lists(st.floats(width=64), max_size=40), st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_patient_adds_more_than_one_to_a_look_whatever_its_loss(losses: list[float], cap: float):
    vectors = NoisedLook(cap, 3.0).vectors(np.array(losses, dtype=np.float64))
    assert vectors.shape == (len(losses), 2)
    assert (np.linalg.norm(vectors, axis=1) <= 1).all()
    assert (vectors >= 0).all()


def test_the_figure_of_summed_looks_is_the_mean_clipped_loss():
    look, losses = NoisedLook(2.0, 1e-6), np.array([0.5, 1.0, 9.0, np.nan, -4.0])
    parts = [look.unpack(look.vectors(part).sum(axis=0).astype("<f8").tobytes()) for part in (losses[:2], losses[2:])]
    assert look.figure(parts[0] + parts[1]) == pytest.approx((0.5 + 1.0 + 2.0 + 2.0 + 0.0) / 5)
    assert look.better(0.3, 0.4)
    assert not look.better(0.4, 0.4)


@pytest.mark.parametrize("patients", [0, 5])
def test_patients_that_drown_in_the_noise_are_no_figure(patients: int):
    look = NoisedLook(2.0, 2.0)
    total = look.unpack(look.vectors(np.ones(patients)).sum(axis=0).astype("<f8").tobytes())
    assert look.figure(total) is None


@pytest.mark.parametrize(("sums", "why"), [(b"", "bytes long"), (bytes(24), "bytes long"),
    (np.array([np.nan, 1.0]).tobytes(), "not finite"), (np.array([1.0, np.inf]).tobytes(), "not finite")])  # fmt: skip
def test_noised_sums_of_another_shape_are_refused(sums: bytes, why: str):
    with pytest.raises(UpdateRefused, match=why):
        NoisedLook(2.0, 2.0).unpack(sums)


@pytest.mark.parametrize("keys", ["share = 0.0", "share = 0.6", "every = 0", "patience = 0", 'keep = "median"', "look = 1"])
def test_a_plan_without_sense_is_refused(keys: str):
    with pytest.raises(ConfigError, match="validation"):
        plan(keys)


def test_the_last_round_is_looked_at_in_any_case():
    assert [round for round in range(1, 10) if plan("every = 4").looks_after(round)] == [4, 8, 9]
    without = StudyPlan.parse('name = "s"\ntask = "heart-disease"\nrounds = 9\nmin_sites = 1\nsites.a = 10\n')
    assert not any(without.looks_after(round) for round in range(1, 10))


FACTS = [LookFacts("a" * 64, "run", 5), TallyFacts("va", "a" * 64, "run", 5, b"\x00\xff" * 9)]


@pytest.mark.parametrize("facts", FACTS)
def test_the_messages_of_a_look_survive_packing_and_nothing_else_passes_for_them(facts: LookFacts | TallyFacts):
    assert type(facts).unpack(facts.pack()) == facts
    for other in FACTS:
        if other is not facts:
            with pytest.raises(OrderRefused, match="the message is no"):
                type(other).unpack(facts.pack())
    for name, value in vars(facts).items():
        content = facts.pack()
        content["facts"][name] = 1.5 if not isinstance(value, int) else "5"  # type: ignore[index]
        with pytest.raises(OrderRefused, match=name):
            type(facts).unpack(content)
        content = facts.pack()
        del content["facts"][name]  # type: ignore[attr-defined]
        with pytest.raises(OrderRefused, match="other fields"):
            type(facts).unpack(content)
