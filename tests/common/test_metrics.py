"""Figures are what their definitions say, and undefined where those say nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.metrics import METRICS, Scores, accuracy, auroc, interval, log_loss

PATIENTS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 0.9, 1.0]), st.integers(0, 1)), max_size=30)


def scored(patients: list[tuple[float, int]]) -> Scores:
    return Scores(np.array([p for p, _ in patients]), np.array([y for _, y in patients], dtype=np.int64))


@given(PATIENTS)
@settings(max_examples=300, deadline=None)
def test_auroc_counts_the_pairs_in_the_right_order(patients: list[tuple[float, int]]):
    ill, well = [p for p, y in patients if y], [p for p, y in patients if not y]
    found = auroc(scored(patients))
    if not ill or not well:
        assert math.isnan(found)
        return
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in ill for b in well]
    assert found == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


@given(PATIENTS.filter(bool))
@settings(max_examples=100, deadline=None)
def test_accuracy_and_log_loss_follow_their_definitions(patients: list[tuple[float, int]]):
    assert accuracy(scored(patients)) == pytest.approx(sum((p >= 0.5) == y for p, y in patients) / len(patients))
    clipped = [(min(max(p, 1e-7), 1 - 1e-7), y) for p, y in patients]
    assert log_loss(scored(patients)) == pytest.approx(-sum(math.log(p if y else 1 - p) for p, y in clipped) / len(patients))


@pytest.mark.parametrize("name", METRICS)
def test_nobody_has_no_figure_and_no_interval(name: str):
    assert math.isnan(METRICS[name](scored([])))
    assert interval(METRICS[name], scored([]), seed=0) is None


def test_one_class_has_no_auroc_and_no_interval():
    alone = scored([(0.2, 1), (0.8, 1)])
    assert math.isnan(auroc(alone))
    assert interval(auroc, alone, seed=0) is None
    assert accuracy(alone) == 0.5


@pytest.mark.parametrize("name", METRICS)
def test_a_model_that_answers_no_number_has_no_figure(name: str):
    assert math.isnan(METRICS[name](scored([(math.nan, 1), (0.3, 0), (0.9, 1)])))


def test_both_sets_together_are_all_patients():
    one, two = scored([(0.1, 0)]), scored([(0.9, 1), (0.2, 0)])
    assert len(one + two) == 3
    assert auroc(one + two) == 1.0


@pytest.mark.parametrize("metric", [auroc, accuracy, log_loss])
def test_an_interval_mostly_contains_the_truth_and_narrows_with_more_patients(metric):
    random = np.random.default_rng(0)

    def draw(count: int) -> Scores:
        label = random.integers(0, 2, count)
        return Scores(1 / (1 + np.exp(-random.normal(1.5 * (2 * label - 1), 1.5))), label)

    truth = metric(draw(100_000))
    ends = [interval(metric, draw(150), seed=n, draws=200) for n in range(60)]
    assert sum(low <= truth <= high for low, high in ends) >= 50
    assert np.mean([high - low for low, high in ends]) > 2 * np.diff(interval(metric, draw(2000), seed=0, draws=200))[0]


def test_an_interval_repeats_with_its_seed():
    some = scored([(p / 20, p % 3 == 0) for p in range(20)])
    assert interval(auroc, some, seed=1) == interval(auroc, some, seed=1)
    assert interval(auroc, some, seed=1) != interval(auroc, some, seed=2)
