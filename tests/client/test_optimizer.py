"""The engine in somebody else's training loop: Opacus' contract, its own refusals, and what must never be stepped."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from wardround.client.dp import OsCoins, PatientOptimizer, SeededCoins, Untappable, draw
from wardround.client.dp.engine import headroom
from wardround.common.errors import PlanRefused

RATE, LR = 0.2, 0.3
few = settings(max_examples=15, deadline=None, derandomize=True)
Made = Callable[..., tuple[nn.Module, PatientOptimizer]]


def a_network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 2)
        )


def records(count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, 1, 4, 4, generator=random), torch.randint(0, 2, (count,), generator=random)


def made(model: nn.Module | None = None, **changes: object) -> tuple[nn.Module, PatientOptimizer]:
    model = a_network() if model is None else model
    options = {"noise_multiplier": 0.0, "max_grad_norm": 0.5, "expected_batch_size": 8, **changes}
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    return model, PatientOptimizer(sgd, model=model, **options)  # type: ignore[arg-type]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def take(model: nn.Module, optimizer: PatientOptimizer, x: Tensor, y: Tensor, reduction: str = "mean") -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y, reduction=reduction).backward()
    optimizer.step()


def clipped_sum_by_autograd(model: nn.Module, x: Tensor, y: Tensor, patient: Tensor, *, clip: float) -> Tensor:
    """Gradients of `model`'s weights by torch's autograd, patient by patient; float64."""
    twin = copy.deepcopy(model).double()
    for layer in twin.modules():  # a copy of a tapped model is tapped
        layer.__dict__.pop("forward", None)
        layer._forward_pre_hooks.clear()
        layer._forward_hooks.clear()
    total = torch.zeros_like(weights(twin))
    for one in patient.unique():
        mine = patient == one
        value = F.cross_entropy(twin(x[mine].double()), y[mine])
        g = torch.cat([part.flatten() for part in torch.autograd.grad(value, list(twin.parameters()))])
        total += g * min(1.0, clip / float(g.norm()))
    return total


# --- the same as Opacus ---------------------------------------------------------------------------------------------------


def opacus_loop(
    kind: str, reduction: str, physical: int, clip: float = 0.5
) -> tuple[Tensor, list[tuple[float, float, int]], float]:
    """Ten logical batches of Poisson sampling, some of them empty, split by Opacus' own memory manager."""
    torch.manual_seed(0)
    model = a_network()
    called = GradSampleModule(model, loss_reduction=reduction) if kind == "opacus" else model
    sgd = torch.optim.SGD(model.parameters(), lr=LR if reduction == "mean" else LR / 8, momentum=0.5)
    terms = {"noise_multiplier": 0.0, "max_grad_norm": clip, "expected_batch_size": 8, "loss_reduction": reduction}
    optimizer = DPOptimizer(sgd, **terms) if kind == "opacus" else PatientOptimizer(sgd, model=model, **terms)
    accountant = RDPAccountant()
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(RATE))
    loader = DPDataLoader(TensorDataset(*records(6)), sample_rate=RATE, generator=torch.Generator().manual_seed(3))
    empty = 0
    for _ in range(2):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as batches:
            for x, y in batches:
                optimizer.zero_grad()
                empty += not len(x)
                F.cross_entropy(called(x), y, reduction=reduction).backward()
                optimizer.step()
    assert empty
    history = [(1.0, rate, steps) for _, rate, steps in accountant.history]
    accountant.history = history
    return weights(model), history, accountant.get_epsilon(1e-5)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("physical", [2, 100])
def test_weights_history_and_epsilon_are_those_of_opacus_own_optimizer(reduction: str, physical: int):
    ours, our_history, our_epsilon = opacus_loop("wardround", reduction, physical)
    theirs, their_history, their_epsilon = opacus_loop("opacus", reduction, physical)
    assert (ours - theirs).abs().max() < 1e-4
    with_headroom, _, _ = opacus_loop("opacus", reduction, physical, clip=0.5 * (1 - headroom(torch.float32)))
    assert (ours - with_headroom).abs().max() < 1e-6
    assert (ours - weights(a_network())).abs().max() > 0.02  # something was learned
    assert our_history == their_history == [(1.0, RATE, 10)]
    assert our_epsilon == their_epsilon


