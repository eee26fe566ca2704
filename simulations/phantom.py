"""Synthetic chest films: nobody's lungs, drawn from a seed, with every lesion's outline known.

The drawing is anatomy in outline only (body, lungs, heart, ribs, spine, clavicles, vessels) with round or irregular
opacities as lesions, and with nipple shadows, vessels seen end-on and crossing ribs, which are none. A study on it shows that
the software learns what there is to learn, never that a network would help a patient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from wardround.common.errors import ConfigError
from wardround.simulations.chest import Chest, Plane, pixels

MOST_LESIONS = 3  # of a film


@dataclass(frozen=True)
class Films:
    """Synthetic films of one site and what is on them; row by row one film, films of a patient next to each other."""

    image: NDArray[np.uint8]  # (films, side, side), bright is dense
    label: NDArray[np.int64]  # (films,), 1 where the film shows a lesion
    mask: NDArray[np.uint8]  # (films, side, side), 1 where a lesion is
    boxes: NDArray[np.float32]  # (films, MOST_LESIONS, 4): centre x, centre y, width, height as shares of the side; else 0
    lung: NDArray[np.uint8]  # (films, side, side), 1 where a lung is that neither heart nor diaphragm hides
    patient: list[str]  # (films,), whose film it is


def films(
    site: str,
    patients: int,
    *,
    seed: int,
    side: int = 64,
    records_per_patient: Sequence[float] = (0.75, 0.25),
    prevalence: float | None = None,
) -> Films:
    """Draw the synthetic films of a site's patients.

    Args:
        site: its name decides the scanner and, unless given, the prevalence.
        patients: how many; patient number n looks the same whatever this is.
        seed: decides everything else.
        side: of a square film, in pixels.
        records_per_patient: the shares of patients with one film, with two, and so on; a later film shows the same anatomy and
            the same lesions, slightly moved, and newly exposed.
        prevalence: the share of patients with a lesion.

    Raises:
        ConfigError: no patients, a side under 32 pixels, or shares that are none.
    """
    shares = np.asarray(records_per_patient, dtype=np.float64)
    sick = prevalence_of(site) if prevalence is None else prevalence
    problems = {
        f"patients = {patients}: wanted 1 or more": patients < 1,
        f"side = {side}: wanted 32 or more": side < 32,
        f"prevalence = {prevalence}: wanted a share between 0 and 1": not 0 <= sick <= 1,
        f"records_per_patient = {tuple(records_per_patient)}: wanted shares that sum to 1": (
            shares.ndim != 1 or not np.all(shares >= 0) or not np.isclose(shares.sum(), 1)
        ),
    }
    if wrong := [problem for problem, found in problems.items() if found]:
        raise ConfigError("synthetic films: " + "; ".join(wrong))
    scanner = Scanner.of(site)
    owner: list[str] = []
    drawn: list[tuple[NDArray[Any], ...]] = []
    for number in range(patients):
        random = _chance(int(seed), site, number)
        chest = Chest.draw(random, lesions=random.random() < sick)
        visits = 1 + int(random.choice(len(shares), p=shares / shares.sum()))
        drawn += [_film(chest, scanner, side, visit) for visit in random.spawn(visits)]
        owner += [f"{site}-{number:05d}"] * visits
    image, mask, boxes, lung = (np.stack(column) for column in zip(*drawn, strict=True))
    label = np.array([outline.any() for outline in mask], dtype=np.int64)
    return Films(image, label, mask, boxes, lung, owner)


def prevalence_of(site: str) -> float:
    """The share of a synthetic site's patients who have a lesion, 0.3 to 0.5, from a hash of its name."""
    return 0.3 + 0.2 * float(_shares("prevalence", site)[0])


