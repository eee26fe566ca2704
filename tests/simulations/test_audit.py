"""The site's private path holds what it claims against canaries, and an engine that is broken on purpose is caught."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.client.dp import SeededCoins
from wardround.client.training import supervised
from wardround.common.plan import PrivacyPlan
from wardround.common.tasks import Records
from wardround.common.weights import trainable
from wardround.simulations import audit as auditing
from wardround.simulations.audit import AuditResult, Canaries, audit, epsilon_at_least, p_value

fast = settings(derandomize=True, deadline=None, max_examples=25)
ROUNDS = 40
LONG, MANY_RECORDS = Canaries(length=10), Canaries(records=8)


def audited(claimed: float, canaries: Canaries = Canaries()) -> AuditResult:
    return audit(
        PrivacyPlan(epsilon=claimed, delta=1e-5, sampling_rate=0.25, records_per_patient=8),
        rounds=ROUNDS,
        canaries=canaries,
        membership=np.random.default_rng(20230515),
        coins_for=lambda round: SeededCoins(1000 + round),
    )


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [1.0, 3.0, 8.0])
def test_the_engine_is_consistent_with_its_claim(claimed: float):
    found = audited(claimed)
    assert (found.verdict, found.claimed) == ("consistent", claimed)
    assert found.at_least <= claimed


@pytest.mark.parametrize("canaries", [LONG, MANY_RECORDS], ids=["ten clip norms long", "eight records each"])
def test_clipping_holds_patients_who_weigh_more_to_the_same_claim(canaries: Canaries):
    assert audited(3.0, canaries).verdict == "consistent"


def test_the_coins_of_the_operating_system_hold_the_claim_too():
    assert audit(PrivacyPlan(epsilon=3.0, sampling_rate=0.25), rounds=ROUNDS).verdict == "consistent"


def noise_times(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(*given: Any, noise_multiplier: float, **named: Any) -> Any:
        return supervised.private_update(*given, noise_multiplier=factor * noise_multiplier, **named)

    monkeypatch.setattr(auditing, "private_update", update)


def no_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    true = supervised.clipped_sum
    monkeypatch.setattr(supervised, "clipped_sum", lambda *given, **named: true(*given, **{**named, "clip_norm": 1e6}))


def clipping_per_record(monkeypatch: pytest.MonkeyPatch) -> None:
    true = supervised.clipped_sum

    def each_record_a_patient(model: Any, loss: Any, weights: Any, batch: Records, **named: Any) -> Any:
        alone = Records(batch.fields, batch.label, torch.arange(len(batch)))
        return true(model, loss, weights, alone, **named)

    monkeypatch.setattr(supervised, "clipped_sum", each_record_a_patient)


def everyone_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    true = supervised.draw
    monkeypatch.setattr(supervised, "draw", lambda *given, **named: true(*given, **{**named, "rate": 1.0}))


@pytest.mark.parametrize(
    ("breaking", "canaries"),
    [
        (lambda patch: noise_times(0.1, patch), Canaries()),
        (no_clipping, LONG),
        (clipping_per_record, MANY_RECORDS),
        (everyone_drawn, Canaries()),
    ],
    ids=["a tenth of the noise", "no clipping", "clipping per record, sold as per patient", "everyone drawn in every round"],
)
def test_a_broken_engine_violates_its_claim(
    breaking: Callable[[pytest.MonkeyPatch], None], canaries: Canaries, monkeypatch: pytest.MonkeyPatch
):
    breaking(monkeypatch)
    found = audited(3.0, canaries)
    assert found.verdict == "violated"
    assert found.at_least > 3.0


def test_without_noise_the_bound_is_as_large_as_so_many_canaries_can_show(monkeypatch: pytest.MonkeyPatch):
    noise_times(0.0, monkeypatch)
    everything_right = np.arange(1000) % 2 == 0
    most = epsilon_at_least(everything_right, everything_right.astype(np.float64), delta=1e-5)
    assert most > 4.5
    assert audited(3.0).at_least == pytest.approx(most)


def test_the_gradient_of_a_record_is_the_record_itself():
    task = auditing._task(20)
    model = task.model({}, seed=0)
    values = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    records = Records({"values": values}, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    (total,) = supervised.clipped_sum(
        model, task.loss, trainable(model), records, clip_norm=1e3, records_per_patient=1
    ).values()
    torch.testing.assert_close(total[0].double(), values.double().sum(0), rtol=1e-6, atol=1e-6)


# --- the bound -------------------------------------------------------------------------------------------------------

counts = st.integers(1, 9).flatmap(lambda guesses: st.tuples(st.just(guesses), st.integers(0, guesses)))
epsilons, deltas = st.floats(0, 6), st.sampled_from([0.0, 1e-5, 1e-3, 0.05])


@fast
@given(counts=counts, extra=st.integers(0, 20), epsilon=epsilons, delta=deltas)
def test_the_p_value_is_the_theorems_sum_over_all_ways_to_guess(
    counts: tuple[int, int], extra: int, epsilon: float, delta: float
):
    guesses, correct = counts
    right = 1 / (1 + math.exp(-epsilon))
    chance = [0.0] * (guesses + 1)
    for outcome in itertools.product([True, False], repeat=guesses):
        chance[sum(outcome)] += math.prod(right if hit else 1 - right for hit in outcome)
    slack = max((sum(chance[correct - i : correct]) / i for i in range(1, correct + 1)), default=0.0)
    expected = min(1.0, sum(chance[correct:]) + 2 * (guesses + extra) * delta * slack)
    assert p_value(guesses + extra, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@fast
@given(counts=counts, epsilon=epsilons, delta=deltas)
def test_no_private_algorithm_beats_the_p_value(counts: tuple[int, int], epsilon: float, delta: float):
    """Randomised response that also gives away, with chance delta, one secret each or all at once: both are private."""
    guesses, correct = counts
    right = 1 / (1 + math.exp(-epsilon))

    def tail(chance: float) -> float:
        return sum(math.comb(guesses, n) * chance**n * (1 - chance) ** (guesses - n) for n in range(correct, guesses + 1))

    one_each, all_at_once = tail(delta + (1 - delta) * right), delta + (1 - delta) * tail(right)
    assert max(one_each, all_at_once) <= p_value(guesses, guesses, correct, epsilon, delta) + 1e-12


@fast
@given(guesses=st.integers(1, 900), epsilon=epsilons, delta=st.sampled_from([0.0, 1e-5, 1e-4]))
def test_more_right_guesses_are_never_less_surprising(guesses: int, epsilon: float, delta: float):
    values = [p_value(1000, guesses, correct, epsilon, delta) for correct in range(0, guesses + 1, 1 + guesses // 40)]
    assert all(0 <= after <= before + 1e-12 for before, after in itertools.pairwise(values))
    assert p_value(1000, guesses, guesses, epsilon, delta) <= p_value(1000, guesses, guesses, epsilon, 2 * delta)


@pytest.mark.parametrize("truth", [0.0, 1.0, 3.0])
def test_the_bound_is_beyond_the_truth_no_more_often_than_promised(truth: float):
    """Randomised response loses exactly `truth`, and its answers are the best scores there are."""
    found = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        member = random.random(1000) < 0.5
        honest = random.random(1000) < 1 / (1 + math.exp(-truth))
        score = (member == honest) + 0.5 * random.random(1000)
        found.append(epsilon_at_least(member, score, delta=0.0))
    assert np.mean(np.array(found) > truth) <= 0.05
    assert np.median(found) >= 0.75 * truth


@pytest.mark.parametrize("arguments", [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_counts_that_cannot_be_are_refused(arguments: tuple[int, int, int]):
    with pytest.raises(ValueError, match="cannot be"):
        p_value(*arguments, 1.0, 1e-5)


@pytest.mark.parametrize(("epsilon", "delta"), [(-0.1, 1e-5), (1.0, -1e-9)])
def test_a_claim_below_zero_is_refused(epsilon: float, delta: float):
    with pytest.raises(ValueError, match="at least 0"):
        p_value(10, 5, 5, epsilon, delta)


@pytest.mark.parametrize(
    ("member", "score", "why"),
    [
        (np.ones(100, dtype=np.bool_), np.zeros(99), "one score"),
        (np.ones(100, dtype=np.bool_), np.full(100, np.nan), "a number"),
        (np.ones(1, dtype=np.bool_), np.zeros(1), "too few"),
    ],
)
def test_scores_nobody_can_guess_from_are_refused(member: Any, score: Any, why: str):
    with pytest.raises(ValueError, match=why):
        epsilon_at_least(member, score, delta=1e-5)
