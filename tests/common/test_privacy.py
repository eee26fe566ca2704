"""What a history costs, checked against Google's accountant called by hand."""

from __future__ import annotations

import math
import random

import pytest
from dp_accounting import NeighboringRelation, dp_event, pld
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.errors import ConfigError
from wardround.common.privacy import Cost, NoisedSteps, calibrate, filtered, spent

DELTA = 1e-5
RATES = st.sampled_from([0.01, 0.1, 0.25, 0.5, 1.0])
NOISES = st.sampled_from([0.8, 1.0, 1.7, 3.6533, 10.0])
HISTORIES = st.lists(st.builds(NoisedSteps, RATES, NOISES, st.integers(1, 200)), min_size=1, max_size=3)
few = settings(max_examples=8, deadline=None, derandomize=True)


def by_hand(history: list[NoisedSteps], *, relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE) -> float:
    accountant = pld.PLDAccountant(relation)  # ten times finer than ours
    for part in history:
        sampled = dp_event.PoissonSampledDpEvent(part.sampling_rate, dp_event.GaussianDpEvent(part.noise_multiplier))
        accountant.compose(sampled, part.steps)
    return float(accountant.get_epsilon(DELTA))


@pytest.mark.parametrize("adjacency", ["add-or-remove", "replace-one"])
@pytest.mark.parametrize("history", [
    [NoisedSteps(0.25, 3.6533, 100)],
    [NoisedSteps(0.032, 1.0, 1560)],
    [NoisedSteps(1.0, 12.0, 40)],
    [NoisedSteps(0.5, 4.0, 50), NoisedSteps(0.1, 1.5, 80), NoisedSteps(0.5, 4.0, 25)],
])  # fmt: skip
def test_epsilon_is_that_of_an_accountant_called_by_hand(history: list[NoisedSteps], adjacency: str):
    relation = {
        "add-or-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace-one": NeighboringRelation.REPLACE_ONE,
    }[adjacency]
    assert spent(history, DELTA, adjacency) == pytest.approx(by_hand(history, relation=relation), rel=0.005, abs=1e-3)


def test_epsilon_is_the_published_one():
    assert spent([NoisedSteps(0.032, 1.0, 1560)], DELTA) == pytest.approx(8.40, abs=0.02)
    assert spent([NoisedSteps(0.032, 1.0, 1560)], DELTA, "replace-one") == pytest.approx(14.28, abs=0.02)


def test_an_empty_history_costs_nothing():
    assert spent([], DELTA) == filtered([], DELTA) == 0.0
    assert spent([NoisedSteps(0.5, 1.0, 0)], DELTA) == filtered([NoisedSteps(0.5, 1.0, 0)], DELTA) == 0.0


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(3.0, 0.25, 100), (1.0, 0.5, 30), (8.0, 0.032, 1560), (0.2, 1.0, 10)])
def test_calibrated_noise_is_enough_and_a_little_less_is_not(epsilon: float, rate: float, steps: int):
    noise = calibrate(epsilon, DELTA, rate, steps)
    assert spent([NoisedSteps(rate, noise, steps)], DELTA) <= epsilon
    assert by_hand([NoisedSteps(rate, noise, steps)]) <= epsilon + 1e-3
    assert spent([NoisedSteps(rate, 0.998 * noise, steps)], DELTA) > epsilon


@settings(few, max_examples=5)
@given(st.floats(0.1, 20), RATES, st.integers(1, 500))
def test_calibrated_noise_never_exceeds_the_wanted_epsilon(epsilon: float, rate: float, steps: int):
    assert spent([NoisedSteps(rate, calibrate(epsilon, DELTA, rate, steps), steps)], DELTA) <= epsilon


@few
@given(HISTORIES)
def test_the_filter_is_never_below_the_tight_cost(history: list[NoisedSteps]):
    assert filtered(history, DELTA) >= spent(history, DELTA) - 1e-3


@few
@given(HISTORIES)
def test_replacing_a_patient_costs_at_least_what_removing_one_does(history: list[NoisedSteps]):
    assert spent(history, DELTA, "replace-one") >= spent(history, DELTA) - 1e-3


