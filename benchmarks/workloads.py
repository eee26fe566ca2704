"""The studies that are timed, and the run folder of each: a plan, and one .npz and one site file per hospital."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tomli_w

from wardround.common.plan import two_digits

REAL = Path(__file__).parents[1] / ".." / "shared" / "data" / "pneumonia_mnist_balanced" / "pneumoniamnist.npz"
_RECORDS = 2428  # as many as the real training images


@dataclass(frozen=True)
class Workload:
    """One study without privacy."""

    name: str
    task: str
    sites: int
    rounds: int
    steps: int
    batch_size: int
    learning_rate: float

    @property
    def title(self) -> str:
        """What is trained, in one line."""
        return f"{self.task}, {self.sites} sites x {self.steps} steps x batch {self.batch_size}, {self.rounds} rounds"


WORKLOADS = {
    work.name: work
    for work in (
        Workload("W1", "chest-film", sites=10, rounds=20, steps=5, batch_size=32, learning_rate=0.05),
        Workload("W2", "chest-film", sites=100, rounds=10, steps=1, batch_size=24, learning_rate=0.15),
        Workload("W4", "chest-film-resnet", sites=10, rounds=5, steps=1, batch_size=2, learning_rate=3e-4),
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
            "allow": {"tasks": [work.task], "without_privacy": True, "min_sites": 2, "min_patients": 1},
            "data": {work.task: source},
            "compute": {"device": "cpu"},
        }
        (home / "site.toml").write_text(tomli_w.dumps(site))
    plan = {
        "name": work.name.lower(),
        "task": work.task,
        "rounds": work.rounds,
        "seed": 7,
        "sites": declared,
        "local": {"steps": work.steps, "batch_size": work.batch_size, "learning_rate": work.learning_rate},
    }
    (folder / "plan.toml").write_text(tomli_w.dumps(plan))
    return origin
