"""Figures are what their definitions say, and undefined where those say nothing."""

from __future__ import annotations

import math
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional import classification as oracle
from torchmetrics.functional import mean_squared_error
from torchmetrics.functional.text import perplexity

from wardround.common.metrics import (
    METRICS,
    BoxScores,
    MaskScores,
    Scores,
    accuracy,
    auroc,
    interval,
    log_loss,
    per_class,
)

OF_CLASSES = [name for name, metric in METRICS.items() if metric.kind is Scores]
PATIENTS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 0.9, 1.0]), st.integers(0, 1)), max_size=30)


def scored(patients: list[tuple[float, int]]) -> Scores:
    return Scores(np.array([p for p, _ in patients]), np.array([y for _, y in patients], dtype=np.int64))


def drawn(count: int, classes: int, *, present: int | None = None, ties: bool = False, seed: int = 0) -> Scores:
    """Scores of a model that knows something; labels of the first `present` classes; with ties, one decimal of a logit."""
    random = np.random.default_rng(seed)
    label = random.integers(0, present or classes, count)
    logits = random.normal(size=(count, classes)) + np.eye(classes)[label]
    logits = np.round(logits) / 2 if ties else logits
    odds = np.exp(logits)
    return Scores(odds / odds.sum(axis=1, keepdims=True), label)


def of_two(name: str, scores: Scores) -> float:
    score, label = torch.from_numpy(scores.probability[:, 1]), torch.from_numpy(scores.label)
    at = {"threshold": 0.5 - 1e-9}  # there, a score of the threshold itself is negative
    functions = {
        "auroc": oracle.binary_auroc,
        "auprc": oracle.binary_average_precision,
        "accuracy": partial(oracle.binary_accuracy, **at),
        "precision": partial(oracle.binary_precision, **at),
        "recall": partial(oracle.binary_recall, **at),
        "f1": partial(oracle.binary_f1_score, **at),
        "specificity": partial(oracle.binary_specificity, **at),
        "brier": lambda score, label: mean_squared_error(score, label.double()),
        "calibration_error": lambda score, label: oracle.binary_calibration_error(score, label, n_bins=15, norm="l1"),
        "balanced_accuracy": lambda score, label: oracle.multiclass_accuracy((score >= 0.5).long(), label, 2, average="macro"),
    }
    return float(functions[name](score, label)) if name in functions else of_more(name, scores)


def of_more(name: str, scores: Scores) -> float:
    score, label, classes = torch.from_numpy(scores.probability), torch.from_numpy(scores.label), scores.classes
    one_hot = torch.nn.functional.one_hot(label, classes).double()
    functions = {
        "auroc": lambda: oracle.multiclass_auroc(score, label, classes),
        "auprc": lambda: oracle.multiclass_average_precision(score, label, classes),
        "accuracy": lambda: oracle.multiclass_accuracy(score, label, classes, average="micro"),
        "balanced_accuracy": lambda: oracle.multiclass_accuracy(score, label, classes, average="macro"),
        "precision": lambda: oracle.multiclass_precision(score, label, classes),
        "recall": lambda: oracle.multiclass_recall(score, label, classes),
        "f1": lambda: oracle.multiclass_f1_score(score, label, classes),
        "specificity": lambda: oracle.multiclass_specificity(score, label, classes),
        "log_loss": lambda: perplexity(score.log()[None], label[None]).log(),
        "perplexity": lambda: perplexity(score.log()[None], label[None]),
        "brier": lambda: mean_squared_error(score, one_hot) * classes,
        "calibration_error": lambda: oracle.multiclass_calibration_error(score, label, classes, n_bins=15, norm="l1"),
    }
    return float(functions[name]())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_figure_of_two_classes_is_that_of_torchmetrics(name: str, ties: bool):
    for seed in range(3):
        scores = drawn(300, 2, ties=ties, seed=seed)
        assert METRICS[name](scores) == pytest.approx(of_two(name, scores), abs=2e-6)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_figure_of_more_classes_is_that_of_torchmetrics(name: str, classes: int, ties: bool):
    for seed in range(3):
        scores = drawn(300, classes, ties=ties, seed=seed)
        assert METRICS[name](scores) == pytest.approx(of_more(name, scores), abs=2e-6)


@pytest.mark.parametrize("name", ["accuracy", "precision", "recall", "f1", "specificity", "log_loss", "brier"])
def test_classes_that_no_record_has_count_as_in_torchmetrics(name: str):
    scores = drawn(300, 6, present=4)
    assert METRICS[name](scores) == pytest.approx(of_more(name, scores), abs=2e-6)


@pytest.mark.parametrize("name", ["auroc", "auprc"])
def test_a_ranking_is_averaged_over_the_classes_present(name: str):
    scores = drawn(300, 6, present=4)
    one_by_one = [
        METRICS[name](Scores(scores.probability[:, number], (scores.label == number).astype(np.int64))) for number in range(4)
    ]
    assert METRICS[name](scores) == pytest.approx(np.mean(one_by_one))


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_present():
    scores = drawn(300, 6, present=4)
    recalls = [per_class(scores)[number]["recall"] for number in range(4)]
    assert METRICS["balanced_accuracy"](scores) == pytest.approx(np.mean(recalls))


