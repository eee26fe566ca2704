"""Images: how a picture of any size becomes a record, and how masks and boxes follow the same geometry.

Nothing here looks at more than one picture: constants are public, and the only statistic is a picture's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from wardround.common.errors import DataRefused
from wardround.common.tasks.base import Records, blank, numbered, unfit

_LUMA = torch.tensor([0.299, 0.587, 0.114])  # of red, green, blue: ITU-R BT.601
_SMALLEST = 2  # pixels a side; less is no picture

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the file


@dataclass(frozen=True)
class ImageSchema:
    """One picture a record, in one field `image`, (channels, side, side) float32.

    Attributes:
        classes: labels, and the values of a mask, are 0 .. classes - 1; 0 where the target is boxes.
        class_names: how a file may write a class instead of its number, in order; may be left empty. Of boxes: the things
            that are boxed.
        low, high: the range of a picture's values; a value outside is a mistake of depth or unit.
        centre, scale: public constants; values become (value - centre) / scale.
        normalise: "constants", or "image" for the picture's own mean and standard deviation.
        crop: "square" cuts the largest centred square before resizing, "whole" resizes without regard to the shape.
        window: centre and width in modality units (Hounsfield of a CT); None takes the window of the DICOM file.
        modalities: DICOM modalities that may be read; empty for any.
        target: the label is a class, () int64; a mask, (side, side) int64; or boxes, (most_boxes, 4) float32, each
            (centre x, centre y, width, height) as shares of the side, and all zeros where there is no further box.
    """

    side: int
    channels: Literal[1, 3] = 1
    classes: int = 2
    class_names: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 255.0
    centre: float = 127.5
    scale: float = 127.5
    normalise: Literal["constants", "image"] = "constants"
    crop: Literal["square", "whole"] = "square"
    window: tuple[float, float] | None = None
    modalities: tuple[str, ...] = ()
    target: Literal["class", "mask", "boxes"] = "class"
    most_boxes: int = 16

    def __post_init__(self) -> None:
        if (self.target == "boxes") != (self.classes == 0):
            raise ValueError("boxes have no classes, everything else has")
        if self.classes and self.class_names and len(self.class_names) != self.classes:
            raise ValueError(f"{len(self.class_names)} names for {self.classes} classes")

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of one record's label."""
        return {"class": (), "mask": (self.side, self.side), "boxes": (self.most_boxes, 4)}[self.target]

    @property
    def label_dtype(self) -> torch.dtype:
        """Type of a label's entries."""
        return torch.float32 if self.target == "boxes" else torch.int64

    def blank(self, count: int) -> Records:
        """See `Schema.blank`."""
        return blank(count, self.label_shape, self.label_dtype, image=(self.channels, self.side, self.side))

    def prepare(self, picture: NDArray[Any]) -> Tensor:
        """(height, width) grey or (height, width, 3) colour, low .. high -> (channels, side, side) float32.

        Raises:
            DataRefused: not a picture of numbers from low to high.
        """
        size = _size(picture)
        values = torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32))
        if not bool(((values >= self.low) & (values <= self.high)).all()):
            raise DataRefused(
                "a picture's values are out of the task's range", detail=f"not all in {self.low:g} to {self.high:g}"
            )
        values = values[:, :, None] if values.ndim == 2 else values
        if self.channels == 1 and values.shape[2] == 3:
            values = (values @ _LUMA)[:, :, None]
        top, left, height, width = self._cut(size)
        planes = values[top : top + height, left : left + width].permute(2, 0, 1)[None]
        # antialiased: else a fine pattern would turn into a coarse one that is not there
        planes = F.interpolate(planes, size=(self.side, self.side), mode="bilinear", antialias=True)[0]
        planes = planes.expand(self.channels, self.side, self.side)
        if self.normalise == "constants":
            return (planes - self.centre) / self.scale
        return (planes - planes.mean()) / planes.std(correction=0).clamp(min=1e-4 * (self.high - self.low))

    def windowed(self, values: NDArray[Any], centre: float, width: float) -> NDArray[np.float32]:
        """Modality units -> low .. high: centre - width / 2 becomes low, centre + width / 2 high, what lies beyond is cut.

        The linear function of DICOM PS3.3 C.11.2.1.3.2 (LINEAR_EXACT).
        """
        share = np.clip((values.astype(np.float64) - centre) / width + 0.5, 0, 1)
        return np.asarray(self.low + share * (self.high - self.low), dtype=np.float32)

    def prepare_mask(self, mask: NDArray[Any]) -> Tensor:
        """(height, width) of class numbers -> (side, side) int64, cut and resized as the picture, by nearest pixel.

        Where there are two classes, 255 also means 1.

        Raises:
            DataRefused: not a plane of class numbers.
        """
        size = _size(mask)
        if mask.ndim != 2 or mask.dtype.kind not in "bui":
            raise DataRefused("a mask is not one plane of whole numbers")
        if self.classes == 2:
            mask = np.where(mask == 255, 1, mask)
        if not ((mask >= 0) & (mask < self.classes)).all():
            raise DataRefused("a mask holds a class the task does not have", detail=f"wanted 0 to {self.classes - 1}")
        top, left, height, width = self._cut(size)
        plane = torch.from_numpy(np.ascontiguousarray(mask[top : top + height, left : left + width], dtype=np.float32))
        return F.interpolate(plane[None, None], size=(self.side, self.side), mode="nearest-exact")[0, 0].long()

    def prepare_boxes(self, boxes: Sequence[Box], size: tuple[int, int]) -> Tensor:
        """Boxes in pixels of a picture of `size` (height, width) -> (most_boxes, 4) float32; what the cut leaves of them.

        Raises:
            DataRefused: a box without area or outside the picture, or more boxes than the task has room for.
        """
        top, left, height, width = self._cut(size)
        found = []
        for x0, y0, x1, y1 in boxes:
            if not (0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]):
                raise DataRefused("a box does not lie in its picture", detail=f"{x0:g}, {y0:g}, {x1:g}, {y1:g} in {size}")
            x0, x1 = (min(max((x - left) / width, 0.0), 1.0) for x in (x0, x1))
            y0, y1 = (min(max((y - top) / height, 0.0), 1.0) for y in (y0, y1))
            if x0 < x1 and y0 < y1:
                found.append(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
        if len(found) > self.most_boxes:
            raise DataRefused("a picture has more boxes than the task has room for", detail=f"more than {self.most_boxes}")
        padded = torch.zeros(self.most_boxes, 4)
        padded[: len(found)] = torch.tensor(found).reshape(-1, 4)
        return padded

    def class_of(self, text: str) -> int | None:
        """The number of a class written by name or number; None if there is no such class."""
        if text in self.class_names:
            return self.class_names.index(text)
        numbers = {str(number): number for number in range(self.classes)}
        return numbers.get(text.removesuffix(".0"))

    def encode_arrays(self, image: NDArray[Any], label: NDArray[Any], patient: Sequence[str]) -> Records:
        """Pictures (records, height, width[, 3]), or grey ones with their one channel in front, with a class each -> `Records`.

        Raises:
            DataRefused: they do not fit.
        """
        if image.ndim == 4 and image.shape[1] == 1:
            image = image[:, 0]
        numeric = label.dtype.kind in "biuf" and label.shape == (len(patient),)
        if self.target != "class" or not numeric or not np.isin(label, np.arange(self.classes)).all():
            raise DataRefused(f"the labels are not one number from 0 to {self.classes - 1} for each record")
        if image.ndim < 3 or len(image) != len(patient):
            raise DataRefused("field image is not one picture for each record")
        prepared = torch.stack([self.prepare(picture) for picture in image])
        return self.encode(prepared, torch.from_numpy(label.astype(np.int64)), patient)

    def encode(self, image: Tensor, label: Tensor, patient: Sequence[str]) -> Records:
        """Prepared pictures, their labels and a patient id each -> `Records`; raises `DataRefused`."""
        count = len(patient)
        if image.shape != (count, self.channels, self.side, self.side) or image.dtype != torch.float32:
            raise DataRefused("field image is not one prepared picture for each record")
        if label.shape != (count, *self.label_shape) or label.dtype != self.label_dtype:
            raise DataRefused(f"the labels are not one {self.target} for each record")
        unreal = ~image.flatten(1).isfinite().all(1)
        if bool(unreal.any()):
            raise unfit("field image", unreal.numpy(), "hold something that is no number")
        most = self.classes - 1 if self.classes else 1
        wrong = ~((label >= 0) & (label <= most)).reshape(count, -1).all(1)
        if bool(wrong.any()):
            raise unfit(f"target {self.target}", wrong.numpy(), f"are not from 0 to {most}")
        return Records({"image": image}, label, numbered(patient))

    def _cut(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width of what is kept of a picture of `size` (height, width)."""
        height, width = size
        if self.crop == "whole":
            return 0, 0, height, width
        side = min(size)
        return (height - side) // 2, (width - side) // 2, side, side


def _size(picture: NDArray[Any]) -> tuple[int, int]:
    plane = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)
    if not plane or picture.dtype.kind not in "buif" or min(picture.shape[:2]) < _SMALLEST:
        raise DataRefused("a file holds no single picture", detail=f"shape {picture.shape}, numbers of kind {picture.dtype}")
    return int(picture.shape[0]), int(picture.shape[1])
