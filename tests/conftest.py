"""What every test may lean on: a small study, hospitals on disk, coins that repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wardround.client.dp import Coins, SeededCoins
from wardround.simulations import STUDIES
from wardround.simulations.scenario import Changes, Scenario

torch.set_num_threads(1)


def repeatable_coins(site: str, round: int) -> Coins:
    """Coins that are the same in every run: for comparing bits, never for patients."""
    return SeededCoins(int.from_bytes(hashlib.sha256(f"{site}/{round}".encode()).digest()[:7], "big"))


@pytest.fixture
def coins_for() -> Callable[[str, int], Coins]:
    """`repeatable_coins`, to hand to `simulate` or `client_app`."""
    return repeatable_coins


@pytest.fixture
def study_file() -> Path:
    """The shipped heart-disease study."""
    return STUDIES / "heart-disease.toml"


@pytest.fixture
def scenario(tmp_path: Path, study_file: Path) -> Callable[..., Scenario]:
    """Prepares run folders: `scenario(rounds=3)`, `scenario("other", without_privacy=True)`."""

    def prepare(name: str = "run", **changes: object) -> Scenario:
        return Scenario.prepare(study_file, tmp_path / name, Changes(**changes))  # type: ignore[arg-type]

    return prepare


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip with the reason where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