def test_the_same_loop_with_noise_of_known_coins_gives_the_clipped_sum_plus_that_noise():
    model, optimizer = made(noise_multiplier=2.0, coins=SeededCoins(5))
    x, y = records(6)
    before = weights(model)
    expected = clipped_sum_by_autograd(model, x, y, torch.arange(6), clip=0.5)
    take(model, optimizer, x, y)
    coins, noise = SeededCoins(5), []
    for p in model.parameters():
        zeros = torch.zeros_like(p)
        coins.add_normal(zeros, scale=1.0)
        noise.append(zeros.flatten())
    moved = (before - weights(model)) * 8 / LR
    assert (moved - expected - torch.cat(noise)).abs().max() < 2e-3  # the headroom for rounding is a thousandth of the clip


def test_the_noise_of_the_operating_system_has_the_promised_deviation():
    model = nn.Linear(200, 100)
    optimizer = made(model, noise_multiplier=3.0, loss_reduction="sum")[1]
    before = weights(model)
    optimizer.step()  # an empty batch is noise alone
    noise = (before - weights(model)) / LR
    assert abs(float(noise.std()) / 1.5 - 1) < 0.03
    optimizer.zero_grad()
    optimizer.step()
    assert (before - weights(model)).unique().numel() > 10_000


@pytest.mark.parametrize("sizes", [[0], [0, 0], [3, 0, 3], [0, 3], [3, 0]])
@pytest.mark.parametrize("through_the_model", [True, False])
def test_empty_physical_batches_count_for_nothing_wherever_they_are(sizes: list[int], through_the_model: bool):
    model, optimizer = made()
    start, steps = weights(model), []
    optimizer.attach_step_hook(steps.append)
    x, y = records(6)
    expected = clipped_sum_by_autograd(model, x[: sum(sizes)], y[: sum(sizes)], torch.arange(sum(sizes)), clip=0.5)
    at = 0
    for number, size in enumerate(sizes):
        optimizer.signal_skip_step(number + 1 < len(sizes))
        optimizer.zero_grad()
        if size or through_the_model:
            F.cross_entropy(model(x[at : at + size]), y[at : at + size]).backward()
        optimizer.step()
        at += size
    assert len(steps) == 1
    assert ((start - weights(model)) * 8 / LR - expected).abs().max() < 1e-3 * sum(sizes) + 1e-6
    take(model, optimizer, x, y)  # the layers are tapped again