@pytest.mark.parametrize("classes", [2, 5])
def test_each_class_has_its_own_figures(classes: int):
    scores = drawn(200, classes)
    label, chosen = torch.from_numpy(scores.label), torch.from_numpy(scores.chosen)
    wanted = {
        "precision": oracle.multiclass_precision(chosen, label, classes, average=None),
        "recall": oracle.multiclass_recall(chosen, label, classes, average=None),
        "f1": oracle.multiclass_f1_score(chosen, label, classes, average=None),
        "support": torch.bincount(label),
    }
    for number, figures in per_class(scores).items():
        assert figures == pytest.approx({name: float(values[number]) for name, values in wanted.items()})


def test_a_class_that_nobody_has_or_is_called_has_no_figures_of_its_own():
    scores = Scores(np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]), np.array([0, 1]))
    absent = per_class(scores)[2]
    assert absent.pop("support") == 0
    assert all(math.isnan(value) for value in absent.values())
    assert METRICS["f1"](scores) == METRICS["precision"](scores) == 1.0


@given(PATIENTS)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_auroc_counts_the_pairs_in_the_right_order(patients: list[tuple[float, int]]):
    ill, well = [p for p, y in patients if y], [p for p, y in patients if not y]
    found = auroc(scored(patients))
    if not ill or not well:
        assert math.isnan(found)
        return
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in ill for b in well]
    assert found == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


@given(PATIENTS.filter(bool))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_accuracy_and_log_loss_follow_their_definitions(patients: list[tuple[float, int]]):
    assert accuracy(scored(patients)) == pytest.approx(sum((p >= 0.5) == y for p, y in patients) / len(patients))
    clipped = [(min(max(p, 1e-7), 1 - 1e-7), y) for p, y in patients]
    assert log_loss(scored(patients)) == pytest.approx(-sum(math.log(p if y else 1 - p) for p, y in clipped) / len(patients))


@given(PATIENTS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_scores_make_a_figure_fail(patients: list[tuple[float, int]]):
    for name in OF_CLASSES:
        value = METRICS[name](scored(patients))
        assert math.isnan(value) or 0 <= value <= (1.001e7 if name == "perplexity" else 17)


def test_one_column_is_two_classes():
    one, label = np.array([0.1, 0.9, 0.4]), np.array([0, 1, 1])
    two = Scores(np.stack([1 - one, one], axis=1), label)
    assert np.array_equal(Scores(one, label).probability, two.probability)
    assert Scores(np.array([]), np.array([], dtype=np.int64)).probability.shape == (0, 2)


@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize("classes", [2, 4])
def test_nobody_has_no_figure_and_no_interval(name: str, classes: int):
    nobody = Scores(np.zeros((0, classes)), np.zeros(0, dtype=np.int64))
    assert math.isnan(METRICS[name](nobody))
    assert interval(METRICS[name], nobody, seed=0) is None


@pytest.mark.parametrize("name", ["auroc", "balanced_accuracy", "specificity"])
def test_one_class_has_no_figure_that_compares_and_no_interval(name: str):
    alone = scored([(0.2, 1), (0.8, 1)])
    assert math.isnan(METRICS[name](alone))
    assert interval(METRICS[name], alone, seed=0) is None
    assert accuracy(alone) == 0.5


@pytest.mark.parametrize("name", ["auprc", "recall"])
def test_without_positives_nothing_is_found(name: str):
    assert math.isnan(METRICS[name](scored([(0.2, 0), (0.8, 0)])))


def test_without_a_positive_call_there_is_no_precision():
    assert math.isnan(METRICS["precision"](scored([(0.2, 0), (0.3, 1)])))


def test_the_last_bin_of_a_calibration_holds_a_probability_of_one():
    assert METRICS["calibration_error"](scored([(1.0, 1), (0.95, 0)])) == pytest.approx(0.475)


@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.2, 1.5])
def test_a_model_that_answers_no_probability_has_no_figure(name: str, wrong: float):
    answers = scored([(0.1, 0), (0.2, 0), (wrong, 1), (0.3, 0), (0.9, 1)])
    assert math.isnan(METRICS[name](answers))
    assert interval(METRICS[name], answers, seed=0) is None
    assert all(math.isnan(v) for figures in per_class(answers).values() for k, v in figures.items() if k != "support")


def test_rows_that_do_not_sum_to_one_have_no_figure():
    assert math.isnan(accuracy(Scores(np.array([[0.5, 0.6, 0.5]]), np.array([1]))))


