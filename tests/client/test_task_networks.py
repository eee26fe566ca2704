"""Each registered network goes through the private engine in one pass, and is admitted: its records do not see each other."""

from __future__ import annotations

import pytest
import torch

from task_nets import CASES, LARGE, Case
from wardround.client.dp import preflight
from wardround.client.dp.alone import mean_gradients
from wardround.client.dp.engine import engine_of, headroom
from wardround.client.dp.sizes import Sizes
from wardround.common.models import MODELS
from wardround.common.weights import trainable

EACH = [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in LARGE)]


@pytest.fixture(autouse=True)
def of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which sizes of a piece give the same bits is another question, and takes long for a large network."""
    monkeypatch.setattr(Sizes, "of", lambda *_: Sizes((4,), lambda _: True))


def test_no_registered_network_is_left_out():
    assert {case.network for case in (*CASES, *LARGE)} == set(MODELS)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_network_of_the_tasks_is_admitted_and_goes_in_one_pass(case: Case):
    model, records = case.build(), case.records(2)
    preflight(model, case.loss, records)
    assert engine_of(model, case.loss, records).in_one_pass


@pytest.mark.parametrize("case", EACH, ids=str)
def test_its_clipped_sum_is_that_of_plain_autograd_record_by_record(case: Case):
    model, records = case.build().double().eval(), case.records(3, dtype=torch.float64)
    weights = trainable(model)
    means = list(mean_gradients(model, case.loss, weights, records))
    lengths = [sum(float(g.square().sum()) for g in mean.values()) ** 0.5 for mean in means]
    clip = (min(lengths) + max(lengths)) / 2
    parts = [min(1.0, clip * (1 - headroom(torch.float64)) / length) for length in lengths]
    found = engine_of(model, case.loss, records).clipped_sum(weights, records, clip_norm=clip, records_per_patient=1)
    for name in weights:
        expected = sum(part * mean[name] for part, mean in zip(parts, means, strict=True))
        assert float((found[name] - expected).norm()) <= 1e-9 * max(lengths), name


@pytest.mark.parametrize("case", [c for c in CASES if c.network in {"text-rnn", "transformer", "fusion", "unet"}], ids=str)
def test_with_dropout_it_still_goes_in_one_pass(case: Case):
    model, records = case.build(dropout=0.5), case.records(2)
    preflight(model, case.loss, records)
    assert engine_of(model, case.loss, records).in_one_pass