def test_schedulers_closures_and_states_work_as_with_any_optimizer():
    model, optimizer = made()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    x, y = records(4)

    def closure() -> float:
        value = F.cross_entropy(model(x), y)
        value.backward()
        return value.item()

    start = weights(model)
    optimizer.zero_grad()
    optimizer.step(closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == LR / 2
    first = weights(model)
    assert not torch.equal(start, first)
    other, twin = made(copy.deepcopy(a_network()))
    twin.original_optimizer.param_groups[0]["momentum"] = 0.9
    twin.load_state_dict(optimizer.state_dict())
    assert twin.state_dict() == optimizer.state_dict()
    assert twin.param_groups[0]["lr"] == LR / 2
    other.load_state_dict(model.state_dict())
    take(model, optimizer, x, y)
    take(other, twin, x, y)
    assert torch.equal(weights(model), weights(other))


# --- patients -------------------------------------------------------------------------------------------------------------


@few
@given(st.lists(st.integers(1, 4), max_size=8), st.integers(0, 99), st.integers(4, 9), st.sampled_from(["mean", "sum"]))
def test_parts_of_a_batch_give_the_sum_of_clipped_mean_gradients_of_whole_patients(
    sizes: list[int], seed: int, at_most: int, reduction: str
):
    patient = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    patient = patient[torch.randperm(len(patient), generator=torch.Generator().manual_seed(seed))]
    x, y = records(len(patient), seed=seed)
    model, optimizer = made(loss_reduction=reduction, expected_batch_size=1)
    expected = clipped_sum_by_autograd(model, x, y, patient, clip=0.5)
    start = weights(model)
    met = []
    for part in optimizer.parts(patient, at_most=at_most):
        assert len(part) <= at_most
        met.append(part)
        if len(part):
            F.cross_entropy(model(x[part]), y[part], reduction=reduction).backward()
        optimizer.step()
    assert sorted(torch.cat(met).tolist()) == list(range(len(patient)))
    assert ((start - weights(model)) / LR - expected).norm() <= 2e-3 * 0.5 * len(sizes) + 1e-6


def test_a_patient_cut_in_two_is_refused_and_the_batch_dropped():
    model, optimizer = made()
    start = weights(model)
    x, y = records(4)
    optimizer.signal_skip_step(True)
    optimizer.patients(torch.tensor([7, 7]))
    F.cross_entropy(model(x[:2]), y[:2]).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.patients(torch.tensor([7, 8]))
    F.cross_entropy(model(x[2:]), y[2:]).backward()
    with pytest.raises(ValueError, match="cut in two"):
        optimizer.step()
    assert nothing_left(optimizer)
    assert torch.equal(start, weights(model))
    optimizer.patients(torch.tensor([7, 7, 8, 8]))  # in a batch of its own, all is well
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_records_of_one_patient_must_stand_together_and_be_as_many_as_the_model_saw():
    model, optimizer = made()
    x, _ = records(4)
    with pytest.raises(ValueError, match="next to each other"):
        optimizer.patients(torch.tensor([1, 2, 1]))
    optimizer.patients(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="2 and 4 records"):
        model(x)
    optimizer.patients(torch.tensor([1, 1, 2, 2]))
    model(x)
    with pytest.raises(ValueError, match="4 and 2 records"):
        optimizer.patients(torch.tensor([1, 1]))


def test_who_said_once_whose_records_these_are_must_say_it_for_every_batch():
    model, optimizer = made(expected_batch_size=1)
    x, y = records(4)
    patient = torch.tensor([1, 1, 2, 2])
    expected = clipped_sum_by_autograd(model, x, y, patient, clip=0.5)
    start = weights(model)
    optimizer.patients(patient)
    take(model, optimizer, x, y)  # which calls zero_grad
    assert ((start - weights(model)) / LR - expected).norm() < 3e-3
    with pytest.raises(RuntimeError, match="not for this batch"):
        take(model, optimizer, x, y)


def test_parts_refuse_a_patient_that_fits_into_none_and_a_part_that_was_not_stepped():
    model, optimizer = made()
    with pytest.raises(ValueError, match="more than 2 records"):
        next(optimizer.parts(torch.tensor([1, 1, 1]), at_most=2))
    x, y = records(4)
    parts = optimizer.parts(torch.arange(4), at_most=2)
    part = next(parts)
    F.cross_entropy(model(x[part]), y[part]).backward()
    with pytest.raises(RuntimeError, match="not followed by step"):
        next(parts)
    assert nothing_left(optimizer)


# --- loops that are left --------------------------------------------------------------------------------------------------


def nothing_left(optimizer: PatientOptimizer) -> bool:
    return all(p.summed_grad is None and p.grad is None for p in optimizer.params) and not optimizer._step_skip_queue


def by_memory_manager(optimizer: PatientOptimizer, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A logical batch of all records in physical ones of 2."""
    loader = DPDataLoader(TensorDataset(x, y), sample_rate=1.0)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as batches:
        yield from batches


def by_parts(optimizer: PatientOptimizer, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for part in optimizer.parts(torch.arange(len(x)), at_most=2):
        yield x[part], y[part]


@pytest.mark.parametrize("batches", [by_memory_manager, by_parts])
@pytest.mark.parametrize("how", ["break", "exception", "exception in step"])
def test_sums_of_a_loop_that_was_left_do_not_reach_the_next_batch(
    batches: Callable[..., Iterator[tuple[Tensor, Tensor]]], how: str, monkeypatch: pytest.MonkeyPatch
):
    model, optimizer = made(expected_batch_size=1)
    x, y = records(6)
    start = weights(model)
    with contextlib.suppress(KeyError, ZeroDivisionError):
        for number, (a, b) in enumerate(batches(optimizer, 9 * x, y)):
            if number == 2:
                assert any(p.summed_grad is not None for p in optimizer.params)
                assert not any(torch.is_tensor(v) for v in optimizer.state_dict()["state"].values())
                if how == "break":
                    break
                if how == "exception":
                    raise KeyError
                monkeypatch.setattr(optimizer, "clip_and_accumulate", lambda: 1 / 0)
            take(model, optimizer, a, b)
    monkeypatch.undo()
    if batches is by_parts or how == "exception in step":
        assert nothing_left(optimizer)
    for a, b in batches(optimizer, x, y):
        take(model, optimizer, a, b)
    expected = clipped_sum_by_autograd(a_network(), x, y, torch.arange(6), clip=0.5)
    assert ((start - weights(model)) / LR - expected).norm() < 3e-3


def test_several_whole_loops_over_one_loader_drop_nothing():
    model, optimizer = made()
    steps: list[object] = []
    optimizer.attach_step_hook(steps.append)
    loader = DPDataLoader(TensorDataset(*records(8)), sample_rate=0.5, generator=torch.Generator().manual_seed(1))
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as batches:
        for _ in range(3):
            for x, y in batches:
                take(model, optimizer, x, y)
    assert len(steps) == 6


def test_what_a_hook_or_the_coins_raise_ends_the_batch_without_a_step():
    model, optimizer = made(noise_multiplier=float("nan"))
    start = weights(model)
    x, y = records(4)
    with pytest.raises(ValueError, match="scale nan"):
        take(model, optimizer, x, y)
    assert nothing_left(optimizer)
    model, optimizer = made()
    optimizer.attach_step_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        take(model, optimizer, x, y)
    assert nothing_left(optimizer)
    assert torch.equal(start, weights(model))


# --- critics of generators ------------------------------------------------------------------------------------------------


def test_a_generators_step_through_a_paused_critic_changes_nothing_for_the_critic():
    critic, optimizer = made()
    alone, other = made()
    generator = nn.Linear(3, 16)
    x, y = records(6)
    for _ in range(3):
        take(critic, optimizer, x, y)
        with optimizer.paused():
            F.cross_entropy(critic(generator(torch.ones(9, 3)).view(9, 1, 4, 4)), torch.ones(9).long()).backward()
        assert generator.weight.grad is not None
        take(alone, other, x, y)
    assert torch.equal(weights(critic), weights(alone))


def test_a_generators_step_without_a_pause_is_forgotten_by_zero_grad():
    critic, optimizer = made()
    alone, other = made()
    x, y = records(6)
    F.cross_entropy(critic(x[:3]), y[:3]).backward()
    take(critic, optimizer, x, y)
    take(alone, other, x, y)
    assert torch.equal(weights(critic), weights(alone))


def test_a_real_and_a_fake_pass_in_one_step_are_refused():
    critic, optimizer = made()
    x, y = records(8)
    with pytest.raises(Untappable, match="used 2 times"):
        optimizer.step(lambda: sum(F.cross_entropy(critic(half), y[:4]).backward() or 0.0 for half in (x[:4], x[4:])))
    critic(x[:4])
    with pytest.raises(ValueError, match="4 and 3 records in one pass"):
        critic(x[:3])
    assert nothing_left(optimizer)


def test_a_pause_between_backward_and_step_is_refused_and_one_within_another_is_not():
    model, optimizer = made()
    x, y = records(4)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="waits for step"), optimizer.paused():
        pass
    optimizer.zero_grad()
    with optimizer.paused():
        with optimizer.paused():
            pass
        F.cross_entropy(model(x), y).backward()
        assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    take(model, optimizer, x, y)


# --- refusals -------------------------------------------------------------------------------------------------------------


class Stray(nn.Module):
    """Uses a weight of a layer outside of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.head, self.how = nn.Linear(16, 16), nn.Linear(16, 2), how

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x.flatten(1)))
        if self.how == "weight":
            h = h + self.body.weight.sum()
        if self.how == "twice":
            h = self.body(h)
        if self.how == "unused":
            return h[:, :2]
        if self.how == "mixed":
            h = h - h.mean(0)
        if self.how == "folded":
            h = h.view(-1, 2, 16)[:, 0]
        logits: Tensor = self.head(h)
        return logits


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("weight", RuntimeError, "body.weight was used outside of its layer"),
        ("twice", Untappable, "layer body was used 2 times"),
        ("unused", Untappable, "layer head was used 0 times"),
    ],
)
def test_what_book_keeping_does_not_cover_is_refused_by_name_and_not_stepped(how: str, error: type[Exception], text: str):
    model, optimizer = made(Stray(how))
    start = weights(model)
    with pytest.raises(error, match=text):
        take(model, optimizer, *records(4))
    assert nothing_left(optimizer)
    assert torch.equal(start, weights(model))
    with pytest.raises((Untappable, PlanRefused)):
        optimizer.check(*(t[:1] for t in records(1)), F.cross_entropy)


