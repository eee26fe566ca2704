"""The anatomy of a synthetic chest, which is nobody's: shapes drawn at random, and the density they make.

Coordinates run from -1 to 1 across the film, x to the right and y downwards; densities from 0 (air) to 1 (metal).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Chest:
    """A synthetic patient's anatomy, in the patient's own coordinates."""

    body: NDArray[np.float64]  # half width, height of the centre
    lungs: NDArray[np.float64]  # (2, 5) ellipses: centre x, centre y, half width, half height, tilt in radians
    heart: NDArray[np.float64]  # (1, 5) likewise
    base: NDArray[np.float64]  # (2,) height of each dome of the diaphragm
    ribs: NDArray[np.float64]  # (ribs, 5): height at the midline, slope, bend, half width, density
    strokes: NDArray[np.float64]  # (strokes, 6) clavicles and vessels: from x, y to x, y, half width, density
    dots: NDArray[np.float64]  # (dots, 4) hila, nipples and vessels seen end-on: x, y, radius, density
    waves: NDArray[np.float64]  # (waves, 4) of the lungs' texture: along x, along y, phase, density
    lesions: NDArray[np.float64]  # (lesions, 8): x, y, radius, wobble, lobes, phase, softness, density

    @classmethod
    def draw(cls, random: np.random.Generator, *, lesions: bool) -> Self:
        """Draw a synthetic patient, with one to three lesions or with none."""

        def between(low: Sequence[float], high: Sequence[float], *rows: int) -> NDArray[np.float64]:
            return random.uniform(low, high, (*rows, len(low)))

        size = between([0.93, 0.93], [1.05, 1.05])
        lungs = between([-0.02, -0.1, 0.27, 0.54, 0.02], [0.02, 0.0, 0.34, 0.64, 0.16], 2)
        lungs[:, :4] *= np.tile(size, 2)
        lungs[:, 0] += [-0.42, 0.42]
        lungs[:, 4] *= [1, -1]  # the tops lean towards the spine
        heart = between([0.06, 0.25, 0.28, 0.24, -0.5], [0.16, 0.36, 0.38, 0.32, -0.1], 1)
        ribs = np.concatenate([_ribs(random, 8, -0.66, 0.18), _ribs(random, 5, -0.35, -0.55)])
        healthy = cls(
            body=between([0.84, 0.2], [0.96, 0.3]),
            lungs=lungs,
            heart=heart,
            base=between([0.36, 0.4], [0.5, 0.54]),
            ribs=ribs,
            strokes=np.concatenate([_clavicles(random), *(_vessels(random, sign) for sign in (-1, 1))]),
            dots=_dots(random),
            waves=between([-14, -14, 0, 0.004], [14, 14, 2 * np.pi, 0.014], 8),
            lesions=np.zeros((0, 8)),
        )
        return replace(healthy, lesions=healthy._lesions(random)) if lesions else healthy

    def depth(self, x: Plane, y: Plane) -> Plane:
        """How deep in a synthetic lung each point lies: positive inside, and then at most its distance from the lung's edge."""
        inside = (1 - _ellipses(self.lungs, x, y)) * float(self.lungs[:, 2:4].min())
        shape = (-1,) + (1,) * x.ndim
        base, centre = (v.reshape(shape).astype(np.float32) for v in (self.base, self.lungs[:, 0]))
        above = (base + (x - centre) ** 2 - y) * 0.75  # the dome's slope stays under 0.7
        beside = (_ellipses(self.heart, x, y) - 1)[0] * float(self.heart[0, 2:4].min())
        deep: Plane = np.minimum(np.minimum(inside, above).max(axis=0), beside)
        return deep

    def tissue(self, x: Plane, y: Plane) -> Plane:
        """The density of everything synthetic but the lesions, at each point."""
        width, middle = map(float, self.body)
        body = _soft(1 - ((x / width) ** 2) ** 2 - (((y - middle) / 1.15) ** 2) ** 2, 0.06)
        lung = _soft(self.depth(x, y), 0.018)
        level, slope, bend, thick, dense = _columns(self.ribs)
        out = np.abs(x)
        away = (y - level - out * (slope + bend * out)) * (1 / thick)
        ribs = dense * np.exp(-(away * away))
        cage = _soft(0.8 - out, 0.03) * _soft(float(self.base.mean()) + 0.25 - y, 0.05)
        spine = 0.13 * _soft(0.1 - out, 0.02) * (1 + 0.15 * np.cos(26 * y))
        heart = 0.1 * _soft(1 - _ellipses(self.heart, x, y)[0], 0.08)
        along, across, phase, ripple = _columns(self.waves)
        texture = (ripple * np.cos(along * x + across * y + phase)).sum(axis=0)
        dots_x, dots_y, radius, dot = _columns(self.dots)
        dots = dot * np.exp(((x - dots_x) ** 2 + (y - dots_y) ** 2) * (-1 / (radius * radius)))
        chest = 0.6 - 0.36 * lung + cage * ribs.sum(axis=0) + spine + heart + texture + dots.sum(axis=0)
        density: Plane = 0.02 + body * (chest + _lines(self.strokes, x, y))
        return density

    def opacities(self, x: Plane, y: Plane, growth: float) -> tuple[Plane, NDArray[np.bool_]]:
        """The synthetic lesions at `growth` of full size: density at each point, and (lesions, ...) the points in each."""
        at_x, at_y, radius, wobble, lobes, phase, softness, dense = _columns(self.lesions)
        angle = np.arctan2(y - at_y, x - at_x)
        edge = growth * radius * (1 + wobble * np.cos(lobes * angle + phase))
        within = edge - np.hypot(x - at_x, y - at_y)
        return (dense * _soft(within, softness * radius)).sum(axis=0), within > 0

    def _lesions(self, random: np.random.Generator) -> NDArray[np.float64]:
        x, y = pixels(48)
        room = self.depth(x, y)
        placed = []
        for _ in range(random.choice([1, 2, 3], p=[0.6, 0.28, 0.12])):
            radius, wobble = random.uniform(0.08, 0.165), random.uniform(0, 0.28)
            shape = (float(random.integers(2, 5)), random.uniform(0, 2 * np.pi), random.uniform(0.12, 0.25))
            reach = radius * (1 + wobble)
            free = np.flatnonzero(room > reach)
            if len(free):
                row, column = divmod(int(random.choice(free)), room.shape[1])
                at_x, at_y = float(x[0, column]), float(y[row, 0])
                placed.append((at_x, at_y, radius, wobble, *shape, random.uniform(0.12, 0.28)))
                room = np.minimum(room, np.hypot(x - at_x, y - at_y) - (reach + 0.05))
        return np.array(placed)


