"""Synthetic chest films: what is said about a film is what is drawn on it, and a patient is the same whoever else is drawn."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest

from wardround.common.errors import ConfigError
from wardround.simulations.phantom import MOST_LESIONS, Films, Scanner, films, prevalence_of

SITES = [f"site-{number}" for number in range(40)]
IN_BYTES = """
import hashlib
from wardround.simulations.phantom import films
f = films("north", 6, seed=3)
print(hashlib.sha256(b"".join(a.tobytes() for a in (f.image, f.label, f.mask, f.boxes, f.lung))).hexdigest())
"""


@cache
def north() -> Films:
    return films("north", 120, seed=7, prevalence=0.7)


@pytest.mark.parametrize("side", [32, 45, 64])
def test_films_have_the_promised_shapes_and_ranges(side: int):
    drawn = films("north", 9, seed=1, side=side)
    count = len(drawn.patient)
    assert count >= 9
    for field, kind in (("image", np.uint8), ("mask", np.uint8), ("lung", np.uint8)):
        value = getattr(drawn, field)
        assert value.shape == (count, side, side)
        assert value.dtype == kind
    assert drawn.label.shape == (count,)
    assert drawn.label.dtype == np.int64
    assert drawn.boxes.shape == (count, MOST_LESIONS, 4)
    assert drawn.boxes.dtype == np.float32
    assert set(np.unique(drawn.label)) | set(np.unique(drawn.mask)) | set(np.unique(drawn.lung)) == {0, 1}
    assert drawn.boxes.min() >= 0
    assert drawn.boxes.max() <= 1
    assert drawn.image.std(axis=(1, 2)).min() > 20


@pytest.mark.parametrize("side", [32, 64])
def test_every_lesion_lies_inside_a_lung(side: int):
    drawn = films("north", 60, seed=7, side=side, prevalence=1.0)
    assert np.all(drawn.mask <= drawn.lung)
    assert 0.1 < drawn.lung.mean() < 0.3


def test_a_label_agrees_with_its_mask_and_its_boxes():
    drawn = north()
    assert np.array_equal(drawn.label == 1, drawn.mask.any(axis=(1, 2)))
    assert np.array_equal(drawn.label == 1, (drawn.boxes[..., 2] > 0).any(axis=1))
    assert 0 < drawn.label.sum() < len(drawn.label)
    empty = drawn.boxes[..., 2] == 0
    assert not drawn.boxes[empty].any()
    assert {1, 2, 3} == set((~empty).sum(axis=1)[drawn.label == 1])


def test_boxes_enclose_the_lesions_tightly():
    side = north().mask.shape[-1]
    for mask, boxes in zip(north().mask, north().boxes, strict=True):
        covered = np.zeros_like(mask)
        for x, y, width, height in boxes[boxes[:, 2] > 0].astype(np.float64):
            edges = np.array([x - width / 2, x + width / 2, y - height / 2, y + height / 2]) * side
            left, right, top, bottom = edges.round().astype(int)
            assert np.allclose(edges, [left, right, top, bottom], atol=1e-4)
            inside = mask[top:bottom, left:right]
            assert all(border.any() for border in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            covered[top:bottom, left:right] = 1
        assert np.all(mask <= covered)


def test_lesions_are_brighter_than_the_lung_around_them():
    def contrast(image, mask, lung) -> float:
        return float(image[mask == 1].mean() - image[(lung == 1) & (mask == 0)].mean())

    drawn = north()
    found = [contrast(drawn.image[i], drawn.mask[i], drawn.lung[i]) for i in np.flatnonzero(drawn.label)]
    assert np.mean(np.array(found) > 0) > 0.9


def test_two_films_of_a_patient_share_their_anatomy():
    drawn = films("north", 40, seed=5, records_per_patient=(0, 1), prevalence=0.0)
    assert drawn.patient[::2] == drawn.patient[1::2]
    apart = drawn.image.reshape(len(drawn.image), -1) - drawn.image.reshape(len(drawn.image), -1).mean(axis=0)
    alike = np.corrcoef(apart)[::2, 1::2]
    others = alike[~np.eye(len(alike), dtype=bool)]
    assert np.diag(alike).mean() > others.mean() + 0.3
    assert np.mean(np.diag(alike) > np.median(alike, axis=1)) > 0.8
    assert not any(np.array_equal(*pair) for pair in drawn.image.reshape(40, 2, 64, 64))


def test_records_per_patient_are_shares_of_patients():
    drawn = films("north", 150, seed=2, side=32, records_per_patient=(0.5, 0.3, 0.2))
    counts = np.bincount(np.unique(drawn.patient, return_counts=True)[1], minlength=4)[1:] / 150
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 4 * np.sqrt(0.25 / 150)


def test_a_patient_looks_the_same_whoever_else_is_drawn():
    few, many = films("north", 4, seed=1), films("north", 9, seed=1)
    count = len(few.patient)
    assert few.patient == many.patient[:count]
    for field in ("image", "label", "mask", "boxes", "lung"):
        assert np.array_equal(getattr(few, field), getattr(many, field)[:count])


def test_a_patient_keeps_the_lesions_at_another_resolution():
    coarse, fine = (films("north", 40, seed=1, side=side) for side in (32, 64))
    assert coarse.patient == fine.patient
    assert np.array_equal(coarse.label, fine.label)
    assert np.abs(coarse.boxes - fine.boxes).max() <= 2 / 32


def test_seed_and_site_decide_the_films():
    drawn = [films(site, 3, seed=seed, records_per_patient=(1,)).image for site, seed in (("a", 1), ("a", 2), ("b", 1))]
    assert len({image.tobytes() for image in drawn}) == 3


def test_the_same_seed_gives_the_same_bytes_in_another_process():
    def digest(hash_seed: str, threads: str) -> str:
        settings = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads}
        return subprocess.run([sys.executable, "-c", IN_BYTES], env=settings, check=True, capture_output=True, text=True).stdout

    first = digest("1", "1")
    assert len(first.strip()) == len(hashlib.sha256().hexdigest())
    assert first == digest("2", "2")


def test_a_site_has_the_prevalence_of_its_name():
    shares = [prevalence_of(site) for site in SITES]
    assert 0.3 <= min(shares) < 0.35 < 0.45 < max(shares) <= 0.5
    for site in SITES[:2]:
        drawn = films(site, 250, seed=0, side=32, records_per_patient=(1,))
        assert abs(drawn.label.mean() - prevalence_of(site)) < 4 * np.sqrt(0.25 / 250)


@pytest.mark.parametrize(("prevalence", "label"), [(0.0, 0), (1.0, 1)])
def test_a_prevalence_that_is_given_holds(prevalence: float, label: int):
    assert set(films("north", 40, seed=0, side=32, prevalence=prevalence).label) == {label}


def test_every_site_has_a_scanner_of_its_own_in_the_documented_ranges():
    scanners = [Scanner.of(site) for site in SITES]
    assert len(set(scanners)) == len(SITES)
    ranges = {"gain": (0.7, 1), "gamma": (0.6, 1.7), "noise": (0.01, 0.035), "blur": (0, 0.018), "vignette": (0, 0.4)}
    for field, (low, high) in ranges.items():
        values = [getattr(scanner, field) for scanner in scanners]
        quarter = (high - low) / 4
        assert low <= min(values) < low + quarter < high - quarter < max(values) <= high
    assert {scanner.marker for scanner in scanners} == {0, 1, 2, 3, 4}


def test_the_grey_of_a_density_follows_gain_and_gamma():
    quiet = {"noise": 0.0, "blur": 0.0, "vignette": 0.0, "marker": 4}
    density = np.full((32, 32), 0.5, dtype=np.float32)
    grey = {
        (gain, gamma): Scanner(gain=gain, gamma=gamma, **quiet).expose(density, np.random.default_rng(0)).mean()
        for gain in (0.7, 1.0)
        for gamma in (0.6, 1.7)
    }
    assert grey[0.7, 0.6] / grey[1.0, 0.6] == pytest.approx(0.7, abs=0.01)
    assert grey[1.0, 1.7] / grey[1.0, 0.6] == pytest.approx(0.5**1.1, abs=0.01)


def test_sites_differ_in_brightness_more_than_patients_do():
    means = [films(site, 12, seed=0, side=32).image.mean(axis=(1, 2)) for site in SITES[:10]]
    assert np.std([mean.mean() for mean in means]) > 1.5 * np.mean([mean.std() for mean in means])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"patients": 0}, "patients = 0"),
        ({"side": 31}, "side = 31"),
        ({"prevalence": 1.5}, "prevalence = 1.5"),
        ({"prevalence": float("nan")}, "prevalence = nan"),
        ({"records_per_patient": ()}, "records_per_patient"),
        ({"records_per_patient": (0.5, 0.2)}, "records_per_patient"),
        ({"records_per_patient": (1.5, -0.5)}, "records_per_patient"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(wrong: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        films("north", **{"patients": 2, "seed": 0, **wrong})
