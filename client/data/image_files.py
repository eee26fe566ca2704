"""Pictures in files: a folder and a CSV of labels, or a folder a class. Nothing outside the folder is ever opened.

A file that cannot be read or does not fit may be passed over, as often as the site's `unreadable` says and no more; what the
labels get wrong is refused at once, before any picture is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from wardround.client.data.annotations import Listed, class_of, read_labels
from wardround.client.data.loaded import Loaded
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import Task
from wardround.common.tasks.images import Box, ImageSchema

LARGEST_FILE = 1 << 28  # bytes
LARGEST_PICTURE = 1 << 26  # pixels; a small file may unfold to more than the memory holds
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM")
_ORIENTATION = 0x0112  # EXIF's tag
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".pgm", ".ppm")

log = logging.getLogger("wardround.site")

Target = int | Path | tuple[Box, ...]  # a class, the file of a mask, or boxes


@dataclass(frozen=True)
class Found:
    """One record to be read: where its picture is, what its label is, whose it is."""

    path: Path
    target: Target
    patient: str | None


def load_images(source: DataSource, task: Task) -> Loaded:
    """Read the pictures that `source.labels` lists; without labels, `source.path/CLASS/...` is a folder a class.

    Files that the labels do not list are left alone. Without a `patient_column` each picture is a patient.

    Raises:
        DataRefused: the files cannot be read or do not fit; the detail names the file.
    """
    schema = image_schema(source, task)
    root = data_folder(source.path)
    listed = _by_folder(source, root, schema) if source.labels is None else read_labels(source, schema)
    found = [Found(inside(root, entry.file, entry.where), target_of(schema, root, entry), entry.patient) for entry in listed]
    twice: dict[Path, str] = {}
    for entry, record in zip(listed, found, strict=True):
        if record.path in twice:  # a/../x.png and x.png are one file
            raise DataRefused("the labels list a file twice", detail=f"{twice[record.path]}; {entry.where}")
        twice[record.path] = entry.where
    return gather(source, schema, found, lambda path: read_picture(path, may_turn=schema.target == "class"))


def image_schema(source: DataSource, task: Task) -> ImageSchema:
    """The task's schema, if it reads pictures; raises `DataRefused`."""
    if not isinstance(task.schema, ImageSchema):
        raise DataRefused(f"task {task.name} does not read pictures", detail=f"loader = '{source.loader}' for {source.path}")
    return task.schema


def data_folder(path: Path) -> Path:
    """The folder without links; raises `DataRefused` if it is none."""
    if not path.is_dir():
        raise DataRefused("the data folder is not there", detail=str(path))
    return path.resolve()


