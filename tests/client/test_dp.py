"""The private gradient engine: what one patient can move, what noise hides it, and whose coins these are."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from wardround.client.dp import Coins, OsCoins, SeededCoins, clipped_sum, draw, refuse_coupled, secret_chance
from wardround.client.dp.engine import headroom
from wardround.client.policy import SiteConfig
from wardround.client.training import private_update
from wardround.common.errors import PlanRefused
from wardround.common.models.cnn import MaxPool
from wardround.common.plan import LocalPlan, PrivacyPlan, StudyPlan
from wardround.common.tasks import TASKS, Records, Task
from wardround.common.weights import Weights, norm, trainable

FEATURES = TASKS["heart-disease"].schema.width  # type: ignore[union-attr]
NEVER = 6.0  # standard deviations; where the keys are the operating system's, nothing repeats
few = settings(max_examples=25, deadline=None, derandomize=True)


def losses(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, reduction="none")


def a_table(sizes: list[int], *, seed: int = 0, scale: float = 1.0) -> Records:
    """Patients with so many records each, grouped by patient."""
    random = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    return Records(
        {"table": torch.randn(count, FEATURES, generator=random) * scale},
        torch.randint(0, 2, (count,), generator=random),
        torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64)),
    )


def a_network(seed: int = 1) -> tuple[nn.Module, Weights]:
    model = TASKS["heart-disease"].model({"hidden": [5]}, seed)
    return model, trainable(model)


def without(records: Records, patient: int) -> Records:
    return records.of_patients(torch.arange(records.patients) != patient)


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float((a[name].double() - b[name].double()).square().sum()) for name in a))


def privacy(**changes: object) -> PrivacyPlan:
    return PrivacyPlan.build({"epsilon": 3.0, **changes}, source="test")


def local(**changes: object) -> LocalPlan:
    return LocalPlan.build(changes, source="test")


class NoNoise:
    """Everybody takes part and nothing is added; only to see what is under the noise."""

    def uniform(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def normal(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def add_normal(self, to: Tensor, *, scale: float) -> None:
        pass


def an_update(records: Records, coins: Coins, *, steps: LocalPlan = LocalPlan(), sigma: float = 1.0, declared: int = 50,
              weights: Weights | None = None, **terms: object) -> Weights:  # fmt: skip
    model, start = a_network()
    return private_update(
        TASKS["heart-disease"], model, weights or start, records,
        local=steps, privacy=privacy(**terms), noise_multiplier=sigma, declared_patients=declared, coins=coins,
    )  # fmt: skip


# --- what one patient can move --------------------------------------------------------------------------------------------


@few
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    clip=st.sampled_from([0.01, 0.3, 1.0, 50.0]),
)
def test_no_patient_moves_the_sum_by_more_than_the_clip_norm(sizes: list[int], seed: int, scale: float, clip: float):
    model, weights = a_network(seed)
    records = a_table(sizes, seed=seed, scale=scale)
    whole = clipped_sum(model, losses, weights, records, clip_norm=clip)
    for patient in range(len(sizes)):
        rest = clipped_sum(model, losses, weights, without(records, patient), clip_norm=clip)
        assert difference(whole, rest) <= clip


@pytest.mark.parametrize("sizes", [[250, 20, 3], [300, 1, 1], [1] * 255 + [4, 2], [256, 256, 256], [100, 100, 57, 700]])
@pytest.mark.parametrize("shuffled", [False, True])
def test_no_patient_is_clipped_twice_because_a_batch_is_computed_in_pieces(sizes: list[int], shuffled: bool):
    model, weights = a_network()
    records = a_table(sizes, scale=10.0)
    if shuffled:  # the caller's order must not matter
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))
        records = Records({"table": records.fields["table"][order]}, records.label[order], records.patient[order])
    whole = clipped_sum(model, losses, weights, records, clip_norm=0.01, records_per_patient=max(sizes))
    for patient in range(min(4, len(sizes))):
        others = without(records, patient)
        rest = clipped_sum(model, losses, weights, others, clip_norm=0.01, records_per_patient=max(sizes))
        assert 0.009 < difference(whole, rest) <= 0.01  # a clipped patient moves it by the norm, and by no more


def test_clipping_records_instead_of_patients_would_break_the_bound():
    model, weights = a_network()
    records = a_table([6, 1, 1], scale=10.0)
    as_records = Records(records.fields, records.label, torch.arange(len(records)))
    whole = clipped_sum(model, losses, weights, as_records, clip_norm=0.01)
    rest = clipped_sum(model, losses, weights, as_records.of_patients(torch.arange(8) >= 6), clip_norm=0.01)
    assert difference(whole, rest) > 0.02


def test_small_gradients_are_not_touched():
    model, weights = a_network()
    records = a_table([1, 3, 2])
    found = clipped_sum(model, losses, weights, records, clip_norm=1e6)
    logits = model(**records.fields)
    share = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2])
    expected = torch.autograd.grad((losses(logits, records.label) * share).sum(), list(model.parameters()))
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one.float(), other)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_patient_whose_gradient_is_not_finite_counts_as_zero(poison: float):
    model, weights = a_network()
    records = a_table([2, 3, 1])
    expected = clipped_sum(model, losses, weights, without(records, 1), clip_norm=0.5)
    records.fields["table"][3, 4] = poison
    found = clipped_sum(model, losses, weights, records, clip_norm=0.5)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert difference(found, expected) < 1e-6


def test_a_model_full_of_infinities_gives_a_sum_of_zero():
    model, weights = a_network()
    broken = {name: torch.full_like(tensor, math.inf) for name, tensor in weights.items()}
    assert norm(clipped_sum(model, losses, broken, a_table([2, 1]), clip_norm=0.5)) == 0


def test_an_empty_batch_gives_zeros():
    model, weights = a_network()
    found = clipped_sum(model, losses, weights, a_table([]), clip_norm=0.5)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in weights.items()}
    assert norm(found) == 0


def test_the_networks_own_parameters_are_not_touched():
    model, weights = a_network()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    clipped_sum(model, losses, weights, a_table([3, 1]), clip_norm=0.5)
    assert difference(weights, before) == 0
    assert all(p.grad is None for p in model.parameters())


# --- gradients are right --------------------------------------------------------------------------------------------------


def films(count: int, dtype: torch.dtype = torch.float32) -> Records:
    random = torch.Generator().manual_seed(3)
    image = torch.rand(count, 1, 28, 28, generator=random).to(dtype)
    return Records({"image": image}, torch.arange(count) % 2, torch.arange(count))


def cases(dtype: torch.dtype) -> Iterator[tuple[nn.Module, Records]]:
    table = a_table([1] * 7)
    yield a_network()[0].to(dtype), Records({"table": table.fields["table"].to(dtype)}, table.label, table.patient)
    yield TASKS["chest-xray"].model({}, 1).to(dtype), films(5, dtype)


@pytest.mark.parametrize("number", [0, 1], ids=["mlp", "cnn"])
def test_each_records_gradient_is_that_of_plain_autograd(number: int):
    model, records = list(cases(torch.float64))[number]
    length = []
    for record in range(len(records)):
        alone = records.take(torch.tensor([record]))
        expected = torch.autograd.grad(losses(model(**alone.fields), alone.label).sum(), list(model.parameters()))
        length.append(math.sqrt(sum(float(g.square().sum()) for g in expected)))
        found = clipped_sum(model, losses, trainable(model), alone, clip_norm=1e6)
        for one, other in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    clip = sorted(length)[len(length) // 2]  # some are clipped, some are not
    together = clipped_sum(model, losses, trainable(model), records, clip_norm=clip)
    by_hand = {name: torch.zeros_like(tensor) for name, tensor in together.items()}
    for record, size in enumerate(length):
        alone = records.take(torch.tensor([record]))
        gradient = torch.autograd.grad(losses(model(**alone.fields), alone.label).sum(), list(model.parameters()))
        for name, g in zip(by_hand, gradient, strict=True):
            by_hand[name] += g * min(1.0, clip * (1 - headroom(torch.float64)) / size)
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, by_hand[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("number", [0, 1], ids=["mlp", "cnn"])
def test_the_clipped_sum_is_that_of_opacus(number: int):
    model, records = list(cases(torch.float32))[number]
    found = clipped_sum(model, losses, trainable(model), records, clip_norm=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule

        for name in [n for n, layer in model.named_modules() if isinstance(layer, MaxPool)]:
            model.set_submodule(name, nn.MaxPool2d(2))  # the same numbers, laid out as Opacus takes them
        hooked = GradSampleModule(model)
        losses(hooked(**records.fields), records.label).sum().backward()
    each = [p.grad_sample for p in model.parameters()]
    length = torch.stack([g.flatten(1).norm(dim=1) for g in each]).norm(dim=0)
    factor = (0.4 * (1 - headroom(torch.float32)) / length).clamp(max=1.0)
    assert bool((factor < 1).any())
    for (name, tensor), g in zip(found.items(), each, strict=True):
        torch.testing.assert_close(tensor.float(), torch.tensordot(factor, g, 1), rtol=1e-4, atol=1e-5, msg=name)


# --- who takes part -------------------------------------------------------------------------------------------------------


def test_every_patient_takes_part_with_the_plans_rate_whatever_the_number_of_records():
    patient = a_table([1, 5, 20, 2] * 10).patient
    coins, times = SeededCoins(1), 4000
    taken, sizes = torch.zeros(40), []
    for _ in range(times):
        index = draw(patient, rate=0.25, at_most=3, coins=coins)
        present = torch.unique(patient[index])
        taken[present] += 1
        sizes.append(len(present))
    spread = math.sqrt(0.25 * 0.75 / times)
    assert (taken / times - 0.25).abs().max() < 4.5 * spread
    assert np.mean(sizes) == pytest.approx(10, abs=4.5 * math.sqrt(7.5 / times))
    assert np.var(sizes) == pytest.approx(40 * 0.25 * 0.75, rel=0.12)  # independent coins, not a batch of fixed size
    together = stats.binom(40, 0.25)
    assert stats.chisquare(*_binned(sizes, together)).pvalue > 1e-8


def _binned(sizes: list[int], expected: stats.rv_discrete) -> tuple[list[float], list[float]]:
    cuts = [0, 6, 8, 9, 10, 11, 12, 14, 41]
    counts = [float(sum(low <= size < high for size in sizes)) for low, high in pairwise(cuts)]
    chances = [float(expected.cdf(high - 1) - expected.cdf(low - 1)) for low, high in pairwise(cuts)]
    return counts, [chance * len(sizes) for chance in chances]


def test_of_a_patient_with_many_records_a_random_few_are_taken():
    patient = a_table([9, 1, 2]).patient
    coins, times = SeededCoins(2), 3000
    taken = torch.zeros(12)
    for _ in range(times):
        index = draw(patient, rate=1.0, at_most=3, coins=coins)
        assert torch.bincount(patient[index]).tolist() == [3, 1, 2]
        assert len(torch.unique(index)) == 6
        assert patient[index].tolist() == sorted(patient[index].tolist())  # grouped
        taken[index] += 1
    assert (taken[:9] / times - 1 / 3).abs().max() < 0.04
    assert bool((taken[9:] == times).all())


@few
@given(
    patient=st.lists(st.integers(0, 8), max_size=40),
    rate=st.sampled_from([0.01, 0.5, 1.0]),
    at_most=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_a_draw_never_takes_more_than_allowed_of_anybody(patient: list[int], rate: float, at_most: int, seed: int):
    owner = torch.tensor(patient, dtype=torch.int64)
    index = draw(owner, rate=rate, at_most=at_most, coins=SeededCoins(seed))
    assert len(torch.unique(index)) == len(index)
    assert all(count <= at_most for count in torch.unique(owner[index], return_counts=True)[1].tolist())
    if rate == 1.0:
        assert len(index) == sum(min(patient.count(number), at_most) for number in set(patient))


def test_coins_are_fine_enough_for_a_rare_patient():
    drawn = OsCoins().uniform(1000)
    assert drawn.dtype == torch.float64
    assert float((drawn * 2.0**53).frac().abs().max()) == 0
    assert bool(((drawn * 2.0**25).frac() != 0).any())  # not float32 in disguise


# --- the noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "clip", "rate", "declared"), [(1.0, 0.5, 0.5, 80), (3.6, 1.0, 0.25, 200), (2.0, 7.0, 1.0, 10)]
)
def test_the_noise_of_an_update_is_sigma_times_the_norm_over_the_public_batch(
    sigma: float, clip: float, rate: float, declared: int
):
    task = Task("wide", "", TASKS["heart-disease"].schema, lambda _: nn.Linear(1, 1), lambda logits, label: 0 * logits.sum(1))
    model = Wide()
    zeros = trainable(model)
    update = private_update(
        task, model, zeros, a_table([1] * 20), local=local(learning_rate=0.3), noise_multiplier=sigma,
        privacy=privacy(clip_norm=clip, sampling_rate=rate), declared_patients=declared, coins=OsCoins(),
    )  # fmt: skip
    noise = torch.cat([tensor.flatten() for tensor in update.values()]).double()
    expected = 0.3 * sigma * clip / (rate * declared)
    assert len(noise) == FEATURES * 8000 + 8000
    assert float(noise.std()) == pytest.approx(expected, rel=NEVER / math.sqrt(2 * len(noise)))
    assert abs(float(noise.mean())) < NEVER * expected / math.sqrt(len(noise))
    assert stats.kstest(noise.numpy()[::10], "norm", args=(0, expected)).pvalue > 1e-8


class Wide(nn.Module):
    """Many parameters at zero, so that an update is nothing but noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 8000)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, table: Tensor) -> Tensor:
        logits: Tensor = self.layer(table)
        return logits


