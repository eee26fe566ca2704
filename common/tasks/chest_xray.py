"""Pneumonia on a chest film, 28 x 28 grey, as in MedMNIST's PneumoniaMNIST (Yang et al. 2023)."""

from __future__ import annotations

from wardround.common.tasks.augment import moved_films
from wardround.common.tasks.base import Task
from wardround.common.tasks.images import ImageSchema
from wardround.common.tasks.networks import one_of

SCHEMA = ImageSchema(side=28, class_names=("normal", "pneumonia"), normalise="image", modalities=("CR", "DX"))

chest_xray = Task(
    name="chest-xray",
    title="Pneumonia on a chest film",
    schema=SCHEMA,
    build=one_of("cnn", "ws-cnn", "resnet18", "torchvision", channels=1, side=28, classes=2),
    augment=moved_films,
    metrics=("auroc", "accuracy", "auprc", "balanced_accuracy", "log_loss"),
)