def test_check_finds_records_that_see_each_other_in_the_network_or_in_the_loss():
    x, y = records(1)
    with pytest.raises(PlanRefused, match="mixes the records"):
        made(Stray("mixed"))[1].check(x, y, F.cross_entropy)
    _, optimizer = made()
    with pytest.raises(Untappable, match="another"):
        optimizer.check(x, y, lambda output, label: F.cross_entropy(output - output.mean(0), label))
    with pytest.raises(Untappable, match="another"):  # the optimizer was told of a mean
        optimizer.check(x, y, lambda output, label: F.cross_entropy(output, label, reduction="sum"))
    with pytest.raises(Untappable, match=r"shape \[4\]|not one number"):
        optimizer.check(x, y, lambda output, label: F.cross_entropy(output, label, reduction="none"))
    with pytest.raises(Untappable, match="as many records"):
        optimizer.check(x, y.repeat(2), F.cross_entropy)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_check_passes_an_honest_network_and_leaves_it_tapped(reduction: str):
    model, optimizer = made(loss_reduction=reduction)
    x, y = records(4)
    before = weights(model)
    optimizer.check(x, y, nn.CrossEntropyLoss(reduction=reduction))
    optimizer.check({"input": x}, y, nn.CrossEntropyLoss(reduction=reduction))
    optimizer.check((x,), y.double(), lambda out, y: F.binary_cross_entropy(out[:, 0].sigmoid(), y, reduction=reduction))
    assert torch.equal(before, weights(model))
    assert all(p.grad is None for p in model.parameters())
    take(model, optimizer, x, y, reduction)
    assert not torch.equal(before, weights(model))


