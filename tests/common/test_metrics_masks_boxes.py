"""Overlaps of masks and hits of boxes are what other implementations say they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.functional.segmentation import dice_score

from wardround.common.metrics import METRICS, BoxScores, MaskScores, interval

DICE, IOU, AP50 = (METRICS[name] for name in ("dice", "iou", "ap50"))


def drawn_masks(records: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    true = random.integers(0, classes, (records, 8, 9))
    return np.where(random.random(true.shape) < 0.7, true, random.integers(0, classes, true.shape)), true


def drawn_boxes(records: int, seed: int = 0) -> tuple[list, list]:
    """Boxes near the true ones, some of them away, some doubled; no two of one score."""
    random = np.random.default_rng(seed)
    true = [np.concatenate([random.uniform(0.2, 0.8, (n, 2)), random.uniform(0.05, 0.3, (n, 2))], 1) for n in range(records)]
    true = [boxes[: random.integers(0, 5)] for boxes in true]
    predicted = []
    for boxes in true:
        seen = np.concatenate([boxes, boxes, random.uniform(0.1, 0.4, (2, 4))])
        seen = seen + random.normal(0, 0.02, seen.shape) * [1, 1, 0, 0]
        predicted.append((seen, random.random(len(seen))))
    return predicted, true


def drawn(records: int, seed: int = 0) -> BoxScores:
    return BoxScores.of(*drawn_boxes(records, seed))


@pytest.mark.parametrize("classes", [2, 4])
def test_dice_is_that_of_torchmetrics(classes: int):
    predicted, true = drawn_masks(12, classes)
    each = dice_score(
        torch.from_numpy(predicted),
        torch.from_numpy(true),
        num_classes=classes,
        include_background=False,
        average="macro",
        input_format="index",
    )
    assert DICE(MaskScores.of(predicted, true, classes)) == pytest.approx(float(each.mean()), abs=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_iou_is_the_shared_area_over_that_of_either(classes: int):
    predicted, true = drawn_masks(12, classes)
    each = [
        [((p == c) & (t == c)).sum() / ((p == c) | (t == c)).sum() for c in range(1, classes)]
        for p, t in zip(predicted, true, strict=True)
    ]
    assert IOU(MaskScores.of(predicted, true, classes)) == pytest.approx(np.mean(each))


@pytest.mark.parametrize("metric", [DICE, IOU], ids=lambda metric: metric.name)
def test_what_is_neither_there_nor_called_is_left_out(metric):
    blank, half = np.zeros((1, 2, 2), dtype=np.int64), np.array([[[0, 0], [1, 1]]])
    nothing, right, wrong = (MaskScores.of(p, t, 3) for p, t in ((blank, blank), (half, half), (half, blank)))
    assert math.isnan(metric(nothing))
    assert metric(right) == 1.0
    assert metric(wrong) == 0.0
    assert metric(right + nothing + wrong) == 0.5


def test_volumes_count_as_images_do():
    predicted, true = drawn_masks(4, 3)
    flat, deep = MaskScores.of(predicted, true, 3), MaskScores.of(predicted.reshape(4, 2, 4, 9), true.reshape(4, 2, 4, 9), 3)
    assert np.array_equal(flat.both, deep.both)
    assert DICE(flat) == DICE(deep)


@pytest.mark.parametrize(
    ("predicted", "true"),
    [
        (np.zeros((2, 3, 3), dtype=int), np.zeros((2, 3, 4), dtype=int)),
        (np.full((1, 2, 2), 2), np.zeros((1, 2, 2), dtype=int)),
        (np.zeros((1, 2, 2), dtype=int), np.full((1, 2, 2), -1)),
        (np.zeros((1, 2, 2)), np.zeros((1, 2, 2), dtype=int)),
        (np.zeros(3, dtype=int), np.zeros(3, dtype=int)),
    ],
)
def test_masks_that_do_not_fit_are_refused(predicted: np.ndarray, true: np.ndarray):
    with pytest.raises(ValueError, match=r"mask|class map"):
        MaskScores.of(predicted, true, 2)


def test_pixels_that_do_not_add_up_are_refused():
    one, two = np.full((1, 2), 1), np.full((1, 2), 2)
    with pytest.raises(ValueError, match="more pixels"):
        MaskScores(two, one, two)
    with pytest.raises(ValueError, match="records, classes"):
        MaskScores(one, one, np.full((2, 2), 1))


@pytest.mark.parametrize("seed", range(3))
def test_ap50_is_that_of_torchmetrics_at_as_many_points(seed: int):
    predicted, true = drawn_boxes(30, seed)
    points = np.linspace(0, 1, 5001).tolist()  # between the 101 points it usually takes, the curve is not looked at
    oracle = MeanAveragePrecision("cxcywh", iou_thresholds=[0.5], rec_thresholds=points, max_detection_thresholds=[1, 10, 100])
    oracle.warn_on_many_detections = False
    oracle.update(
        [{"boxes": f32(b), "scores": f32(s), "labels": torch.zeros(len(s), dtype=torch.int64)} for b, s in predicted],
        [{"boxes": f32(b), "labels": torch.zeros(len(b), dtype=torch.int64)} for b in true],
    )
    assert AP50(BoxScores.of(predicted, true)) == pytest.approx(float(oracle.compute()["map_50"]), abs=1e-3)


def f32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).float()


def test_ap50_by_hand():
    true = np.array([[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]])
    seen = np.array([[0.5, 0.5, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1], [0.2, 0.2, 0.2, 0.2]])
    scores = BoxScores.of([(seen, np.array([0.9, 0.8, 0.7]))], [true])
    assert scores.hit.tolist() == [True, False, True]
    assert AP50(scores) == pytest.approx((1 + 2 / 3) / 2)


def test_a_true_box_is_hit_once_and_by_the_surest():
    true = np.array([[0.5, 0.5, 0.2, 0.2]])
    scores = BoxScores.of([(np.repeat(true, 2, axis=0), np.array([0.3, 0.6]))], [true])
    assert scores.hit.tolist() == [False, True]


def test_half_an_overlap_is_enough_and_less_is_not():
    true = np.array([[0.5, 0.5, 0.5, 0.5]])
    seen = np.array([[0.5, 0.5, 0.5, 0.25], [0.5, 0.5, 0.5, 0.249]])
    assert [BoxScores.of([(box[None], np.ones(1))], [true]).hit[0] for box in seen] == [True, False]


def test_without_true_boxes_there_is_no_ap50_and_without_boxes_it_is_zero():
    none, one = (np.zeros((0, 4)), np.zeros(0)), np.array([[0.5, 0.5, 0.1, 0.1]])
    assert math.isnan(AP50(BoxScores.of([(one, np.ones(1))], [np.zeros((0, 4))])))
    assert AP50(BoxScores.of([none], [one])) == 0.0
    assert math.isnan(AP50(BoxScores.of([], [])))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.5, 1.5])
def test_a_model_that_answers_no_score_has_no_ap50(wrong: float):
    box = np.array([[0.5, 0.5, 0.1, 0.1]])
    assert math.isnan(AP50(BoxScores.of([(box, np.array([wrong]))], [box])))


def test_a_model_that_answers_no_box_has_no_ap50():
    box = np.array([[0.5, 0.5, 0.1, 0.1]])
    assert math.isnan(AP50(BoxScores.of([(box * np.nan, np.ones(1))], [box])))


def test_boxes_that_do_not_fit_are_refused():
    box, one = np.array([[0.5, 0.5, 0.1, 0.1]]), np.ones(1)
    for predicted, true in (
        ([(box, one)], []),
        ([(box, np.ones(2))], [box]),
        ([(box[:, :3], one)], [box]),
        ([(box, one)], [box[0]]),
        ([(box, one)], [box * np.nan]),
    ):
        with pytest.raises(ValueError, match=r"box|records"):
            BoxScores.of(predicted, true)


def test_hits_without_true_boxes_are_refused():
    with pytest.raises(ValueError, match="more hits"):
        BoxScores(np.ones(1), np.array([True]), np.array([0]), np.array([0]))
    with pytest.raises(ValueError, match="none of"):
        BoxScores(np.ones(1), np.array([True]), np.array([1]), np.array([1]))
    with pytest.raises(ValueError, match="for each box"):
        BoxScores(np.ones(2), np.array([True]), np.array([0]), np.array([1]))


@given(st.lists(st.integers(0, 7), max_size=12), st.integers(0, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_records_taken_are_those_added_one_by_one(index: list[int], seed: int):
    predicted, true = drawn_boxes(8, seed)
    shuffled = np.random.default_rng(seed).permutation(len(whole := BoxScores.of(predicted, true)))
    taken = whole.take(shuffled).take(np.array(index, dtype=np.int64))
    wanted = BoxScores.of([predicted[shuffled[i]] for i in index], [true[shuffled[i]] for i in index])
    for name in ("score", "hit", "record", "true"):
        assert np.array_equal(getattr(taken, name), getattr(wanted, name))


def test_boxes_may_stand_in_any_order():
    whole = drawn(8)
    order = np.random.default_rng(0).permutation(len(whole.score))
    mixed = BoxScores(whole.score[order], whole.hit[order], whole.record[order], whole.true)
    for index in np.arange(8), np.array([5, 5, 0, 2]):
        assert AP50(mixed.take(index)) == pytest.approx(AP50(whole.take(index)))


@pytest.mark.parametrize("metric", [DICE, IOU, AP50], ids=lambda metric: metric.name)
def test_an_interval_is_that_of_the_records_drawn_one_by_one(metric):
    scores = drawn(25) if metric is AP50 else MaskScores.of(*drawn_masks(25, 3), 3)
    picks = np.random.default_rng(2).integers(25, size=(80, 25))
    wanted = np.percentile([metric(scores.take(pick)) for pick in picks], [2.5, 97.5])
    assert interval(metric, scores, seed=2, draws=80) == pytest.approx(tuple(wanted), rel=1e-9)


def test_both_sites_together_are_all_records():
    predicted, true = drawn_boxes(9)
    parts = BoxScores.of(predicted[:4], true[:4]) + BoxScores.of(predicted[4:], true[4:])
    assert len(parts) == 9
    assert AP50(parts) == AP50(BoxScores.of(predicted, true))
    predicted, true = drawn_masks(9, 3)
    parts = MaskScores.of(predicted[:4], true[:4], 3) + MaskScores.of(predicted[4:], true[4:], 3)
    assert len(parts) == 9
    assert DICE(parts) == DICE(MaskScores.of(predicted, true, 3))
