"""The studies that are timed, and the run folder of each: a plan, and one .npz and one site file per hospital."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tomli_w

from wardround.common.plan import two_digits

REAL = Path(__file__).parents[1] / ".." / "shared" / "data" / "pneumonia_mnist_balanced" / "pneumoniamnist.npz"
SEED = 7  # of the first model and of batches without privacy
_RECORDS = 2428  # as many as the real training images
_LIFETIME = 1.5  # what a site allows over all studies, times epsilon: its ledger counts by a looser accountant


@dataclass(frozen=True)
class Privacy:
    """The [privacy] section of a study in which every record is a patient."""

    epsilon: float
    delta: float
    noise_multiplier: float
    sampling_rate: float
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Workload:
    """One study: without privacy in batches of `batch_size`, else with batches drawn by the sampling rate."""

    name: str
    task: str
    sites: int
    rounds: int
    steps: int
    learning_rate: float
    batch_size: int = 0
    privacy: Privacy | None = None
    network: str = "cnn"

    @property
    def title(self) -> str:
        """What is trained, in one line."""
        private = self.privacy
        batch = f"drawn at {private.sampling_rate:g}, noise {private.noise_multiplier:g}" if private else f"{self.batch_size}"
        return f"{self.network}, {self.sites} sites x {self.steps} steps x batch {batch}, {self.rounds} rounds"

    def plan(self, declared: dict[str, int]) -> str:
        """The study file for sites with so many declared patients."""
        local = {"steps": self.steps, "learning_rate": self.learning_rate}
        plan = {"name": self.name.lower(), "task": self.task, "rounds": self.rounds, "seed": SEED, "sites": declared}
        plan["model"] = {"network": self.network}
        if self.privacy is None:
            plan["local"] = {**local, "batch_size": self.batch_size}
        else:
            plan |= {"local": local, "privacy": {**asdict(self.privacy), "records_per_patient": 1}}
        return tomli_w.dumps(plan)


WORKLOADS = {
    work.name: work
    for work in (
        Workload("W1", "chest-xray", sites=10, rounds=20, steps=5, batch_size=32, learning_rate=0.05),
        Workload("W2", "chest-xray", sites=100, rounds=10, steps=1, batch_size=24, learning_rate=0.15),
        Workload(
            "W3",
            "chest-xray",
            sites=10,
            rounds=20,
            steps=5,
            learning_rate=0.25,
            privacy=Privacy(epsilon=7.6, delta=1e-4, noise_multiplier=1.0, sampling_rate=1 / 8),
        ),
        Workload("W4", "chest-xray", sites=10, rounds=5, steps=1, batch_size=2, learning_rate=3e-4, network="resnet18"),
    )
}


def images() -> tuple[np.ndarray, np.ndarray, str]:
    """Images (n, 1, 28, 28), labels (n,) and where they are from; random ones where the real ones are not at hand."""
    if REAL.is_file():
        with np.load(REAL) as archive:
            return archive["train_images"][:, None], archive["train_labels"].reshape(-1), "PneumoniaMNIST, balanced"
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (_RECORDS, 1, 28, 28), dtype=np.uint8)
    return image, random.integers(0, 2, _RECORDS), "random images (the real ones are not at hand)"


def test_images() -> tuple[np.ndarray, np.ndarray] | None:
    """The real test images and labels, as `images`; None where they are not at hand."""
    if not REAL.is_file():
        return None
    with np.load(REAL) as archive:
        return archive["test_images"][:, None], archive["test_labels"].reshape(-1)


def prepare(work: Workload, folder: Path) -> str:
    """Write the run folder of `work`; returns where the images are from."""
    image, label, origin = images()
    names = [f"site-{number:03d}" for number in range(work.sites)]
    parts = np.array_split(np.random.default_rng(0).permutation(len(label)), work.sites)
    declared = {name: two_digits(len(part)) for name, part in zip(names, parts, strict=True)}
    for name, part in zip(names, parts, strict=True):
        home = folder / "sites" / name
        home.mkdir(parents=True)
        np.savez(home / "records.npz", image=image[part], label=label[part])
        source = {"loader": "arrays", "path": "records.npz", "declared_patients": declared[name]}
        site = {
            "site": name,
            "allow": {"tasks": [work.task], "min_sites": 2, "min_patients": 1, **_allowed(work)},
            "data": {work.task: source},
            "compute": {"device": "cpu"},
        }
        (home / "site.toml").write_text(tomli_w.dumps(site))
    (folder / "plan.toml").write_text(work.plan(declared))
    return origin


def _allowed(work: Workload) -> dict[str, bool | float]:
    if work.privacy is None:
        return {"without_privacy": True}
    epsilon = work.privacy.epsilon
    return {"epsilon_per_study": epsilon, "epsilon_lifetime": _LIFETIME * epsilon, "delta": work.privacy.delta}
