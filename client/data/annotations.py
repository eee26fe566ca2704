"""What the labels of pictures say: a CSV file with one line a picture or a box, or a folder of VOC files.

Only texts are read here; no picture is opened. Whatever is doubtful (a picture listed twice, no patient where there should be
one) is refused, because each of it would change how much one patient weighs.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wardround.client.data.lines import owners, read_columns
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks.images import Box, ImageSchema

LARGEST_VOC = 1 << 20  # bytes
CORNERS = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class Listed:
    """One record, as the labels tell of it.

    Attributes:
        file: as the labels write it.
        where: the place in the labels, for a refusal's detail.
        label: the class, or the file of the mask.
        boxes: in pixels, where the task's target is boxes.
        patient: the patient's id, where a column says so.
    """

    file: str
    where: str
    label: str = ""
    boxes: tuple[Box, ...] = ()
    patient: str | None = None


def read_labels(source: DataSource, schema: ImageSchema) -> list[Listed]:
    """What `source.labels` says, each file once, in order of first appearance.

    Raises:
        DataRefused: there are no labels, they cannot be read, or they contradict themselves.
    """
    if source.labels is None:
        raise DataRefused("the pictures have no labels", detail=f"{source.path}: set `labels` to a CSV file")
    if source.labels.is_dir() and schema.target == "boxes":
        return _voc_folder(source, source.labels, schema.class_names)
    names = [source.file_column, *(CORNERS if schema.target == "boxes" else [source.label_column])]
    labels = source.model_copy(update={"path": source.labels, "header": True})
    columns = read_columns(labels, names)
    patients = owners(labels, columns)
    listed: dict[str, Listed] = {}
    for number, (line, file) in enumerate(columns[source.file_column]):
        where = f"{source.labels}, line {line}"
        entry = Listed(file, where, patient=patients[number] if patients else None)
        cells = [columns[name][number][1] for name in names[1:]]
        if not file:
            raise DataRefused("a line of the labels names no file", detail=where)
        if schema.target == "boxes":
            found = listed.setdefault(file, entry)
            if found.patient != entry.patient:
                raise DataRefused("a picture belongs to two patients", detail=f"{found.where}; {where}")
            listed[file] = replace(found, boxes=found.boxes + _corners(cells, where))
            continue
        if file in listed:
            raise DataRefused("the labels list a file twice", detail=f"{listed[file].where}; {where}")
        if not cells[0]:
            raise DataRefused("a record has no label", detail=f"{where}, column {source.label_column}")
        listed[file] = replace(entry, label=cells[0])
    return list(listed.values())


def class_of(schema: ImageSchema, listed: Listed) -> int:
    """The number of the class that the labels name.

    Raises:
        DataRefused: the task has no such class.
    """
    number = schema.class_of(listed.label)
    if number is None:
        wanted = ", ".join(schema.class_names) or f"0 to {schema.classes - 1}"
        raise DataRefused("a label is not one of the task's", detail=f"{listed.where}: {listed.label!r}; wanted {wanted}")
    return number


def read_voc(text: str, where: str, names: Sequence[str] = ()) -> Listed:
    """One VOC annotation (Everingham et al. 2010, https://doi.org/10.1007/s11263-009-0275-4).

    Its corners count pixels from 1 and include the last one; here they become edges, so 1..10 is 0 to 10. Tools that count
    from 0 are met by reading 0 as the edge.

    Raises:
        DataRefused: not such a file, or a box of something that is not among `names` (where there are any).
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # nobody's annotation needs them; a few lines of them can fill the memory
        raise DataRefused("a VOC file defines entities", detail=where)
    try:
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise DataRefused("a VOC file cannot be read", detail=f"{where}: {error}") from None
    file = (root.findtext("filename") or "").strip()
    if root.tag != "annotation" or not file:
        raise DataRefused("a VOC file names no picture", detail=where)
    boxes = []
    for thing in root.findall("object"):
        name = (thing.findtext("name") or "").strip()
        if names and name not in names:
            raise DataRefused("a box is of something the task does not have", detail=f"{where}: {name!r}")
        cells = [(thing.findtext(f"bndbox/{key}") or "").strip() for key in ("xmin", "ymin", "xmax", "ymax")]
        for x0, y0, x1, y1 in _corners(cells, where, may_be_empty=False):
            boxes.append((max(x0 - 1, 0.0), max(y0 - 1, 0.0), x1, y1))
    return Listed(file, where, boxes=tuple(boxes))


def _voc_folder(source: DataSource, folder: Path, names: Sequence[str]) -> list[Listed]:
    if source.patient_column:
        raise DataRefused("VOC files name no patients", detail=f"{folder}: patient_column wants boxes in a CSV file")
    listed: dict[str, Listed] = {}
    for file in sorted(folder.glob("*.xml")):
        try:
            if file.stat().st_size > LARGEST_VOC:
                raise DataRefused("a VOC file is too large", detail=f"{file} is larger than 1 MiB")
            found = read_voc(file.read_text(encoding="utf-8-sig"), str(file), names)
        except (OSError, UnicodeDecodeError) as error:
            raise DataRefused("a VOC file cannot be read", detail=f"{file}: {error}") from None
        if found.file in listed:
            raise DataRefused("the labels list a file twice", detail=f"{listed[found.file].where}; {found.where}")
        listed[found.file] = found
    if not listed:
        raise DataRefused("the labels list no files", detail=f"{folder} has no VOC files (*.xml)")
    return list(listed.values())


def _corners(cells: Sequence[str], where: str, *, may_be_empty: bool = True) -> tuple[Box, ...]:
    """One box, or none where all four are empty: a picture without anything to find."""
    if may_be_empty and not any(cells):
        return ()
    try:
        x0, y0, x1, y1 = (float(cell) for cell in cells)
    except ValueError:
        raise DataRefused("a box is not four numbers", detail=f"{where}: {', '.join(cells)}") from None
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise DataRefused("a box is not four numbers", detail=f"{where}: {', '.join(cells)}")
    return ((x0, y0, x1, y1),)
