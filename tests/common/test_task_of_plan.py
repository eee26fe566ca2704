"""What a plan says about the loss: public constants, the same answer for nobody but rare classes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from wardround.common.errors import ConfigError, OrderRefused
from wardround.common.plan import LossPlan, StudyPlan
from wardround.common.tasks import TASKS, TableSchema, Task, task_of
from wardround.common.tasks.of_plan import packed, shares_of, unpacked, weights_of, with_options

LOGITS = torch.tensor([[2.0, -1.0], [0.3, 0.1], [-4.0, 4.0]])
LABEL = torch.tensor([0, 1, 1])
PLAIN = F.cross_entropy(LOGITS, LABEL, reduction="none")


def a_plan(**more: object) -> StudyPlan:
    return StudyPlan.build(
        {"name": "s", "task": "heart-disease", "rounds": 1, "min_sites": 1, "sites": {"a": 10}, **more}, source="test"
    )


def loss_of(**loss: object) -> torch.Tensor:
    return task_of(a_plan(loss=loss)).loss(LOGITS, LABEL)


def test_without_options_the_task_is_the_registered_one():
    assert task_of(a_plan()) is TASKS["heart-disease"]


def test_class_weights_multiply_the_loss_of_their_class():
    torch.testing.assert_close(loss_of(class_weights=[1.0, 5.0]), PLAIN * torch.tensor([1.0, 5.0, 5.0]))


def test_focal_loss_is_the_formula_of_its_paper_and_has_gradients_everywhere():
    right = torch.exp(-PLAIN)
    torch.testing.assert_close(loss_of(focal=2.0), (1 - right) ** 2 * PLAIN)
    for gamma in (0.5, 1.0, 2.0):
        logits = torch.tensor([[90.0, -90.0], [0.0, 0.0]], requires_grad=True)  # the first is beyond doubt
        task_of(a_plan(loss={"focal": gamma})).loss(logits, torch.tensor([0, 1])).sum().backward()
        assert logits.grad is not None
        assert bool(logits.grad.isfinite().all())


def test_logit_adjustment_adds_the_logarithms_of_the_shares():
    shares = torch.tensor([0.9, 0.1])
    torch.testing.assert_close(
        loss_of(class_shares=[0.9, 0.1]), F.cross_entropy(LOGITS + shares.log(), LABEL, reduction="none")
    )


def test_the_same_options_give_the_same_function():
    assert task_of(a_plan(loss={"focal": 1.0})).loss is task_of(a_plan(loss={"focal": 1.0}, rounds=2)).loss
    assert task_of(a_plan(loss={"focal": 1.0})).loss is not task_of(a_plan(loss={"focal": 2.0})).loss


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"loss": {"class_weights": [1.0, 2.0, 3.0]}}, "loss.class_weights: 3 numbers for the 2 classes"),
        ({"loss": {"class_shares": [1.0]}}, "loss.class_shares: 1 numbers for the 2 classes"),
        ({"task": "image-synthesis", "loss": {"class_weights": "counted"}}, "loss: task image-synthesis has a loss of its own"),
        ({"local": {"views": 2}}, "local.views: task heart-disease knows no change"),
        ({"task": "heart"}, "no task is called 'heart'"),
    ],
)
def test_an_option_the_task_has_no_use_for_is_refused(more: dict[str, object], complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        task_of(a_plan(**more))


def test_a_task_without_classes_has_none_to_count():
    schema = dataclasses.make_dataclass("NoClasses", [("classes", int, 0)])()
    regression = Task("regression", "R", schema, lambda options: nn.Linear(1, 1))
    for key in ("class_weights", "class_shares"):
        with pytest.raises(ConfigError, match=rf"loss\.{key}: task regression has no classes to count"):
            with_options(regression, a_plan(loss={key: "counted"}))


def test_counted_shares_stand_where_public_ones_would():
    counted = a_plan(loss={"class_weights": "counted", "class_shares": "counted"})
    public = a_plan(loss={"class_weights": [1 / 1.6, 1 / 0.4], "class_shares": [0.8, 0.2]})
    torch.testing.assert_close(
        task_of(counted, (0.8, 0.2)).loss(LOGITS, LABEL), task_of(public).loss(LOGITS, LABEL), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(task_of(a_plan(loss={"class_weights": "counted"})).loss(LOGITS, LABEL), PLAIN)


@given(st.lists(st.floats(-1e4, 1e6), min_size=2, max_size=8), st.floats(0, 500), st.floats(1, 1000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_whatever_was_counted_weights_are_bounded_and_rarer_classes_weigh_more(
    counts: list[float], deviation: float, most: float
):
    shares = shares_of(tuple(counts), deviation)
    assert math.fsum(shares) == pytest.approx(1)
    weights = weights_of(shares, most)
    assert all(0 < weight <= most for weight in weights)
    assert sum(w * s for w, s in zip(weights, shares, strict=True)) <= 1 + 1e-9  # 1 where none is capped
    for (s, w), (t, v) in itertools.combinations(zip(shares, weights, strict=True), 2):
        assert (s - t) * (w - v) <= 0
    task = TASKS["heart-disease"]
    if len(counts) == 2:
        assert unpacked(packed(shares), task, a_plan(loss={"class_weights": "counted"})) == shares


@pytest.mark.parametrize("data", [
    b"", bytes(16), b"\x00" * 15, packed((0.5, 0.5, 0.0)), packed((0.9, 0.9)), packed((1.5, -0.5)), packed((math.nan, 1.0)),
])  # fmt: skip
def test_shares_that_are_none_are_refused(data: bytes):
    task, plan = TASKS["heart-disease"], a_plan(loss={"class_weights": "counted"})
    with pytest.raises(OrderRefused, match="shares"):
        unpacked(data, task, plan)


def test_shares_that_nobody_asked_for_are_refused():
    assert unpacked(b"", TASKS["heart-disease"], a_plan()) is None
    with pytest.raises(OrderRefused, match="no classes counted"):
        unpacked(packed((0.5, 0.5)), TASKS["heart-disease"], a_plan())


def test_a_task_with_a_loss_of_its_own_takes_no_options():
    schema = TableSchema((), "y", 0, (0, 1))
    own = Task("own", "Own", schema, lambda options: nn.Linear(1, 2), loss=lambda outputs, label: outputs.sum(1))
    with pytest.raises(ConfigError, match="loss: task own has a loss of its own"):
        with_options(own, a_plan(loss={"focal": 1.0}))


@pytest.mark.parametrize(
    "loss",
    [
        {"class_weights": [0.0, 1.0]}, {"class_weights": [1e300, 1.0]}, {"focal": -1.0}, {"class_shares": [2.0, 0.5]},
        {"class_shares": [0.9, 0.9]}, {"class_shares": [0.0, 1.0]}, {"gamma": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_refuses_numbers_that_cannot_be(loss: dict[str, object]):
    with pytest.raises(ConfigError, match=r"loss\."):
        a_plan(loss=loss)


def test_weights_mend_a_skewed_split():
    """With 5 % of a class, what it is weighted by decides how much of it is found."""
    generator = torch.Generator().manual_seed(0)
    label = (torch.arange(800) % 20 == 0).long()
    x = torch.randn(800, 2, generator=generator) + 1.2 * label[:, None]

    def found(loss: LossPlan) -> float:
        task = with_options(TASKS["heart-disease"], a_plan(loss=loss.model_dump(exclude_defaults=True)))
        w, b = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
        for _ in range(200):
            g = torch.autograd.grad(task.loss(x @ w + b, label).mean(), (w, b))
            with torch.no_grad():
                w -= g[0]
                b -= g[1]
        return float(((x @ w + b).argmax(1)[label == 1] == 1).float().mean())

    rare = found(LossPlan())
    for better in (LossPlan(class_weights=(1.0, 19.0)), LossPlan(class_shares=(0.95, 0.05))):
        assert found(better) > rare + 0.3
    assert found(LossPlan(focal=2.0)) >= rare
