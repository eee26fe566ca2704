"""Sums of parts are sums of the whole, figures of sums are close to exact ones, and small groups stay unsaid."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.metrics import METRICS, BoxScores, MaskScores, Scores, Tally, log_loss

KINDS = [("classes", 2), ("classes", 3), ("classes", 10), ("classes", 80), ("masks", 3), ("boxes", 2)]


def drawn(kind: str, classes: int, count: int, seed: int = 0) -> Scores | MaskScores | BoxScores:
    random = np.random.default_rng(seed)
    if kind == "classes":
        label = random.integers(0, classes, count)
        odds = np.exp(random.normal(size=(count, classes)) + np.eye(classes)[label])
        return Scores(odds / odds.sum(axis=1, keepdims=True), label)
    if kind == "masks":
        true = random.integers(0, classes, (count, 4, 4))
        return MaskScores.of(np.where(random.random(true.shape) < 0.7, true, 0), true, classes)
    hit, record = random.random(4 * count) < 0.4, np.repeat(np.arange(count), 4)
    missed = random.integers(0, 2, count)
    score = 1 / (1 + np.exp(-random.normal(hit, 1)))
    return BoxScores(score, hit, record, np.bincount(record[hit], minlength=count) + missed)


def close(one: dict[str, float], other: dict[str, float], tolerance: float) -> None:
    assert one == pytest.approx({name: other[name] for name in one}, abs=tolerance, nan_ok=True)


@pytest.mark.parametrize(("kind", "classes"), KINDS)
@given(count=st.integers(0, 40), cut=st.integers(0, 40), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_the_tally_of_parts_added_is_that_of_the_whole(kind: str, classes: int, count: int, cut: int, seed: int):
    scores = drawn(kind, classes, count, seed)
    first, rest = (scores.take(part) for part in np.split(np.arange(count), [min(cut, count)]))
    whole, added = Tally.of(scores), Tally.of(first) + Tally.of(rest)
    assert np.allclose(added.to_vector(), whole.to_vector(), rtol=1e-12, atol=1e-12)
    close(added.figures(), whole.figures(), 1e-12)


@pytest.mark.parametrize(("kind", "classes"), KINDS)
def test_figures_of_sums_are_close_to_exact_ones(kind: str, classes: int):
    scores = drawn(kind, classes, 2000)
    figures = Tally.of(scores).figures()
    close(figures, {name: METRICS[name](scores) for name in figures}, 0.002)
    ranking = {"auroc", "auprc"} if classes <= 64 else set()
    of_kind = {name for name, metric in METRICS.items() if isinstance(scores, metric.kind)}
    assert set(figures) == of_kind - {"auroc", "auprc"} | (ranking & of_kind)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("centre", [-8.0, -4.0, 0.0, 4.0, 12.0])
@pytest.mark.parametrize("share", [0.5, 0.05])
def test_rankings_survive_the_bins_wherever_scores_crowd(single: bool, spread: float, centre: float, share: float):
    random = np.random.default_rng(0)
    label = (random.random(5000) < share).astype(np.int64)
    logit = centre + spread * (random.normal(size=5000) + 1.2 * label)
    logit = logit.astype(np.float32) if single else logit  # in float32, much of what is near 1 is 1
    scores = Scores((1 / (1 + np.exp(-logit))).astype(np.float64), label)
    found = Tally.of(scores).figures()
    for name in ("auroc", "auprc"):
        assert found[name] == pytest.approx(METRICS[name](scores), abs=0.002)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 1)), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_ties_stay_ties(patients: list[tuple[int, int]]):
    scores = Scores(np.array([p / 20 for p, _ in patients]), np.array([y for _, y in patients]))
    figures = Tally.of(scores).figures()
    close(figures, {name: METRICS[name](scores) for name in figures}, 1e-9 * (1 + math.exp(log_loss(scores))))


@pytest.mark.parametrize(("kind", "classes"), KINDS)
def test_a_vector_has_its_public_length_and_comes_back(kind: str, classes: int):
    tally = Tally.of(drawn(kind, classes, 50))
    vector = tally.to_vector()
    assert vector.dtype == np.float64
    assert vector.shape == (Tally.length(kind, classes),) == Tally.of(drawn(kind, classes, 0)).to_vector().shape
    assert len(vector) * 8 < 1.1 * 2**20
    back = Tally.from_vector(vector, kind, classes)
    assert np.array_equal(back.to_vector(), vector)
    close(back.figures(), tally.figures(), 0)


@pytest.mark.parametrize(("kind", "classes"), KINDS)
def test_a_vector_that_is_none_is_refused(kind: str, classes: int):
    right = Tally.of(drawn(kind, classes, 5)).to_vector()
    broken = right.copy()
    broken[3] = math.nan
    for wrong in (right[:-1], np.append(right, 0.0), right[None], broken):
        with pytest.raises(ValueError, match=f"a vector of {len(right)} finite numbers"):
            Tally.from_vector(wrong, kind, classes)


@pytest.mark.parametrize(("kind", "classes"), KINDS)
def test_sums_that_no_records_have_make_no_figure_fail(kind: str, classes: int):
    random = np.random.default_rng(0)
    for scale in (1.0, 1e300):
        vector = scale * random.normal(size=Tally.length(kind, classes))
        vector[0] = 0.0
        assert all(isinstance(value, float) for value in Tally.from_vector(vector, kind, classes).suppressed(5).values())


def test_tallies_of_different_things_do_not_add():
    two, three = Tally.of(drawn("classes", 2, 5)), Tally.of(drawn("classes", 3, 5))
    for other in (three, Tally.of(drawn("boxes", 2, 5))):
        with pytest.raises(ValueError, match="do not add"):
            two + other


def test_there_is_no_tally_of_something_else():
    with pytest.raises(TypeError, match="list"):
        Tally.of([1.0])


@pytest.mark.parametrize(("kind", "classes"), KINDS)
def test_nobody_has_no_figures(kind: str, classes: int):
    assert all(math.isnan(value) for value in Tally.of(drawn(kind, classes, 0)).figures().values())


def test_one_score_that_is_no_number_leaves_no_figure_of_all_sites():
    nothing = Tally.of(Scores(np.array([0.2, math.nan]), np.array([0, 1])))
    assert np.isfinite(nothing.to_vector()).all()
    together = Tally.of(drawn("classes", 2, 100)) + nothing
    assert together.figures()
    assert all(math.isnan(value) for value in together.figures().values())
    boxes = Tally.of(BoxScores(np.array([math.nan]), np.array([True]), np.array([0]), np.array([1])))
    assert math.isnan((boxes + Tally.of(drawn("boxes", 2, 9))).figures()["ap50"])


def undefined(figures: dict[str, float]) -> set[str]:
    return {name for name, value in figures.items() if math.isnan(value)}


EVERYONE = {"accuracy", "log_loss", "brier", "perplexity", "calibration_error"}


@pytest.mark.parametrize("few", [0, 1])
def test_figures_of_few_positives_or_few_negatives_stay_unsaid(few: int):
    label = np.where(np.arange(40) < 4, few, 1 - few)
    tally = Tally.of(Scores(np.linspace(0.05, 0.95, 40), label))
    assert not undefined(tally.suppressed(4))
    assert undefined(tally.suppressed(5)) == set(tally.figures()) - EVERYONE
    assert undefined(tally.suppressed(41)) == set(tally.figures())


def test_figures_of_a_rare_class_stay_unsaid():
    scores = drawn("classes", 3, 90)
    rare = scores.take(np.flatnonzero(scores.label != 2)) + scores.take(np.flatnonzero(scores.label == 2)[:3])
    tally = Tally.of(rare)
    assert "auroc" in undefined(tally.suppressed(4))
    assert undefined(tally.suppressed(4)) == set(tally.figures()) - EVERYONE


def test_the_outcome_of_the_few_who_are_called_positive_stays_unsaid():
    tally = Tally.of(Scores(np.where(np.arange(60) < 2, 0.9, 0.1), np.arange(60) % 2))
    assert undefined(tally.suppressed(5)) == {"precision", "f1"}


def test_figures_of_few_masks_or_boxes_stay_unsaid():
    masks, boxes = Tally.of(drawn("masks", 3, 6)), drawn("boxes", 2, 6)
    assert not undefined(masks.suppressed(6))
    assert undefined(masks.suppressed(7)) == {"dice", "iou"}
    with_boxes = int((boxes.true > 0).sum())
    assert not undefined(Tally.of(boxes).suppressed(with_boxes))
    assert undefined(Tally.of(boxes).suppressed(with_boxes + 1)) == {"ap50"}