class Counted(SeededCoins):
    """Coins that remember what was asked of them."""

    def __init__(self) -> None:
        super().__init__(5)
        self.normals: list[int] = []

    def add_normal(self, to: Tensor, *, scale: float) -> None:
        self.normals.append(to.numel())
        super().add_normal(to, scale=scale)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("patients", [1, 30, 700])
def test_every_step_adds_one_noise_to_all_tensors_however_many_pieces_the_batch_has(steps: int, patients: int):
    coins = Counted()
    an_update(a_table([1] * patients), coins, steps=local(steps=steps), sampling_rate=1.0)
    _, weights = a_network()
    assert coins.normals == [sum(tensor.numel() for tensor in weights.values())] * steps


def test_a_step_nobody_takes_part_in_is_noised_all_the_same():
    class Nobody(SeededCoins):
        def uniform(self, count: int) -> Tensor:
            return torch.ones(count, dtype=torch.float64)

    update = an_update(a_table([1] * 10), Nobody(3), sigma=2.0, declared=50, clip_norm=0.5, sampling_rate=0.5)
    normal = SeededCoins(3).normal(sum(tensor.numel() for tensor in update.values()))
    for tensor, part in zip(update.values(), normal.split([tensor.numel() for tensor in update.values()]), strict=True):
        noise = part.view(tensor.shape)
        torch.testing.assert_close(tensor, -(2.0 * 0.5 * noise / 25).float(), rtol=1e-4, atol=2.0**-12 / 25)  # the grid


