"""Weights that are nobody's: a small network that was shown synthetic films alone, to start a study of real films from.

    python -m benchmarks.public_weights weights.safetensors
    wardround simulate STUDY.toml --weights weights.safetensors    # network = "ws-cnn", train = "head", "last-block" or "all"

The films are drawn by `simulations/phantom.py` from a fixed seed and read as the task chest-xray reads films, 28 x 28. The
network learns what the drawing knows: whether there is a lesion and how much of one, whose scanner it was, and of each lung its
size, how bright it is and how much its brightness varies.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wardround.common.tasks import TASKS, Records
from wardround.common.weights import trainable
from wardround.simulations.phantom import films

_SITES = ("alder", "birch", "cedar", "dogwood")
_SEED = 1
_DRAWN, _SIDE = 64, 28  # of a film, as drawn and as read
_BATCH, _RATE = 32, 0.003


class Films(NamedTuple):
    """Synthetic films and what is known of them.

    image (films, 1, 28, 28); lesion and site (films,) int64; measured (films, figures), each with mean 0 and deviation 1.
    """

    image: Tensor
    lesion: Tensor
    site: Tensor
    measured: Tensor


def drawn(patients: int) -> Films:
    """The films of `patients` at each of four sites."""
    schema = TASKS["chest-xray"].schema
    found = [films(site, patients, seed=_SEED, side=_DRAWN, prevalence=0.5) for site in _SITES]
    image = torch.stack([schema.prepare(film) for each in found for film in each.image])  # type: ignore[attr-defined]
    lung, lesion = (
        F.adaptive_avg_pool2d(torch.cat([torch.from_numpy(getattr(each, name)).float() for each in found]), _SIDE)
        for name in ("lung", "mask")
    )
    figures = measured(image[:, 0], lung, lesion)
    return Films(
        image,
        torch.cat([torch.from_numpy(each.label) for each in found]),
        torch.cat([torch.full((len(each.label),), number) for number, each in enumerate(found)]),
        (figures - figures.mean(0)) / (figures.std(0) + 1e-6),
    )


def measured(image: Tensor, lung: Tensor, lesion: Tensor) -> Tensor:
    """Of films, all three (films, side, side): size, mean and deviation of each lung, edges in both, size of the lesions."""
    figures = []
    for left in (True, False):
        half = lung.clone()
        half[:, :, _SIDE // 2 :] *= not left
        half[:, :, : _SIDE // 2] *= left
        size = half.sum((1, 2)) + 1e-3
        mean = (image * half).sum((1, 2)) / size
        figures += [size, mean, ((image - mean[:, None, None]).square() * half).sum((1, 2)).div(size).sqrt()]
    down, across = image[:, 1:, 1:] - image[:, :-1, 1:], image[:, 1:, 1:] - image[:, 1:, :-1]
    edges = ((down.square() + across.square()) * lung[:, 1:, 1:]).sum((1, 2)).sqrt()
    return torch.stack([*figures, edges, lesion.sum((1, 2))], 1)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--patients", type=int, default=600, help="at each of four sites")
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(_SEED)
    task, shown = TASKS["chest-xray"], drawn(given.patients)
    model = task.build({"network": "ws-cnn"})
    beside = nn.Linear(model.head.in_features, len(_SITES) + shown.measured.shape[1])  # type: ignore[union-attr, arg-type]
    optimizer = torch.optim.Adam([*model.parameters(), *beside.parameters()], lr=_RATE)
    steps = len(shown.image) // _BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.epochs * steps)
    for epoch in range(given.epochs):
        total = 0.0
        for index in torch.randperm(len(shown.image)).split(_BATCH)[:steps]:
            records = Records({"image": shown.image[index]}, shown.lesion[index], torch.arange(len(index)))
            moved = task.views(records, 1, lambda count: torch.rand(count, dtype=torch.float64)).fields["image"]
            features = model.features(moved).mean((2, 3))  # type: ignore[operator]
            answer, others = model.head(features), beside(features)  # type: ignore[operator]
            loss = F.cross_entropy(answer, shown.lesion[index])
            loss = loss + F.cross_entropy(others[:, : len(_SITES)], shown.site[index]) / 2
            loss = loss + F.mse_loss(others[:, len(_SITES) :], shown.measured[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: loss {total / steps:.3f}", flush=True)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in trainable(model).items()}, given.file)


if __name__ == "__main__":
    main()