def inside(root: Path, name: str, where: str) -> Path:
    """The file `name` in `root`, links followed; it need not exist.

    Raises:
        DataRefused: the name, or a link on its way, leads out of `root`.
    """
    try:
        path = (root / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a null character, a loop of links
        raise DataRefused("a file's name cannot be followed", detail=f"{where}: {error}") from None
    if not path.is_relative_to(root):
        raise DataRefused("a file lies outside of the data folder", detail=f"{where}: {name!r} is not in {root}")
    return path


def target_of(schema: ImageSchema, root: Path, entry: Listed) -> Target:
    """What the labels say a record's target is; raises `DataRefused`."""
    if schema.target == "class":
        return class_of(schema, entry)
    return inside(root, entry.label, entry.where) if schema.target == "mask" else entry.boxes


def gather(source: DataSource, schema: ImageSchema, found: Sequence[Found], read: Callable[[Path], NDArray[Any]]) -> Loaded:
    """Read, prepare and stack; at most `source.unreadable` files are passed over.

    Raises:
        DataRefused: more files than that cannot be read or do not fit, or none is left.
    """
    image = torch.empty(len(found), schema.channels, schema.side, schema.side)
    label = torch.zeros(len(found), *schema.label_shape, dtype=schema.label_dtype)
    kept: list[Found] = []
    passed: list[str] = []
    for record in found:
        try:
            picture = read(record.path)
            image[len(kept)] = schema.prepare(picture)
            label[len(kept)] = _label(schema, record.target, picture)
        except DataRefused as error:
            passed.append(f"{record.path}: {error}" + (f" ({error.detail})" if error.detail else ""))
            if len(passed) > source.unreadable:
                text = str(error) if not source.unreadable else "more files cannot be read than the site file allows"
                raise DataRefused(text, detail="; ".join(passed[-10:])) from None
            continue
        kept.append(record)
    if passed:
        log.warning("%d files passed over: %s", len(passed), "; ".join(passed[:10]))
    if not kept:
        raise DataRefused("there are no pictures", detail=str(source.path))
    owner = [record.patient for record in kept if record.patient is not None]
    names = owner or [str(number) for number in range(len(kept))]
    return Loaded(schema.encode(image[: len(kept)], label[: len(kept)], names), owner or None)


def read_picture(path: Path, *, may_turn: bool) -> NDArray[Any]:
    """The pixels of one file: (height, width) grey of any depth, or (height, width, 3) of 8 bits; transparency is dropped.

    A picture that its camera marked as turned is turned upright, unless it may not turn because something marks its pixels.

    Raises:
        DataRefused: unreadable, damaged, too large, or more than one picture.
    """
    picture = _opened(path)
    if picture.getexif().get(_ORIENTATION, 1) != 1:
        if not may_turn:
            raise DataRefused("a picture is stored turned, and its mask or boxes may not be")
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("1", "LA", "La"):
        picture = picture.convert("L")
    elif picture.mode not in ("L", "I", "F", "RGB") and not picture.mode.startswith("I;16"):
        picture = picture.convert("RGB")
    return np.array(picture)


def read_mask(path: Path) -> NDArray[Any]:
    """The class numbers of one file: grey values, or the palette's positions; raises `DataRefused`."""
    picture = _opened(path)
    if picture.mode not in ("1", "L", "P", "I") and not picture.mode.startswith("I;16"):
        raise DataRefused("a mask is not one plane of whole numbers", detail=f"it is {picture.mode}")
    return np.array(picture).astype(np.int64)


def _opened(path: Path) -> Image.Image:
    """The file, decoded to the last pixel, closed again."""
    try:
        if not path.is_file():
            raise DataRefused("a listed file is not there")
        if not 0 < path.stat().st_size <= LARGEST_FILE:
            raise DataRefused("a file is empty or too large", detail="wanted 1 byte to 256 MiB")
        with Image.open(path, formats=FORMATS) as picture:  # has only read the head
            if picture.width * picture.height > LARGEST_PICTURE:
                raise DataRefused("a picture is too large", detail=f"{picture.width} x {picture.height} pixels")
            if (frames := getattr(picture, "n_frames", 1)) != 1:
                raise DataRefused("a file holds no single picture", detail=f"{frames} frames")
            picture.load()
            picture.getexif()  # kept by the picture; if it is damaged, here is the place to find out
        return picture
    except DataRefused:
        raise
    except Exception as error:  # damage ends in struct's, zlib's, Pillow's own and other exceptions
        raise DataRefused("a picture cannot be read", detail=str(error)) from None


def _label(schema: ImageSchema, target: Target, picture: NDArray[Any]) -> Tensor:
    if isinstance(target, int):
        return torch.tensor(target)
    size = (picture.shape[0], picture.shape[1])
    if not isinstance(target, Path):
        return schema.prepare_boxes(target, size)
    mask = read_mask(target)
    if mask.shape != size:
        raise DataRefused("a mask and its picture differ in size", detail=f"{target}: {mask.shape} for {size}")
    return schema.prepare_mask(mask)


def _by_folder(source: DataSource, root: Path, schema: ImageSchema) -> list[Listed]:
    if schema.target != "class" or source.patient_column:
        raise DataRefused(
            "the pictures have no labels", detail=f"{root}: masks, boxes and patients want a CSV file in `labels`"
        )
    files = [
        (folder.name, file)
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    ]
    return [Listed(str(file.relative_to(root)), str(file), label=name) for name, file in files]