@pytest.mark.parametrize(
    ("probability", "label"),
    [
        (np.zeros((2, 1)), np.array([0, 0])),
        (np.zeros((2, 2, 2)), np.array([0, 0])),
        (np.array([0.1, 0.2]), np.array([0])),
        (np.array([0.1, 0.2]), np.array([[0], [1]])),
        (np.array([0.1, 0.2]), np.array([0, 2])),
        (np.array([0.1, 0.2]), np.array([0, -1])),
        (np.array([0.1, 0.2]), np.array([0.0, 1.0])),
    ],
)
def test_scores_of_the_wrong_shape_or_label_are_refused(probability: np.ndarray, label: np.ndarray):
    with pytest.raises(ValueError, match="label"):
        Scores(probability, label)


def test_a_metric_of_another_kind_of_predictions_is_refused():
    pixels = MaskScores(*(np.ones((1, 2), dtype=np.int64) for _ in range(3)))
    boxes = BoxScores.of([(np.zeros((0, 4)), np.zeros(0))], [np.zeros((0, 4))])
    some = {Scores: scored([(0.1, 0)]), MaskScores: pixels, BoxScores: boxes}
    for name, metric in METRICS.items():
        for kind, scores in some.items():
            if kind is not metric.kind:
                with pytest.raises(TypeError, match=name):
                    metric(scores)


def test_every_metric_says_how_it_is_read():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.label
        assert metric.meaning[0].islower()
        assert not metric.meaning.endswith(".")
    lower = {name for name, metric in METRICS.items() if metric.better == "lower"}
    assert lower == {"log_loss", "brier", "calibration_error", "perplexity"}
    random = np.random.default_rng(0)
    coins = Scores(random.random(20_000), random.integers(0, 2, 20_000))
    for metric in METRICS.values():
        assert metric.guess is None or metric(coins) == pytest.approx(metric.guess, abs=0.02)


def test_both_sets_together_are_all_patients():
    one, two = scored([(0.1, 0)]), scored([(0.9, 1), (0.2, 0)])
    assert len(one + two) == 3
    assert auroc(one + two) == 1.0
    with pytest.raises(ValueError, match="dimension"):
        one + drawn(3, 4)


@pytest.mark.parametrize("metric", [auroc, accuracy, log_loss], ids=lambda metric: metric.name)
def test_an_interval_mostly_contains_the_truth_and_narrows_with_more_patients(metric):
    random = np.random.default_rng(0)

    def draw(count: int) -> Scores:
        label = random.integers(0, 2, count)
        return Scores(1 / (1 + np.exp(-random.normal(1.5 * (2 * label - 1), 1.5))), label)

    truth = metric(draw(100_000))
    ends = [interval(metric, draw(150), seed=n, draws=200) for n in range(60)]
    assert sum(low <= truth <= high for low, high in ends) >= 50
    assert np.mean([high - low for low, high in ends]) > 2 * np.diff(interval(metric, draw(2000), seed=0, draws=200))[0]


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", OF_CLASSES)
def test_an_interval_is_that_of_the_records_drawn_one_by_one(name: str, classes: int):
    scores = drawn(60, classes, ties=True)
    picks = np.random.default_rng(5).integers(60, size=(120, 60))
    values = [METRICS[name](scores.take(pick)) for pick in picks]
    wanted = np.percentile([value for value in values if math.isfinite(value)], [2.5, 97.5])
    assert interval(METRICS[name], scores, seed=5, draws=120) == pytest.approx(tuple(wanted), rel=1e-9)


def test_an_interval_repeats_with_its_seed():
    some = scored([(p / 20, p % 3 == 0) for p in range(20)])
    assert interval(auroc, some, seed=1) == interval(auroc, some, seed=1)
    assert interval(auroc, some, seed=1) != interval(auroc, some, seed=2)


def test_an_interval_that_is_mostly_undefined_is_none():
    rare = scored([(0.5 + p / 100, p == 0) for p in range(40)])  # in a draw, a patient is missing with a chance of 0.36
    assert interval(auroc, rare, seed=0) is not None
    assert interval(auroc, scored([(0.1, 0)]) + rare.take(np.arange(1, 3)), seed=0) is None


def test_intervals_of_a_large_study_take_no_minutes():
    scores = drawn(5000, 2)
    began = time.process_time()
    for name in OF_CLASSES:
        assert interval(METRICS[name], scores, seed=0) is not None
    assert time.process_time() - began < 10


def test_an_interval_is_over_patients_with_all_their_records():
    rng = np.random.default_rng(3)
    one = Scores(rng.random(80), rng.integers(0, 2, 80))
    thrice = one.take(np.repeat(np.arange(80), 3))
    whose = np.repeat(np.arange(80), 3)
    for metric in (auroc, accuracy):
        assert interval(metric, thrice, seed=1, patient=whose) == pytest.approx(interval(metric, one, seed=1))
        low, high = interval(metric, thrice, seed=1)
        assert high - low < 0.8 * np.diff(interval(metric, one, seed=1))[0]  # as if they were different people
