"""The sheet of made pictures as one drawing of our own: the page has no place for files of others, so pixels become lines."""

from __future__ import annotations

import base64

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from wardround.server.report.schema import Sheet

_GAP = 2  # pixels between two pictures
_GREYS, _COLOURS = 32, 8  # levels of a channel; more would be larger and not be seen


def drawn(sheet: Sheet) -> Markup:
    """An inline SVG: a row of pictures for each name, in order."""
    size, (rows, columns) = sheet.side + _GAP, (len(set(sheet.names)), max(sheet.names.count(name) for name in sheet.names))
    canvas = np.full((rows * size - _GAP, columns * size - _GAP), -1, dtype=np.int64)  # the colour of each pixel; -1 is none
    colours = _levels(sheet)
    place = dict.fromkeys(sheet.names, 0)
    for name, picture in zip(sheet.names, colours, strict=True):
        top, left = list(place).index(name) * size, place[name] * size
        canvas[top : top + sheet.side, left : left + sheet.side] = picture
        place[name] += 1
    levels = _GREYS if sheet.channels == 1 else _COLOURS
    lines = [
        f'<path stroke="{_name(colour, sheet.channels, levels)}" d="{_runs(canvas == colour)}"/>'
        for colour in np.unique(canvas[canvas >= 0]).tolist()
    ]
    alt = "Made pictures, row by row: " + ", ".join(f"{count} of {name}" for name, count in place.items()) + "."
    high, wide = canvas.shape
    return Markup(  # all of it is numbers, but for the text that is escaped
        f'<svg class="plot" role="img" aria-label="{escape(alt)}" viewBox="0 0 {wide} {high}" shape-rendering="crispEdges" '
        f'fill="none">{"".join(lines)}</svg>'
    )


def _levels(sheet: Sheet) -> NDArray[np.int64]:
    """(pictures, side, side): one number a colour."""
    levels = _GREYS if sheet.channels == 1 else _COLOURS
    values = np.frombuffer(base64.b64decode(sheet.pixels), dtype=np.uint8)
    steps = (values.reshape(-1, sheet.side, sheet.side, sheet.channels).astype(np.int64) * levels) // 256
    return np.asarray((steps * levels ** np.arange(sheet.channels)).sum(axis=3))


def _name(colour: int, channels: int, levels: int) -> str:
    parts = [colour // levels**channel % levels * 255 // (levels - 1) for channel in range(channels)]
    return "#" + "".join(f"{part:02x}" for part in (parts if channels == 3 else parts * 3))


def _runs(flags: NDArray[np.bool_]) -> str:
    """A line through each run of flagged pixels in a row."""
    edges = np.diff(np.pad(flags, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    return "".join(f"M{x} {y}.5h{end - x}" for (y, x), (_, end) in zip(starts.tolist(), ends.tolist(), strict=True))
