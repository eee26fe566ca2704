"""Attributions in the words of the task: columns, variables, letters, words, pixels."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from wardround.client.interpret.attributions import Attribution, kind_of
from wardround.common.tasks import Records, Task
from wardround.common.tasks.sequences import SequenceSchema
from wardround.common.tasks.series import SeriesSchema
from wardround.common.tasks.table import Column, TableSchema

Floats = NDArray[np.float64]

STRONGEST = 8  # lines of a ranking


@dataclass(frozen=True)
class Part:
    """One thing that speaks for (> 0) or against (< 0) the answer: what it is, what was found, how much."""

    name: str
    found: str
    weight: float
    cells: list[float] = field(default_factory=list)  # of a row of a grid, one by one


@dataclass(frozen=True)
class Picture:
    """A PNG picture as the text of a data: address, and the numbers it was drawn from."""

    title: str
    address: str
    numbers: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """How one field of one record is shown.

    Attributes:
        name: of the field.
        kind: "table", "tokens", "series", "signal" or "picture".
        parts: in the order of the record; their weights sum to what the field contributes.
        columns: of a grid, what each column is.
        curve: of a signal, its values, one row a channel.
        pictures: of a picture, itself and its maps.
        note: what has to be said about this field alone.
    """

    name: str
    kind: str
    parts: list[Part] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    note: str = ""

    @property
    def strongest(self) -> list[Part]:
        """The heaviest parts, first the heaviest."""
        return sorted((p for p in self.parts if p.weight), key=lambda p: -abs(p.weight))[:STRONGEST]

    @property
    def most(self) -> float:
        """The largest weight of a part, without its sign; 1 if all are 0."""
        return max((abs(p.weight) for p in self.parts), default=0.0) or 1.0

    @property
    def most_of_cells(self) -> float:
        """The largest weight of a cell, without its sign; 1 if all are 0."""
        return max((abs(cell) for p in self.parts for cell in p.cells), default=0.0) or 1.0


def views(task: Task, record: Records, found: Attribution, words: Sequence[str] | None = None) -> list[View]:
    """Each field of one record; `words` are those of its tokens, where they are known."""
    shown = []
    for name, tensor in record.fields.items():
        kind = kind_of(task, name, tensor)
        if kind == "picture":
            shown.append(_picture(name, tensor[0], found))
            continue
        weight: Floats = found.integrated[name].numpy()
        values: NDArray[np.generic] = tensor[0].numpy()
        if kind == "tokens":
            shown.append(_tokens(task, name, values.astype(np.int64), weight, words))
        elif kind == "line":
            shown.append(_table(task, name, values.astype(np.float64), weight))
        elif isinstance(task.schema, SeriesSchema):
            shown.append(_series(task.schema, name, weight))
        else:
            shown.append(_signal(name, values.astype(np.float64), weight))
    return shown


def _table(task: Task, name: str, values: Floats, weight: Floats) -> View:
    schema = task.schema
    columns = schema.columns if isinstance(schema, TableSchema) else getattr(schema, "static", ())
    scale = schema.scale if isinstance(schema, TableSchema) else 1.0
    if sum(column.width for column in columns) != len(values):
        parts = [Part(f"entry {n}", f"{v:.4g}", float(w)) for n, (v, w) in enumerate(zip(values, weight, strict=True), start=1)]
        return View(name, "table", parts)
    parts, at = [], 0
    for column in columns:
        entries = slice(at, at + column.width)
        told = f"{column.name}: {column.meaning}"
        parts.append(Part(told, reading(column, values[entries] * scale), float(weight[entries].sum())))
        at += column.width
    note = "" if all(not c.may_be_missing for c in columns) else "That a value was not measured counts with its column."
    return View(name, "table", parts, note=note)


def reading(column: Column, entries: Floats) -> str:
    """The value that became `entries` (width,), as far as they still say it.

    >>> reading(Column("age", "years", centre=50, scale=10), np.array([1.5, 0.0]))
    '65'
    >>> reading(Column("age", "years", centre=50, scale=10), np.array([0.0, 1.0]))
    'not measured'
    """
    if column.may_be_missing and entries[1] > 0.5:
        return "not measured"
    if column.yes:
        *first, last = (f"{value:g}" for value in (column.yes if entries[0] > 0 else column.no))
        return f"{', '.join(first)} or {last}" if first else last
    beyond = "" if abs(entries[0]) < 3 - 1e-6 else "at least " if entries[0] > 0 else "at most "
    return f"{beyond}{entries[0] * column.scale + column.centre:.4g}"


def _series(schema: SeriesSchema, name: str, weight: Floats) -> View:
    variables = len(schema.variables)
    cells = (weight[:, :variables] + weight[:, variables:]).T  # value and "was measured" belong together
    parts = [
        Part(f"{variable.name}: {variable.meaning}", "", float(row.sum()), row.tolist())
        for variable, row in zip(schema.variables, cells, strict=True)
    ]
    columns = [f"hour {step * schema.step}" for step in range(schema.steps)]
    return View(name, "series", parts, columns, note="That a value was measured, or not, counts with its variable.")


def _signal(name: str, values: Floats, weight: Floats) -> View:
    parts = [
        Part(f"channel {channel}, moment {moment + 1}", f"{values[channel - 1, moment]:.4g}", float(w))
        for channel, row in enumerate(weight, start=1)
        for moment, w in enumerate(row)
    ]
    return View(name, "signal", parts, curve=values.tolist())


def _tokens(task: Task, name: str, codes: NDArray[np.int64], weight: Floats, words: Sequence[str] | None) -> View:
    schema, note = task.schema, ""
    if isinstance(schema, SequenceSchema):
        letters = ["·", *schema.alphabet, "?"]
        texts = [letters[code] if code < len(letters) else "?" for code in codes]
        note = f"? is a letter that was not certain: one of {schema.unknown}." if "?" in texts else ""
    elif words:
        texts = [*words, *["·"] * (len(codes) - len(words))]
        note = "Words that share a number are one word to the network."
    else:
        texts = ["·" if code == 0 else f"#{code}" for code in codes]
        note = "These records hold the numbers of words (a hash of each) and not the words, so the numbers are shown."
    parts = [
        Part(text, f"place {place}", float(w))
        for place, (text, code, w) in enumerate(zip(texts, codes, weight, strict=True), start=1)
        if code or w
    ]
    return View(name, "tokens", parts, note=note)


def _picture(name: str, image: Tensor, found: Attribution) -> View:
    plain = _colours(image)
    pictures = [Picture("the picture", _png(plain))]
    if name in found.grad_cam:
        cam = found.grad_cam[name]
        smooth = F.interpolate(cam[None, None], size=image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
        pictures.append(Picture(f"Grad-CAM at {found.layer[name]}", _png(_over(plain, smooth.numpy())), cam.tolist()))
    saliency = found.saliency[name]
    pictures.append(Picture("saliency", _png(_over(plain, saliency.numpy())), saliency.tolist()))
    missing = name not in found.grad_cam
    return View(name, "picture", pictures=pictures, note="Grad-CAM needs a convolution that gives a map." if missing else "")


def _colours(image: Tensor) -> Floats:
    """(channels, rows, columns) -> (rows, columns, 3) in [0, 1], from its darkest to its brightest value."""
    planes = image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    low, high = float(planes.min()), float(planes.max())
    shown: Floats = ((planes - low) / ((high - low) or 1.0)).permute(1, 2, 0).double().numpy()
    return shown


def _over(plain: Floats, heat: Floats) -> Floats:
    """A map over a picture without its colours: yellow where the map is highest, the picture alone where it is 0."""
    import matplotlib as mpl  # takes longer to import than a small record to explain

    share = np.maximum(heat, 0) / (heat.max() if heat.max() > 0 else 1.0)
    grey = plain.mean(2, keepdims=True) * 0.8
    blended: Floats = grey * (1 - 0.7 * share[..., None]) + mpl.colormaps["inferno"](share)[..., :3] * 0.7 * share[..., None]
    return blended


def _png(colours: Floats) -> str:
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, np.clip(colours, 0, 1), format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