@lru_cache(maxsize=8)
def pixels(side: int) -> tuple[Plane, Plane]:
    """The centres of a synthetic film's pixels: x (1, side) and y (side, 1)."""
    centres = ((2 * np.arange(side) + 1) / side - 1).astype(np.float32)
    centres.flags.writeable = False  # it is shared by every film
    return centres[None, :], centres[:, None]


def _columns(table: NDArray[np.float64]) -> Plane:
    return np.ascontiguousarray(table.T, dtype=np.float32)[:, :, None, None]


def _soft(inside: NDArray[Any], width: float | Plane) -> Plane:
    # half a sigmoid by tanh, which does not overflow
    step: NDArray[Any] = 0.5 + 0.5 * np.tanh(inside / (2 * width))
    return step


def _ellipses(table: NDArray[np.float64], x: Plane, y: Plane) -> Plane:
    centre_x, centre_y, width, height, tilt = _columns(table)
    cos, sin, right, down = np.cos(tilt), np.sin(tilt), x - centre_x, y - centre_y
    across, along = right * (cos / width) + down * (sin / width), down * (cos / height) - right * (sin / height)
    radii: Plane = np.sqrt(across * across + along * along)
    return radii


def _lines(table: NDArray[np.float64], x: Plane, y: Plane) -> Plane:
    from_x, from_y, to_x, to_y, thick, dense = _columns(table)
    long_x, long_y, right, down = to_x - from_x, to_y - from_y, x - from_x, y - from_y
    length = long_x * long_x + long_y * long_y
    share = (right * (long_x / length) + down * (long_y / length)).clip(0, 1)
    right, down = right - share * long_x, down - share * long_y
    lines: Plane = ((dense - 0.5 * dense * share) * np.exp((right * right + down * down) * (-1 / thick**2))).sum(axis=0)
    return lines


def _ribs(random: np.random.Generator, count: int, top: float, slope: float) -> NDArray[np.float64]:
    step = random.uniform(0.14, 0.17)
    level = top + step * np.arange(count) + random.uniform(-0.02, 0.02, count)
    slopes = slope + random.uniform(-0.1, 0.1)
    bend = np.sign(slope) * random.uniform(0.2, 0.5)
    thick, dense = random.uniform(0.022, 0.034, count), random.uniform(0.04, 0.075, count)
    return np.column_stack([level, np.full(count, slopes), np.full(count, bend), thick, dense])


def _clavicles(random: np.random.Generator) -> NDArray[np.float64]:
    inner, outer, thick, dense = random.uniform([-0.62, -0.8, 0.035, 0.08], [-0.54, -0.68, 0.05, 0.12])
    return np.array([[sign * 0.08, inner, sign * 0.72, outer, thick, dense] for sign in (-1, 1)])


def _vessels(random: np.random.Generator, sign: int) -> NDArray[np.float64]:
    count = 5
    angle = np.linspace(-1.2, 1.3, count) + random.uniform(-0.2, 0.2, count)
    length = random.uniform(0.25, 0.5, count)
    start = np.array([sign * 0.2, 0.0]) + random.uniform(-0.05, 0.05, (count, 2))
    end = start + np.column_stack([sign * 0.8 * length * np.cos(angle), 1.2 * length * np.sin(angle)])
    return np.column_stack([start, end, random.uniform(0.012, 0.024, count), random.uniform(0.05, 0.11, count)])


def _dots(random: np.random.Generator) -> NDArray[np.float64]:
    hila = [
        (sign * 0.18, random.uniform(-0.06, 0.06), random.uniform(0.08, 0.12), random.uniform(0.08, 0.16)) for sign in (-1, 1)
    ]
    height, radius, dense = random.uniform([0.2, 0.03, 0.06], [0.4, 0.045, 0.16])
    nipples = [(sign * random.uniform(0.38, 0.55), height, radius, dense) for sign in (-1, 1) if random.random() < 0.45]
    end_on = [
        (random.choice([-1, 1]) * random.uniform(0.25, 0.5), *random.uniform([-0.3, 0.022, 0.08], [0.3, 0.036, 0.18]))
        for _ in range(random.integers(0, 6))
    ]
    return np.array([*hila, *nipples, *end_on])
