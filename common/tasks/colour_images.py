"""What a small colour picture shows, one of ten classes: any set of 32 x 32 pictures in CIFAR's binary form or in folders."""

from __future__ import annotations

from wardround.common.tasks.base import Task
from wardround.common.tasks.images import ImageSchema
from wardround.common.tasks.networks import one_of

_CLASSES = 10

colour_images = Task(
    name="colour-images",
    title="One of ten things on a small colour picture",
    schema=ImageSchema(side=32, channels=3, classes=_CLASSES),
    build=one_of("three-conv-cnn", "two-conv-cnn", "ws-cnn", "resnet18", "torchvision", channels=3, side=32, classes=_CLASSES),
    headline="accuracy",
    metrics=("accuracy", "balanced_accuracy", "auroc", "log_loss"),
)