def test_the_sum_is_divided_by_the_public_batch_and_not_by_who_came():
    records = a_table([1] * 40)
    declared_fewer = an_update(records, NoNoise(), declared=20, sampling_rate=0.5, clip_norm=0.2)
    declared_more = an_update(records, NoNoise(), declared=80, sampling_rate=0.5, clip_norm=0.2)
    assert norm(declared_fewer) == pytest.approx(4 * norm(declared_more), rel=1e-3)
    model, weights = a_network()
    total = clipped_sum(model, losses, weights, records, clip_norm=0.2)
    for name, tensor in declared_fewer.items():
        torch.testing.assert_close(tensor, -(total[name] / 10).float(), rtol=1e-4, atol=0.2 * 2.0**-12 / 10)  # the grid


def test_dropping_a_patient_moves_the_update_by_no_more_than_the_noise_was_made_for():
    records = a_table([3, 1, 2, 7, 1], scale=100.0)
    whole = an_update(records, NoNoise(), declared=10, sampling_rate=0.5, clip_norm=0.5, records_per_patient=1024)
    for patient in range(records.patients):
        rest = an_update(without(records, patient), NoNoise(), declared=10, sampling_rate=0.5, clip_norm=0.5)
        assert difference(whole, rest) <= 0.5 / (0.5 * 10) * (1 + 1e-5)


