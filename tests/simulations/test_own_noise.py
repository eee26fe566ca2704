"""Every site and every round draws noise of its own: equal hospitals under one plan and one seed never send the same update.

The keys are the operating system's, so nothing here repeats; limits on random figures lie six standard deviations out.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from torch import Tensor

from tests.conftest import repeatable_coins
from wardround.client.app import client_app
from wardround.client.data import open_records
from wardround.client.dp import OsCoins
from wardround.client.hospital import os_coins
from wardround.client.policy import SiteConfig
from wardround.client.training.supervised import private_update
from wardround.common.messages import OrderFacts, UpdateFacts, pack_with_model, unpack_model
from wardround.common.plan import SignedText
from wardround.common.tasks import TASKS
from wardround.common.weights import Shapes, pack, trainable
from wardround.simulations import SITES
from wardround.simulations.grid import LocalGrid

NAMES = ["north", "east", "south", "west"]
ROUNDS = 2
NOISE, CLIP_NORM, PATIENTS = 5.0, 1.0, 300
NEVER = 6.0  # standard deviations

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

Noise = dict[tuple[str, int], Tensor]  # (site, round) -> what its update has beside the gradient, flat


@pytest.fixture
def equal_hospitals(tmp_path: Path) -> Path:
    """A study whose sites have the same records. Everybody is in every step, so their updates differ by noise alone."""
    path = SITES.parent / "data" / "heart_disease" / "processed.cleveland.data"
    source = {"loader": "table", "path": str(path.resolve()), "header": False, "declared_patients": PATIENTS}
    allow = {"tasks": ["heart-disease"], "epsilon_per_study": 10.0, "epsilon_lifetime": 20.0}
    for name in NAMES:
        home = tmp_path / "sites" / name
        home.mkdir(parents=True)
        site = {"site": name, "allow": allow, "data": {"heart-disease": source}, "compute": {"device": "cpu"}}
        (home / "site.toml").write_text(tomli_w.dumps(site))
    plan = {
        "name": "equal", "task": "heart-disease", "rounds": ROUNDS, "seed": 7, "sites": dict.fromkeys(NAMES, PATIENTS),
        "model": {"hidden": [64]},
        "privacy": {
            "epsilon": 10.0, "clip_norm": CLIP_NORM, "sampling_rate": 1.0, "records_per_patient": 1, "noise_multiplier": NOISE,
        },
    }  # fmt: skip
    (tmp_path / "plan.toml").write_text(tomli_w.dumps(plan))
    return tmp_path


def sent(folder: Path, processes: int, make_app: Callable[[], ClientApp] = client_app) -> Noise:
    """The noise in what every site answers to the same model in every round, through the real client."""
    study = SignedText.load(folder / "plan.toml")
    task = TASKS[study.plan.task]
    weights = trainable(task.model(study.plan.model, study.plan.seed))
    files = [folder / "sites" / name / "site.toml" for name in NAMES]
    gradient = flat(noiseless(study, files[0], weights))
    found: Noise = {}
    with LocalGrid(make_app, files, {"plan": study.text}, processes) as grid:
        for round in range(1, ROUNDS + 1):
            order, model = OrderFacts(study.digest, "run", round, 1, ""), pack(weights)
            questions = [Message(pack_with_model(order, model), to, "train", group_id="1") for to in grid.get_node_ids()]
            left = set(grid.push_messages(questions))
            while left:
                (reply,) = grid.pull_messages(left)
                left.remove(reply.metadata.reply_to_message_id)
                assert not reply.has_error(), reply.error
                update = unpack_model(reply.content, Shapes.like(weights))
                found[UpdateFacts.unpack(reply.content).site, round] = flat(update) - gradient
    assert found.keys() == set(itertools.product(NAMES, range(1, ROUNDS + 1)))
    return found


def noiseless(study: SignedText, site: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    plan = study.plan
    task = TASKS[plan.task]
    records, _ = open_records(SiteConfig.load(site).data[plan.task], task)
    return private_update(
        task, task.model(plan.model, plan.seed), weights, records, local=plan.local, privacy=plan.private(),
        noise_multiplier=0.0, declared_patients=PATIENTS, coins=OsCoins(),
    )  # fmt: skip


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def correlations(*noise: Noise) -> list[float]:
    """Of every two vectors among all of `noise`."""
    vectors = [vector for one in noise for vector in one.values()]
    table = torch.corrcoef(torch.stack(vectors))
    return [float(table[i, j]) for i, j in itertools.combinations(range(len(vectors)), 2)]


def limit(noise: Noise) -> float:
    return NEVER / math.sqrt(len(next(iter(noise.values()))))


@pytest.mark.parametrize(
    "processes",
    [1, pytest.param(2, marks=needs_fork), pytest.param(len(NAMES), marks=needs_fork)],
    ids=lambda n: f"{n} processes",
)
def test_no_two_sites_and_no_two_rounds_draw_the_same_noise(equal_hospitals: Path, processes: int):
    noise = sent(equal_hospitals, processes)
    assert max(map(abs, correlations(noise))) < limit(noise)


def test_every_site_draws_the_whole_noise_of_the_plan_in_every_round(equal_hospitals: Path):
    noise = sent(equal_hospitals, 1)
    for vector in noise.values():
        found = float(vector.square().mean().sqrt()) / (NOISE * CLIP_NORM / PATIENTS)
        assert abs(found - 1) < limit(noise) / math.sqrt(2)


@needs_fork
def test_the_same_study_run_twice_draws_other_noise_whatever_is_seeded(equal_hospitals: Path):
    runs = []
    for processes in (1, 2):
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)
        runs.append(sent(equal_hospitals, processes))
        for name in NAMES:  # a ledger would send the answer it has stored
            shutil.rmtree(equal_hospitals / "sites" / name / "state")
    assert max(map(abs, correlations(*runs))) < limit(runs[0])


def test_coins_that_do_repeat_are_noticed_here(equal_hospitals: Path):
    noise = sent(equal_hospitals, 1, lambda: client_app(lambda site, round: repeatable_coins("", 0)))
    assert min(correlations(noise)) > 0.999


@needs_fork
def test_coins_made_before_a_fork_repeat_in_every_process_so_a_round_makes_its_own(equal_hospitals: Path):
    early = OsCoins()
    noise = sent(equal_hospitals, len(NAMES), lambda: client_app(lambda site, round: early))
    first = {site: vector for site, vector in noise.items() if site[1] == 1}
    assert min(correlations(first)) > 0.999
    assert os_coins("north", 1) is not os_coins("north", 1)
