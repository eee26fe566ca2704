"""Patients are dealt out: each to one hospital, and none of the hospitals goes without."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.errors import ConfigError
from wardround.simulations.partition import Partition

RULES = st.one_of(
    st.just("iid"),
    st.builds("{}:{!r}".format, st.sampled_from(["dirichlet", "size"]), st.floats(1e-3, 1e3)),
)
LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=200).map(np.array)


@given(RULES, LABELS, st.data(), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_every_patient_goes_to_exactly_one_site_and_no_site_goes_without(rule: str, label, data, seed: int):
    sites = data.draw(st.integers(1, len(label)))
    dealt = Partition.parse(rule).deal(label, sites, seed=seed)
    assert len(dealt) == sites
    assert all(len(mine) for mine in dealt)
    assert sorted(np.concatenate(dealt)) == list(range(len(label)))


@given(RULES, st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_the_same_seed_deals_the_same(rule: str, seed: int):
    label = np.arange(100) % 2
    first, again = (Partition.parse(rule).deal(label, 5, seed=seed) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_iid_is_even():
    sizes = [len(mine) for mine in Partition.parse("iid").deal(np.zeros(103), 10, seed=0)]
    assert set(sizes) == {10, 11}


def label_skew(alpha: float) -> float:
    label = np.arange(2000) % 2
    shares = [
        label[mine].mean() for seed in range(20) for mine in Partition.parse(f"dirichlet:{alpha}").deal(label, 10, seed=seed)
    ]
    return float(np.std(shares))


def size_skew(alpha: float) -> float:
    sizes = [len(mine) for seed in range(20) for mine in Partition.parse(f"size:{alpha}").deal(np.zeros(2000), 10, seed=seed)]
    return float(np.std(sizes))


@pytest.mark.parametrize("skew", [label_skew, size_skew])
def test_the_smaller_alpha_the_larger_the_skew(skew):
    found = [skew(alpha) for alpha in (0.1, 1.0, 10.0, 1000.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 5 * found[-1]


@pytest.mark.parametrize(
    "text", ["", "IID", "iid:1", "zipf", "dirichlet:0", "dirichlet:-1", "dirichlet:nan", "size:inf", "size:a", ":1"]
)
def test_a_rule_nobody_knows_is_refused(text: str):
    with pytest.raises(ConfigError, match="--partition"):
        Partition.parse(text)


def test_more_sites_than_patients_are_refused():
    with pytest.raises(ConfigError, match="--sites 4: there are only 3 patients to share out"):
        Partition.parse("iid").deal(np.zeros(3), 4, seed=0)