# --- FedProx and weight decay ---------------------------------------------------------------------------------------------


def test_the_proximal_term_acts_under_privacy():
    records = a_table([1] * 20)
    free = an_update(records, SeededCoins(1), steps=local(steps=3, learning_rate=0.01))
    held = an_update(records, SeededCoins(1), steps=local(steps=3, learning_rate=0.01, proximal=100.0))
    assert difference(free, held) > 0.1 * norm(free)
    assert norm(held) < norm(free)


@pytest.mark.parametrize(("proximal", "decay"), [(2.0, 0.0), (0.0, 0.3), (1.5, 0.2)])
def test_an_update_of_several_steps_is_the_one_computed_by_hand(proximal: float, decay: float):
    records = a_table([2, 1, 3, 1])
    plan = local(steps=3, learning_rate=0.2, proximal=proximal, weight_decay=decay)
    found = an_update(records, SeededCoins(8), steps=plan, sigma=1.3, declared=6, clip_norm=0.7, sampling_rate=0.5,
                      records_per_patient=2)  # fmt: skip
    model, start = a_network()
    coins = SeededCoins(8)
    here = {name: tensor.double() for name, tensor in start.items()}
    for _ in range(3):
        index = draw(records.patient, rate=0.5, at_most=2, coins=coins)
        single = {name: tensor.float() for name, tensor in here.items()}
        total = clipped_sum(model, losses, single, records.take(index), clip_norm=0.7)
        sizes = [summed.numel() for summed in total.values()]
        for (name, summed), part in zip(total.items(), coins.normal(sum(sizes)).split(sizes), strict=True):
            noise = part.view(summed.shape)
            gradient = (summed + 1.3 * 0.7 * noise) / (0.5 * 6)
            gradient = gradient + proximal * (here[name] - start[name]) + decay * here[name]
            here[name] = here[name] - 0.2 * gradient
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (here[name] - start[name]).float(), rtol=1e-3, atol=1e-5)


