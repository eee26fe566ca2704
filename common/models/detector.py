"""Boxes around findings, as centres on a heat-map: CenterNet (Zhou et al. 2019, https://arxiv.org/abs/1904.07850).

What the network gives is one tensor, (batch, classes + 4, side / stride, side / stride): logits that a cell holds the centre of
a box of each class; then width and height of that box in cells; then where in the cell its centre lies, x and y from 0 to 1.
Boxes are (..., 4): centre x, centre y, width, height in parts of the image's side; a width of 0 is padding.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wardround.common.models.parts import group_norm, whole
from wardround.common.models.unet import UNet

_STRIDES = {2: 1, 4: 2}  # pixels of a cell, each way, and how often a film is halved to get there
_RARE = -2.19  # first logits of the heat-map: one cell in ten, so that the many empty ones do not drown the rest
_OVERLAP = 0.7  # a box that is off by so little that it overlaps by this is half right


class Detector(nn.Module):
    """`image` (batch, channels, side, side) -> (batch, classes + 4, side / stride, side / stride), see above."""

    def __init__(self, channels: int, classes: int, width: int, depth: int, stride: int, drop: float) -> None:
        super().__init__()
        halvings = pairwise([channels] + [width] * _STRIDES[stride])
        self.stem = nn.Sequential(
            *(layer for a, b in halvings for layer in (nn.Conv2d(a, b, 3, 2, 1), group_norm(b), nn.ReLU()))
        )
        self.body = UNet(width, classes + 4, width, depth, drop)
        assert self.body.head.bias is not None
        nn.init.constant_(self.body.head.bias[:classes], _RARE)

    def forward(self, image: Tensor) -> Tensor:
        """See above."""
        found: Tensor = self.body(self.stem(image))
        return found


def detector(
    *,
    side: int,
    channels: int = 1,
    classes: int = 1,
    width: int = 16,
    depth: int = 3,
    stride: int = 4,
    dropout: float = 0.0,
) -> Detector:
    """A U-Net of `depth` resolutions over cells of `stride` x `stride` pixels.

    122,165 parameters for one channel and one class as it stands. A box should be some four cells wide: of fewer, an error of
    half a cell each way is much of the box.

    Raises:
        ValueError: the stride is neither 2 nor 4, or the side is no multiple of stride * 2 ** (depth - 1).
    """
    whole(side=side, channels=channels, classes=classes, width=width, depth=depth, stride=stride)
    if stride not in _STRIDES:
        raise ValueError(f"stride is {stride}; {' or '.join(map(str, _STRIDES))} is wanted")
    if side % (unit := stride * 2 ** (depth - 1)):
        raise ValueError(f"side is {side}; a multiple of {unit} is wanted with a depth of {depth}")
    return Detector(channels, classes, width, depth, stride, dropout)


class _Aim(NamedTuple):
    """What the network should have said, for (batch, most) boxes."""

    there: Tensor  # (batch, most) bool
    cell: Tensor  # (batch, most) int64, row * columns + column
    size: Tensor  # (batch, most, 2), in cells
    offset: Tensor  # (batch, most, 2), within the cell
    heat: Tensor  # (batch, most, rows, columns), 1 at the centre and less around it


def _aim(boxes: Tensor, rows: int, columns: int) -> _Aim:
    there = boxes[..., 2] > 0
    scale = boxes.new_tensor([columns, rows])
    centre = boxes[..., :2].clamp(0, 1) * scale
    corner = torch.minimum(centre.floor(), scale - 1)
    size = boxes[..., 2:4].clamp(0, 1) * scale
    spread = (2 * _radius(size) + 1) / 6
    x, y = torch.arange(columns, device=boxes.device), torch.arange(rows, device=boxes.device)
    across = (x - corner[..., :1]).square()[..., None, :]
    along = (y - corner[..., 1:]).square()[..., None]
    heat = torch.exp(-(across + along) / (2 * spread.square()[..., None, None])) * there[..., None, None]
    cell = (corner[..., 1] * columns + corner[..., 0]).long()
    return _Aim(there, cell, size, centre - corner, heat)


def _radius(size: Tensor) -> Tensor:
    """How far a box (..., 2) may be off in x and y alike to overlap with itself by `_OVERLAP`.

    (w - r)(h - r) = 2 t / (1 + t) w h, for r; as Law and Deng 2018, https://arxiv.org/abs/1808.01244.
    """
    around, area = size.sum(-1), size.prod(-1)
    root = (around.square() - 4 * area * (1 - _OVERLAP) / (1 + _OVERLAP)).clamp(min=0).sqrt()
    return (around - root) / 2


def detection_loss(output: Tensor, boxes: Tensor) -> Tensor:
    """Focal loss of the heat-map, and L1 of sizes and offsets, over the record's own number of boxes.

    Sizes count by the part of a box they are off, since that is what an overlap sees whatever the resolution; offsets by cells.

    Args:
        output: (batch, classes + 4, rows, columns).
        boxes: (batch, most, 4); where there are several classes (batch, most, 5), the class from 0 on at the end.

    Returns:
        One value for each record, (batch,).

    Raises:
        ValueError: several classes, and boxes that do not say theirs.
    """
    classes, rows, columns = output.shape[1] - 4, *output.shape[2:]
    if boxes.shape[2] != 4 + (classes > 1):
        raise ValueError(f"boxes have {boxes.shape[2]} numbers each; {classes} classes want {4 + (classes > 1)}")
    aim = _aim(boxes, rows, columns)
    kind = boxes[..., 4].clamp(0, classes - 1).long() if classes > 1 else torch.zeros_like(aim.cell)
    of_kind = F.one_hot(kind, classes).to(aim.heat.dtype)  # (batch, most, classes)
    wanted = (aim.heat[:, :, None] * of_kind[..., None, None]).amax(1)
    logits = output[:, :classes]
    right = (1 - logits.sigmoid()).square() * F.logsigmoid(logits)
    wrong = (1 - wanted) ** 4 * logits.sigmoid().square() * F.logsigmoid(-logits)
    focal = -torch.where(wanted == 1, right, wrong).flatten(1).sum(1)
    place = aim.cell[:, None].expand(-1, 4, -1)
    said = output[:, classes:].flatten(2).gather(2, place).mT  # (batch, most, 4)
    off = (said - torch.cat([aim.size, aim.offset], 2)).abs() * aim.there[..., None]
    regression = (off[..., :2] / aim.size.clamp(min=1)).sum((1, 2)) + off[..., 2:].sum((1, 2))
    return (focal + regression) / aim.there.sum(1).clamp(min=1)


class Detections(NamedTuple):
    """The likeliest boxes of each record, best first."""

    boxes: Tensor  # (batch, most, 4)
    scores: Tensor  # (batch, most), 0 to 1
    kind: Tensor  # (batch, most) int64, the class


@torch.no_grad()
def decode(output: Tensor, *, most: int = 20) -> Detections:
    """The `most` highest peaks of the heat-maps, and the boxes they stand for.

    A peak is a cell no lower than its eight neighbours, so no box has to be suppressed by its overlap with another.

    Args:
        output: (batch, classes + 4, rows, columns).
        most: how many boxes to give for each record; those with low scores are for the caller to leave out.
    """
    classes, rows, columns = output.shape[1] - 4, *output.shape[2:]
    heat = output[:, :classes].sigmoid()
    peaks = torch.where(F.max_pool2d(heat, 3, 1, 1) == heat, heat, 0).flatten(1)
    scores, at = peaks.topk(min(most, peaks.shape[1]))
    cell = at % (rows * columns)
    said = output[:, classes:].flatten(2).gather(2, cell[:, None].expand(-1, 4, -1)).mT
    scale = output.new_tensor([columns, rows])
    corner = torch.stack([cell % columns, cell // columns], 2)
    centre = (corner + said[..., 2:].clamp(0, 1)) / scale
    size = said[..., :2].clamp(min=0) / scale
    return Detections(torch.cat([centre, size.clamp(max=1)], 2), scores, at // (rows * columns))
