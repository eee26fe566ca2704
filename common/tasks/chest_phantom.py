"""Synthetic chest films, which are nobody's: is there a lesion, where is it, and where are the lungs.

The films are drawn by `simulations/phantom.py`. What is learnt here shows that the software learns, nothing about a patient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wardround.common.metrics import BoxScores, MaskScores
from wardround.common.models.detector import decode, detection_loss
from wardround.common.tasks.augment import moved_films
from wardround.common.tasks.base import Task
from wardround.common.tasks.images import ImageSchema
from wardround.common.tasks.networks import one_of

_LESIONS = 3  # of a film at most
_SIDE = 48


def mask_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of a record's pixels, plus one minus its soft Dice coefficient.

    Dice is over all classes but the background (Milletari et al. 2016, https://arxiv.org/abs/1606.04797); where a record has
    nothing to find, one pixel added above and below makes an empty answer the best.

    Args:
        logits: (records, classes, side, side).
        mask: (records, side, side) int64, a class for each pixel.

    Returns:
        One value for each record, (records,).
    """
    pixels = F.cross_entropy(logits, mask, reduction="none").mean((1, 2))
    found = logits.softmax(1)[:, 1:]
    true = torch.stack([mask == number for number in range(1, logits.shape[1])], 1).to(found.dtype)
    dice = (2 * (found * true).sum((2, 3)) + 1) / (found.sum((2, 3)) + true.sum((2, 3)) + 1)
    return pixels + 1 - dice.mean(1)


def mask_scores(logits: Tensor, mask: Tensor) -> MaskScores:
    """The likeliest class of each pixel, beside the truth; shapes as in `mask_loss`."""
    return MaskScores.of(logits.argmax(1).numpy(), mask.numpy(), logits.shape[1])


def box_scores(output: Tensor, boxes: Tensor) -> BoxScores:
    """The likeliest boxes of each record, beside the true ones, (records, most, 4) with a width of 0 where there is none."""
    found = decode(output)
    likely = [(box.double().numpy(), score.double().numpy()) for box, score in zip(found.boxes, found.scores, strict=True)]
    return BoxScores.of(likely, [each[each[:, 2] > 0].double().numpy() for each in boxes])


chest_phantom = Task(
    name="chest-phantom",
    title="A lesion on a synthetic chest film",
    schema=ImageSchema(side=_SIDE, class_names=("clear", "lesion"), normalise="image"),
    build=one_of("ws-cnn", "cnn", "resnet18", "torchvision", channels=1, side=_SIDE, classes=2),
    augment=moved_films,
    metrics=("auroc", "accuracy", "auprc", "balanced_accuracy", "log_loss"),
)

chest_phantom_segmentation = Task(
    name="chest-phantom-segmentation",
    title="Lungs and lesions on a synthetic chest film, pixel by pixel",
    schema=ImageSchema(side=_SIDE, classes=3, class_names=("elsewhere", "lung", "lesion"), normalise="image", target="mask"),
    build=one_of("unet", channels=1, side=_SIDE, classes=3),
    loss=mask_loss,
    judge=mask_scores,
    headline="dice",
    metrics=("dice", "iou"),
)

chest_phantom_detection = Task(
    name="chest-phantom-detection",
    title="A box around each lesion on a synthetic chest film",
    schema=ImageSchema(side=64, classes=0, class_names=("lesion",), normalise="image", target="boxes", most_boxes=_LESIONS),
    build=one_of("detector", channels=1, side=64, classes=1),
    loss=detection_loss,
    judge=box_scores,
    headline="ap50",
    metrics=("ap50",),
)