# --- whose coins ----------------------------------------------------------------------------------------------------------


def test_dropout_follows_from_the_coins_and_leaves_the_global_generator_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    x, masks = torch.ones(40, 3), []
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for coins in (SeededCoins(1), SeededCoins(1), SeededCoins(2), OsCoins(), OsCoins()):
        with secret_chance(model, coins, torch.device("cpu")):
            masks.append(model(x) == 0)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(masks[0], masks[1])
    assert not any(torch.equal(masks[a], masks[b]) for a, b in ((0, 2), (0, 3), (3, 4)))
    coins = SeededCoins(1)
    with secret_chance(model[0], coins, torch.device("cpu")):
        pass
    assert coins.uniform(1) == SeededCoins(1).uniform(1), "a network without chance takes no coin"


def test_the_same_study_twice_gives_different_updates():
    records = a_table([1] * 20)
    torch.manual_seed(0)
    np.random.seed(0)
    one = an_update(records, OsCoins())
    torch.manual_seed(0)
    np.random.seed(0)
    other = an_update(records, OsCoins())
    assert difference(one, other) > 0.1 * norm(one)


def test_the_noise_of_two_rounds_is_uncorrelated():
    a, b = OsCoins().normal(200_000), OsCoins().normal(200_000)
    assert abs(float((a * b).mean())) < NEVER / math.sqrt(200_000)
    stream = OsCoins()
    c, d = stream.normal(200_000), stream.normal(200_000)
    assert abs(float((c * d).mean())) < NEVER / math.sqrt(200_000)
    half = c[:100_000] * c[100_000:]  # the two halves of one Box-Muller transform
    assert abs(float(half.mean())) < NEVER / math.sqrt(100_000)
    assert abs(float((c[:-1] * c[1:]).mean())) < NEVER / math.sqrt(200_000)