@dataclass(frozen=True)
class Scanner:
    """How a synthetic hospital's scanner turns density into grey: what makes a model of one site worse at another."""

    gain: float  # brightness of the densest tissue, 0.7 to 1
    gamma: float  # grey = density ** gamma, 0.6 to 1.7, evenly on a log scale: contrast of dark against bright tissue
    noise: float  # standard deviation of a pixel, 0.01 to 0.035 of the full scale
    blur: float  # standard deviation of the point spread, 0 to 0.018 of the film's side
    vignette: float  # loss of brightness in the corners, 0 to 0.4
    marker: int  # corner of the side marker, clockwise from the upper left: 0 to 3; 4 is none

    @classmethod
    def of(cls, site: str) -> Self:
        """A synthetic site's scanner: SHA-256 of its name, read as numbers between 0 and 1, spread over the ranges above."""
        gain, gamma, noise, blur, vignette, marker = map(float, _shares("scanner", site)[:6])
        return cls(
            gain=0.7 + 0.3 * gain,
            gamma=0.6 * (1.7 / 0.6) ** gamma,
            noise=0.01 + 0.025 * noise,
            blur=0.018 * blur,
            vignette=0.4 * vignette,
            marker=int(5 * marker),
        )

    def expose(self, density: Plane, random: np.random.Generator) -> NDArray[np.uint8]:
        """Density (side, side) -> grey (side, side) of a synthetic film; `random` is this film's exposure and noise."""
        side = len(density)
        x, y = pixels(side)
        grey = _blurred(density.clip(0, 1) ** np.float32(self.gamma), self.blur * side)
        exposure = self.gain * random.uniform(0.93, 1.07)
        grey = grey * np.float32(exposure) * (1 - np.float32(self.vignette / 2) * (x * x + y * y))
        grey += np.float32(self.noise) * random.standard_normal((side, side), dtype=np.float32)
        if self.marker < 4:
            grey += 0.8 * _letter(side, self.marker)
        return (grey.clip(0, 1) * 255).round().astype(np.uint8)


def _film(chest: Chest, scanner: Scanner, side: int, random: np.random.Generator) -> tuple[NDArray[Any], ...]:
    x, y = pixels(side)
    right, down, tilt, zoom = random.uniform([-0.03, -0.03, -0.03, 0.98], [0.03, 0.03, 0.03, 1.02]).astype(np.float32)
    cos, sin, x, y = np.cos(tilt) / zoom, np.sin(tilt) / zoom, x - right, y - down
    x, y = x * cos + y * sin, y * cos - x * sin
    opacity, which = chest.opacities(x, y, random.uniform(0.85, 1))
    grey = scanner.expose(chest.tissue(x, y) + opacity, random)
    lung = chest.depth(x, y) > 0
    boxes = np.zeros((MOST_LESIONS, 4), dtype=np.float32)
    for box, lesion in zip(boxes, which, strict=False):
        (left, right), (top, bottom) = (np.flatnonzero(lesion.any(axis=axis))[[0, -1]] for axis in (0, 1))
        box[:] = np.array([left + right + 1, top + bottom + 1, 2 * (right + 1 - left), 2 * (bottom + 1 - top)]) / (2 * side)
    return grey, np.logical_or.reduce(which, axis=0).astype(np.uint8), boxes, lung.astype(np.uint8)


def _chance(seed: int, site: str, number: int) -> np.random.Generator:
    # a stream of its own for each patient, so that nobody's films depend on who else is drawn
    return np.random.default_rng(int.from_bytes(_hash(seed, site, number)))


def _shares(*about: object) -> NDArray[np.float64]:
    return np.frombuffer(_hash(*about), dtype=">u4") / 2**32


def _hash(*about: object) -> bytes:
    return hashlib.sha256(repr(about).encode()).digest()


def _blurred(grey: Plane, width: float) -> Plane:
    if width < 0.05:  # of a pixel
        return grey
    reach = int(np.ceil(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for _ in range(2):
        # sums of shifted copies, not a matrix product, whose rounding may depend on the number of threads
        wide = np.pad(grey, ((reach, reach), (0, 0)), mode="edge")
        grey = sum((share * wide[row : row + len(grey)] for row, share in enumerate(kernel)), np.zeros_like(grey)).T
    return grey


def _letter(side: int, corner: int) -> Plane:
    stroke = max(1, side // 32)
    letter = np.kron(np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]), np.ones((stroke, stroke)))
    plane = np.zeros((side, side), dtype=np.float32)
    high, wide = letter.shape
    top = stroke if corner in (0, 1) else side - stroke - high
    left = stroke if corner in (0, 3) else side - stroke - wide
    plane[top : top + high, left : left + wide] = letter
    return plane
