"""A sheet of made pictures, drawn: every pixel is where it belongs, and no text of others becomes markup."""

from __future__ import annotations

import base64
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from pydantic import ValidationError

from wardround.server.report import Sheet
from wardround.server.report.pictures import drawn


def sheet(pixels: np.ndarray[Any, Any], names: list[str]) -> Sheet:
    _, side, _, channels = pixels.shape
    return Sheet(names=tuple(names), side=side, channels=channels, pixels=base64.b64encode(pixels.tobytes()).decode())


def painted(svg: str) -> dict[tuple[int, int], str]:
    """Colour by (row, column)."""
    found = {}
    for path in ElementTree.fromstring(svg):
        for x, y, run in re.findall(r"M(\d+) (\d+)\.5h(\d+)", path.attrib["d"]):
            for column in range(int(x), int(x) + int(run)):
                assert (int(y), column) not in found
                found[int(y), column] = path.attrib["stroke"]
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_drawn_once_and_close_to_its_colour(channels: int):
    pixels = np.random.default_rng(1).integers(256, size=(4, 5, 5, channels), dtype=np.uint8)
    found = painted(drawn(sheet(pixels, ["a", "b", "a", "b"])))
    assert len(found) == pixels[..., 0].size
    for number, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):  # a name a row, in order
        for y in range(5):
            for x in range(5):
                colour = found[row * 7 + y, column * 7 + x]
                shown = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
                assert np.abs(np.array(shown) - pixels[number, y, x]).max() <= (8 if channels == 1 else 32)


def test_names_are_only_text():
    svg = drawn(sheet(np.zeros((1, 2, 2, 1), dtype=np.uint8), ['"><script>alert(1)</script>']))
    assert "<script>" not in svg
    assert ElementTree.fromstring(svg).attrib["aria-label"].endswith('1 of "><script>alert(1)</script>.')


@pytest.mark.parametrize("pixels", ["", "AAAA", "!!!!"])
def test_pixels_that_are_not_those_of_the_pictures_are_refused(pixels: str):
    with pytest.raises(ValidationError, match="pixels"):
        Sheet(names=("a",), side=2, channels=1, pixels=pixels)