def test_operating_system_coins_are_uniform_and_normal():
    coins = OsCoins()
    uniform, normal = coins.uniform(200_000).numpy(), coins.normal(200_001).numpy()
    assert len(normal) == 200_001
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-8
    assert stats.kstest(normal, "norm").pvalue > 1e-8
    assert stats.kurtosis(normal) == pytest.approx(0, abs=0.06)
    assert np.isfinite(normal).all()
    assert (np.abs(normal) > 3.5).mean() == pytest.approx(2 * stats.norm.sf(3.5), rel=0.6)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_coins_come_in_any_number(count: int):
    for coins in (OsCoins(), SeededCoins(1)):
        assert coins.uniform(count).shape == coins.normal(count).shape == (count,)


def test_the_coins_of_the_operating_system_take_no_argument():
    assert list(inspect.signature(OsCoins).parameters) == []
    with pytest.raises(TypeError):
        OsCoins(7)  # type: ignore[call-arg]


def keys_of(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from (f"{name}.{key}" for key in keys_of(kind))


def test_no_configuration_reaches_the_coins():
    suspicious = ("seed", "random", "generator", "entropy", "nonce", "coin")
    found = {key for model in (StudyPlan, SiteConfig) for key in keys_of(model) if any(word in key for word in suspicious)}
    found |= {f"data.{key}" for key in keys_of(SiteConfig.model_fields["data"].annotation.__args__[1])  # type: ignore[union-attr]
              if any(word in key for word in suspicious)}  # fmt: skip
    # the plan's seed makes the first model and batches without privacy; the holdout's seed splits records before training
    assert found == {"seed", "data.holdout_seed"}


def test_the_plans_seed_does_not_reach_a_private_update():
    assert "seed" not in inspect.signature(private_update).parameters
    assert inspect.signature(private_update).parameters["coins"].default is inspect.Parameter.empty


# --- networks that couple patients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "kind"), [
    (nn.BatchNorm1d(4), "BatchNorm1d"),
    (nn.BatchNorm1d(4, affine=False), "BatchNorm1d"),
    (nn.BatchNorm1d(4, track_running_stats=False), "BatchNorm1d"),
    (nn.BatchNorm1d(4).eval().requires_grad_(False), "BatchNorm1d"),
    (nn.SyncBatchNorm(4), "SyncBatchNorm"),
    (nn.InstanceNorm1d(4, track_running_stats=True), "InstanceNorm1d"),
])  # fmt: skip
def test_a_layer_that_mixes_patients_is_refused_by_name(layer: nn.Module, kind: str):
    model = nn.Sequential(nn.Linear(3, 4), nn.ModuleDict({"normal": layer}))
    with pytest.raises(PlanRefused, match=rf"layer 1\.normal \({kind}\) mixes the patients .* use GroupNorm"):
        refuse_coupled(model)


def test_a_layer_that_rewrites_its_weights_in_a_hook_is_refused():
    with pytest.raises(PlanRefused, match="layer 0 changes its weights in a hook"):
        refuse_coupled(nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4))))


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_shipped_network_passes(task: str):
    refuse_coupled(TASKS[task].model({}, 0))
