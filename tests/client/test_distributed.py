"""Two devices of one site: one sum, one noise, and nobody waits for ever. Two processes on the CPU, over loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from wardround.client.dp import DistributedPatientOptimizer, PatientOptimizer

TIMEOUT, SHORT = 60.0, 8.0  # seconds
TERMS: dict[str, Any] = {"max_grad_norm": 0.5, "expected_batch_size": 4}


def a_network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2))


def records() -> tuple[Tensor, Tensor, Tensor]:
    """Five patients with one to four records."""
    patient = torch.arange(5).repeat_interleave(torch.tensor([2, 1, 4, 3, 1]))
    random = torch.Generator().manual_seed(0)
    return 3 * torch.randn(11, 1, 8, generator=random), torch.arange(11) % 2, patient


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def batch(model: nn.Module, optimizer: PatientOptimizer, rows: Tensor) -> None:
    """One logical batch in parts of at most 4 records; how many parts depends on the rank."""
    x, y, patient = records()
    for part in optimizer.parts(patient[rows], at_most=4):
        if len(part):
            F.cross_entropy(model(x[rows][part]), y[rows][part]).backward()
        optimizer.step()


# --- what one of the processes does ---------------------------------------------------------------------------------------


def made(rank: int, noise_multiplier: float = 0.0, **changes: Any) -> tuple[nn.Module, DistributedPatientOptimizer]:
    model = a_network(seed=rank)  # rank 0's weights must become everybody's
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    terms = {**TERMS, "noise_multiplier": noise_multiplier, **changes}
    return model, DistributedPatientOptimizer(sgd, model=model, **terms)


def union(rank: int) -> Tensor:
    model, optimizer = made(rank)
    patient = records()[2]
    for _ in range(3):
        batch(model, optimizer, torch.nonzero(patient % 2 == rank)[:, 0])
    return weights(model)


def empty(rank: int) -> Tensor:
    model, optimizer = made(rank)
    batch(model, optimizer, torch.arange(11 if rank else 0))
    return weights(model)


def noise(rank: int) -> Tensor:
    model = nn.Linear(300, 100, bias=False)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = DistributedPatientOptimizer(
        sgd, model=model, noise_multiplier=2.0, max_grad_norm=0.5, expected_batch_size=None, loss_reduction="sum"
    )
    before = weights(model)
    optimizer.step()
    return before - weights(model)


def within_ddp(rank: int) -> Tensor:
    model, optimizer = made(rank)
    wrapped = DistributedDataParallel(model)
    for _ in range(3):
        with wrapped.no_sync():
            batch(wrapped, optimizer, torch.nonzero(records()[2] % 2 == rank)[:, 0])
    return weights(model)


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was raised"


def stopped(rank: int) -> str:
    model, optimizer = made(rank)
    start = weights(model)
    x, y, _ = records()

    def step() -> None:
        for _ in range(1 + rank):  # layers are used twice at rank 1
            F.cross_entropy(model(x), y).backward()
        optimizer.step()

    text = refused(step)
    assert torch.equal(start, weights(model))
    assert all(p.grad is None and p.summed_grad is None for p in optimizer.params)
    return text


def other_terms(rank: int) -> str:
    return refused(lambda: made(rank, max_grad_norm=0.5 + rank))


def wrapped(rank: int) -> str:
    model = DistributedDataParallel(a_network())
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    return refused(lambda: DistributedPatientOptimizer(sgd, model=model, noise_multiplier=0.0, **TERMS))


def gone(rank: int) -> str:
    """Rank 1 does not come to its step, and is still there."""
    group = distributed.new_group(timeout=timedelta(seconds=SHORT))
    model, optimizer = made(rank, group=group)
    start = time.monotonic()
    if rank == 1:
        time.sleep(2 * SHORT)
        return "stayed away"
    text = refused(lambda: batch(model, optimizer, torch.arange(11)))
    return text if time.monotonic() - start < 1.5 * SHORT else "too late"


CASES = (union, empty, noise, within_ddp, stopped, other_terms, wrapped, gone)


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    found: dict[str, Any] = {}
    for case in CASES:
        found[case.__name__] = case(rank)
        torch.save(found, folder / f"{rank}.pt")


# --- what came out --------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    started = [
        subprocess.Popen([sys.executable, __file__, json.dumps([rank, str(folder)])], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        told = [process.communicate(timeout=300)[1] for process in started]
        assert all((folder / f"{rank}.pt").exists() for rank in (0, 1)), "\n".join(told)
        found = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
        assert all(len(one) == len(CASES) for one in found), "\n".join(told)
        yield found
    finally:
        for process in started:
            process.kill()
            process.communicate()


def alone(batches: int) -> Tensor:
    model = a_network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    optimizer = PatientOptimizer(sgd, model=model, noise_multiplier=0.0, **TERMS)
    for _ in range(batches):
        batch(model, optimizer, torch.arange(11))
    return weights(model)


@pytest.mark.parametrize(("case", "batches"), [("union", 3), ("within_ddp", 3), ("empty", 1)])
def test_two_ranks_learn_what_one_process_learns_from_all_patients(ranks: list[dict[str, Any]], case: str, batches: int):
    assert torch.equal(ranks[0][case], ranks[1][case])
    assert (ranks[0][case] - alone(batches)).abs().max() < 1e-6
    assert (ranks[0][case] - weights(a_network())).abs().max() > 0.01


def test_two_ranks_share_one_noise_of_the_promised_deviation(ranks: list[dict[str, Any]]):
    assert torch.equal(ranks[0]["noise"], ranks[1]["noise"])
    assert abs(float(ranks[0]["noise"].std()) - 1.0) < 0.02  # 2 x 0.5 on 30,000 numbers; two noises would have 1.41


def test_where_one_rank_stops_all_stop_and_nothing_is_stepped(ranks: list[dict[str, Any]]):
    assert "rank 1 stopped" in ranks[0]["stopped"]
    assert "used 2 times" in ranks[1]["stopped"]


def test_ranks_of_different_terms_refuse_each_other(ranks: list[dict[str, Any]]):
    assert all("the ranks differ" in one["other_terms"] for one in ranks)


def test_a_ddp_wrapper_is_refused_with_the_way_out(ranks: list[dict[str, Any]]):
    assert all("hand in its `.module`" in one["wrapped"] for one in ranks)


def test_a_rank_that_stays_away_does_not_hold_the_others_longer_than_the_timeout(ranks: list[dict[str, Any]]):
    assert ranks[1]["gone"] == "stayed away"
    assert ranks[0]["gone"] not in ("nothing was raised", "too late")


if __name__ == "__main__":
    which, where = json.loads(sys.argv[1])
    process(which, Path(where))
