"""Pneumonia on a small chest film: 28 x 28 grey images, as in MedMNIST's PneumoniaMNIST (Yang et al. 2023)."""

from __future__ import annotations

from torch.nn import functional as F

from wardround.common.models import MODELS
from wardround.common.tasks.base import ArraySchema, Task

_TITLE = "Pneumonia on a small chest film"
_SCHEMA = ArraySchema({"image": (1, 28, 28)}, classes=2, low=0, high=255, scale=255)

chest_film = Task(
    name="chest-film",
    title=_TITLE,
    schema=_SCHEMA,
    build=lambda options: MODELS["cnn"](options, channels=1, side=28, classes=2),
    loss=lambda logits, label: F.cross_entropy(logits, label, reduction="none"),
)

chest_film_resnet = Task(
    name="chest-film-resnet",
    title=_TITLE + ", ResNet-18",
    schema=_SCHEMA,
    build=lambda options: MODELS["resnet18"](options, channels=1, classes=2),
    loss=lambda logits, label: F.cross_entropy(logits, label, reduction="none"),
)