class Scaled(nn.Module):
    """A layer of one's own: a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((16,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * self.scale


def own_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Scaled(), nn.Linear(16, 2))


def test_a_layer_of_ones_own_is_trained_after_a_check_and_not_before():
    model, optimizer = made(own_network())
    x, y = records(6)
    with pytest.raises(Untappable, match="layer 0 is not among the known ones"):
        take(model, optimizer, x, y)
    optimizer.check(x, y, F.cross_entropy)
    expected = clipped_sum_by_autograd(model, x, y, torch.arange(6), clip=0.5)
    start = weights(model)
    take(model, optimizer, x, y)
    assert ((start - weights(model)) * 8 / LR - expected).norm() < 3e-3


def test_outputs_that_are_not_one_for_each_record_want_a_check():
    model, optimizer = made(Stray("folded"))
    with pytest.raises(ValueError, match="4 records became 2 outputs"):
        take(model, optimizer, *records(4))
    del model


def test_records_that_the_model_was_not_called_with_are_refused():
    model, optimizer = made()
    x, y = records(4)
    h = x
    for layer in model.children():
        h = layer(h)
    F.cross_entropy(h, y).backward()
    with pytest.raises(RuntimeError, match="not counted"):
        optimizer.step()
    model(x)
    with pytest.raises(RuntimeError, match="no gradient came back"):
        optimizer.step()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="zero_grad"):
        optimizer.step(lambda: F.cross_entropy(model(x), y).backward() or 0.0)
    assert nothing_left(optimizer)


@pytest.mark.parametrize("own", [False, True])
def test_looking_at_the_model_without_gradients_disturbs_nothing(own: bool):
    x, y = records(6)
    (model, optimizer), (alone, other) = (made(own_network() if own else a_network()) for _ in "12")
    optimizer.check(x, y, F.cross_entropy)
    other.check(x, y, F.cross_entropy)
    value = F.cross_entropy(model(x), y)
    with torch.no_grad():
        model(x[:2])
    with torch.inference_mode():
        model(x[:1])
    value.backward()
    optimizer.step()
    take(alone, other, x, y)
    assert torch.equal(weights(model), weights(alone))


def test_networks_that_mix_records_or_are_wrapped_are_refused_at_construction():
    with pytest.raises(PlanRefused, match="BatchNorm2d"):
        made(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)))
    for wrapped, text in (
        (torch.compile(a_network(), backend="eager"), "compiled"),
        (nn.Sequential(torch.compile(a_network(), backend="eager")), "layer 0 is compiled"),
        (nn.DataParallel(a_network()), "DataParallel"),
        (torch.jit.trace(nn.Linear(16, 2), torch.ones(1, 16)), "scripted"),
        (a_network().bfloat16(), "autocast"),
    ):
        with pytest.raises(ValueError, match=text):
            made(wrapped)
    in_place = a_network()
    in_place.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled"):
        made(in_place)
    model, _ = made()
    with pytest.raises(Untappable, match="forward of its own making"):
        made(model)
    with pytest.raises(ValueError, match="parameters are not those"):
        PatientOptimizer(
            torch.optim.SGD(model[0].parameters()), model=model, noise_multiplier=1, max_grad_norm=1, expected_batch_size=1
        )


def test_a_detached_model_is_a_plain_one_and_can_be_taken_anew():
    model, optimizer = made()
    optimizer.detach()
    x, y = records(4)
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    take(*made(model), x, y)


def test_a_tapped_model_can_be_copied_and_saved_without_sums_and_keys():
    model, optimizer = made(noise_multiplier=1.0)
    x, y = records(4)
    optimizer.signal_skip_step(True)
    take(model, optimizer, x, y)
    shadow = copy.deepcopy(model)
    assert all(getattr(p, "summed_grad", None) is None for p in shadow.parameters())
    assert torch.equal(shadow(x), model(x))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert torch.load(file).keys() == a_network().state_dict().keys()


def test_many_patients_are_summed_in_double_precision():
    model, optimizer = made(nn.Linear(3, 2), loss_reduction="sum", max_grad_norm=1e-3)
    x, y = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(300, dtype=torch.int64)
    for number, part in enumerate(optimizer.parts(torch.arange(300), at_most=100)):
        F.cross_entropy(model(x[part]), y[part], reduction="sum").backward()
        if number == 2:
            optimizer.signal_skip_step(True)
            optimizer._step_skip_queue.reverse()
        optimizer.step()
        summed = optimizer.params[0].summed_grad
        assert summed.dtype == (torch.float64 if number == 2 else torch.float32)
        if number == 2:
            break


# --- short floats and compilers -------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """An embedding, a recurrent layer and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.state, self.head = nn.Embedding(9, 6), nn.RNN(6, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, last = self.state(self.words(x))
        logits: Tensor = self.head(last[0])
        return logits


def autocast_error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """How far a clipped sum under bfloat16 autocast is from per-record autograd under the same autocast, relative."""
    plain, total = copy.deepcopy(model), torch.zeros_like(weights(model))
    for i in range(len(x)):
        plain.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1])
        value.backward()
        g = torch.cat([p.grad.flatten() for p in plain.parameters()])  # type: ignore[union-attr]
        total += g * min(1.0, 0.5 / float(g.norm()))
    optimizer = made(model, expected_batch_size=1)[1]
    start = weights(model)
    with torch.autocast("cpu", torch.bfloat16):
        value = F.cross_entropy(model(x), y)
    value.backward()
    optimizer.step()
    return float(((start - weights(model)) / LR - total).norm() / total.norm())


