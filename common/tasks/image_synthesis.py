"""Chest films of nobody: hospitals train a generator of them together (Radford et al. 2016), 28 x 28 grey, normal or pneumonia.

The generator is what the study is for. It is judged by what its films teach: a small classifier is trained on them alone and
reads the real films of the test patients (Esteban et al. 2017, https://arxiv.org/abs/1706.02633: "train on synthetic, test on
real").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from wardround.common.likeness import frechet, nearest
from wardround.common.models import Architecture
from wardround.common.synthesis import Adversaries, images, taken_for
from wardround.common.tasks.base import Makes, Records, Task, cross_entropy
from wardround.common.tasks.images import ImageSchema
from wardround.common.weights import Weights, digest

SCHEMA = ImageSchema(side=28, class_names=("normal", "pneumonia"), modalities=("CR", "DX"))  # -1 to 1, as the generator's
_NETWORK = Architecture("dcgan", Adversaries)

_FILMS, _SEED = 1024, 20140610  # what a generator is judged by
_EPOCHS, _BATCH, _RATE, _MOMENTUM = 8, 64, 0.02, 0.9
_SHOWN = 8  # of each kind


class Reader(nn.Module):
    """The small classifier.  `image` (batch, 1, 28, 28) -> logits (batch, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(784, 32),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(32, classes)

    def features(self, image: Tensor) -> Tensor:
        """(batch, 1, 28, 28) -> (batch, 32)."""
        found: Tensor = self.layers(image)
        return found

    def forward(self, image: Tensor) -> Tensor:
        """See above."""
        logits: Tensor = self.classifier(self.features(image))
        return logits


def taught(image: Tensor, label: Tensor, classes: int) -> Reader:
    """A classifier trained on these images alone; the same for the same images."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(_SEED)
        reader = Reader(classes)
        learning: list[Tensor] = list(reader.parameters())
        speed = [torch.zeros_like(p) for p in learning]
        for _ in range(_EPOCHS):
            for index in torch.split(torch.randperm(len(image)), _BATCH):
                loss = cross_entropy(reader(image[index]), label[index]).mean()
                torch._foreach_mul_(speed, _MOMENTUM)
                torch._foreach_add_(speed, torch.autograd.grad(loss, learning))
                with torch.no_grad():
                    torch._foreach_add_(learning, speed, alpha=-_RATE)
    return reader.requires_grad_(False)


def _reader(network: nn.Module, weights: Mapping[str, Tensor]) -> tuple[nn.Module, Weights]:
    return _read_by(_Trained(digest(weights), cast(Adversaries, network), weights)), {}


@dataclass(frozen=True)
class _Trained:
    """A network and its weights, told from others by their digest."""

    digest: str
    network: Adversaries = field(compare=False)
    weights: Mapping[str, Tensor] = field(compare=False)


@lru_cache(maxsize=16)  # the same generator is judged on the films of every hospital
def _read_by(trained: _Trained) -> Reader:
    image, kind = images(trained.network, trained.weights, _FILMS, seed=_SEED)
    return taught(image, kind, trained.network.kinds)


def _sheet(network: nn.Module, weights: Mapping[str, Tensor]) -> tuple[Tensor, list[str]]:
    pair = cast(Adversaries, network)
    image, kind = images(pair, weights, _SHOWN * pair.kinds, seed=_SEED)
    order = torch.argsort(kind, stable=True)
    return (image[order] + 1) / 2, [SCHEMA.class_names[k] for k in kind[order].tolist()]


def _compared(network: nn.Module, weights: Mapping[str, Tensor], training: Records, held_out: Records) -> list[str]:
    image, _ = images(cast(Adversaries, network), weights, _FILMS, seed=_SEED)
    films, tests = training.fields["image"], held_out.fields["image"]
    reader = taught(films, training.label, SCHEMA.classes)
    of_made, of_films, of_tests = (reader.features(some) for some in (image, films, tests))
    away, tests_away = (nearest(some, films) / 2 for some in (image, tests))  # values go from -1 to 1
    closer = float((away < tests_away.min()).double().mean())
    return [
        f"How like the made images are to real ones, as wholes: their Frechet distance to the test images is "
        f"{frechet(of_made, of_tests):.3g}, that of the training images {frechet(of_films, of_tests):.3g}, in the "
        f"{of_made.shape[1]} features of a small classifier trained on the real training images. It is no FID: with other "
        "features, figures of two studies cannot be compared.",
        f"Whether a training image was reproduced: a made image is {float(away.median()):.3f} away from its nearest training "
        f"image (median; the smallest of {len(away):,} distances is {float(away.min()):.3f}), a test image "
        f"{float(tests_away.median()):.3f} (smallest {float(tests_away.min()):.3f}). {100 * closer:.1f} % of the made images "
        "are nearer to a training image than any test image is. Distances are root mean square differences of a pixel, of a "
        "range of 1; smooth images are nearer to everything.",
        "These two comparisons looked at the training images without noise, so no epsilon covers their figures. They are made "
        "in a simulation only, and left out together with the baselines.",
    ]


image_synthesis = Task(
    name="image-synthesis",
    title="Synthetic chest films",
    schema=SCHEMA,
    build=lambda options: _NETWORK(options, channels=SCHEMA.channels, side=SCHEMA.side, classes=SCHEMA.classes),
    loss=taken_for,
    learner="adversarial",
    private_part=lambda network: cast(Adversaries, network).critic,
    makes=Makes("generator", reader=_reader, sheet=_sheet, compared=_compared, measured_every=25),
    metrics=("auroc", "accuracy", "balanced_accuracy"),
)