@few
@given(HISTORIES, st.randoms())
def test_neither_order_nor_cuts_of_a_history_matter(history: list[NoisedSteps], shuffle: random.Random):
    pieces = [
        NoisedSteps(part.sampling_rate, part.noise_multiplier, steps)
        for part in history
        for steps in (part.steps // 3, part.steps - part.steps // 3)
    ]
    shuffle.shuffle(pieces)
    assert spent(pieces, DELTA) == spent(history, DELTA)
    assert filtered(pieces, DELTA) == filtered(history, DELTA)


@few
@given(HISTORIES, st.builds(NoisedSteps, RATES, NOISES, st.integers(1, 200)))
def test_another_study_never_lowers_the_cost(history: list[NoisedSteps], more: NoisedSteps):
    assert filtered([*history, more], DELTA) > filtered(history, DELTA)


@pytest.mark.parametrize("noise", [1e-300, 1e-9, 0.001, 0.02, 0.05])
def test_hardly_any_noise_costs_too_much_for_every_budget_and_is_counted_at_once(noise: float):
    history = [NoisedSteps(0.5, noise, 100)]
    assert filtered(history, DELTA) > 1000
    assert spent(history, DELTA) == spent(history, DELTA, "replace-one") == math.inf


def test_a_huge_noise_is_counted_as_no_more_than_the_accountants_can_hold():
    assert 0 <= filtered([NoisedSteps(0.5, 1e200, 100)], DELTA) < 1e-3


TRAINED, COUNTED, LOOKED = NoisedSteps(0.25, 3.65, 100), NoisedSteps(1.0, 10.0, 1), NoisedSteps(1.0, 6.2, 20)


def test_the_cost_of_a_study_is_that_of_the_patient_who_pays_more_and_never_the_sum():
    cost = Cost((TRAINED, COUNTED), (LOOKED,))
    sides = spent([TRAINED, COUNTED], 1e-5), spent([LOOKED], 1e-5)
    assert cost.epsilon(1e-5) == max(sides)
    assert cost.epsilon(1e-5) < spent([TRAINED, COUNTED, LOOKED], 1e-5)
    assert Cost(()).epsilon(1e-5) == 0
    assert Cost((TRAINED,)).epsilon(1e-5, "replace-one") == spent([TRAINED], 1e-5, "replace-one")


def test_a_patient_replaced_by_one_on_the_other_side_is_not_cheaper_than_either_going():
    cost = Cost((TRAINED,), (LOOKED,))
    assert cost.epsilon(1e-5, "replace-one") >= spent([TRAINED, LOOKED], 1e-5)
    assert cost.epsilon(1e-5, "replace-one") >= spent([LOOKED], 1e-5, "replace-one")


def test_a_filter_counts_the_dearer_side_of_each_study():
    """Over studies a patient may change sides, so it is not enough to follow one side through all of them."""
    cheap, dear = NoisedSteps(1.0, 50.0, 1), NoisedSteps(1.0, 4.0, 1)
    first, second = Cost((dear,), (cheap,)), Cost((cheap,), (dear,))
    assert filtered([first, second], 1e-5) == pytest.approx(filtered([dear, dear], 1e-5))
    assert filtered([first, Cost((cheap,), ())], 1e-5) == pytest.approx(filtered([dear, cheap], 1e-5))
    assert filtered([Cost((TRAINED,), (LOOKED,))] * 2, 1e-5) < filtered([TRAINED, LOOKED] * 2, 1e-5)
    assert filtered([Cost((TRAINED, COUNTED))], 1e-5) == filtered([TRAINED, COUNTED], 1e-5)
    assert filtered([Cost((TRAINED,), (NoisedSteps(1.0, 1e-9, 1),))], 1e-5) == math.inf


def test_noise_calibrated_beside_other_releases_pays_for_all_together():
    sigma = calibrate(3.0, 1e-5, 0.25, 100, (COUNTED,))
    assert 2.97 < spent([NoisedSteps(0.25, sigma, 100), COUNTED], 1e-5) <= 3.0
    with pytest.raises(ConfigError, match="no noise keeps epsilon"):
        calibrate(0.2, 1e-5, 0.25, 100, (COUNTED,))


def test_a_promise_below_what_the_accountant_can_see_is_refused_rather_than_searched_for_ever():
    with pytest.raises(ConfigError, match="no noise keeps epsilon 1e-12 at delta 1e-12"):
        calibrate(1e-12, 1e-12, 0.25, 100)
