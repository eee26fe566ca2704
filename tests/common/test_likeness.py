"""How like two sets of images are."""

from __future__ import annotations

import pytest
import torch

from wardround.common.likeness import frechet, nearest


def normal(count: int, seed: int, width: int = 3) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_set_is_at_no_distance_from_itself_in_any_order():
    x = normal(200, 1)
    assert frechet(x, x.flip(0)) == pytest.approx(0, abs=1e-9)


def test_a_shift_counts_by_its_squared_length():
    x = normal(200, 1)
    assert frechet(x, x + torch.tensor([3.0, 4.0, 0.0])) == pytest.approx(25)


def test_a_wider_set_counts_by_the_difference_of_standard_deviations():
    x = normal(100_000, 2)
    assert frechet(x, 3 * x) == pytest.approx(3 * (3 - 1) ** 2, rel=0.02)


def test_it_is_the_same_both_ways_and_whatever_way_the_features_are_turned():
    one, other = normal(300, 3), 2 * normal(300, 4) + 1
    turn, _ = torch.linalg.qr(normal(3, 5))
    assert frechet(one, other) == pytest.approx(frechet(other, one))
    assert frechet(one @ turn, other @ turn) == pytest.approx(frechet(one, other))


def test_a_copy_is_found_among_many():
    images = normal(600, 6, 16).float().view(600, 1, 4, 4)
    away = nearest(torch.cat([images[417:418] + 0.01, images[:1] + 100]), images)
    assert float(away[0]) == pytest.approx(0.01, rel=1e-2)
    assert float(away[1]) > 90