@pytest.mark.parametrize("kind", ["convolutions", "recurrent"])
def test_under_bfloat16_autocast_gradients_are_per_record_autograds_up_to_its_rounding(kind: str):
    torch.manual_seed(0)
    x, y = records(8)
    model = a_network() if kind == "convolutions" else Reader()
    x = x if kind == "convolutions" else torch.randint(0, 9, (8, 5))
    assert autocast_error(model, x, y) < 1e-2  # 0.25 to 0.55 % were measured


def test_under_bfloat16_autocast_no_patient_moves_the_sum_by_more_than_the_clip_norm():
    x, y = records(8)
    found = []
    for count in (8, 7):
        model, optimizer = made(expected_batch_size=1)
        start = weights(model)
        with torch.autocast("cpu", torch.bfloat16):
            value = F.cross_entropy(model(20 * x[:count]), y[:count])
        value.backward()
        optimizer.step()
        found.append((start - weights(model)) / LR)
    assert 0.45 < (found[0] - found[1]).norm() <= 0.5 + 1e-5


def test_scaled_losses_are_refused_before_a_step():
    model, optimizer = made()
    start = weights(model)
    x, y = records(4)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)
    assert torch.equal(start, weights(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["convolutions", "recurrent"])
def test_a_compiler_around_a_tapped_model_changes_no_gradient(kind: str):
    torch.manual_seed(0)
    x, y = records(6)
    plain = a_network() if kind == "convolutions" else Reader()
    x = x if kind == "convolutions" else torch.randint(0, 9, (6, 5))
    model, optimizer = made(copy.deepcopy(plain))
    plain, other = made(plain)
    called = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        take(called, optimizer, x, y)
        take(plain, other, x, y)
    assert (weights(model) - weights(plain)).abs().max() < 1e-6


# --- by the book ----------------------------------------------------------------------------------------------------------


def test_a_loop_over_drawn_patients_with_secret_coins_runs_and_is_accounted():
    model, optimizer = made(noise_multiplier=1.0)
    accountant = RDPAccountant()
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(RATE))
    x, y = records(40)
    patient = torch.arange(20).repeat_interleave(2)
    for _ in range(5):
        drawn = draw(patient, rate=RATE, at_most=2, coins=OsCoins())
        for part in optimizer.parts(patient[drawn], at_most=4):
            rows = drawn[part]
            if len(rows):
                F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    assert accountant.history == [(1.0, RATE, 5)]


def test_the_example_of_the_document_runs_learns_and_prints_what_it_cost(capsys: pytest.CaptureFixture[str]):
    text = (Path(__file__).parents[2] / "docs" / "private-training.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/private-training.md", "exec"), {})
    accuracy, epsilon = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out)[:2])
    assert accuracy > 0.8
    assert 8.0 < epsilon < 10.0
