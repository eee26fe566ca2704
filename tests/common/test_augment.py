"""Changed films: what a film means stays, and nobody's film depends on another's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wardround.common.errors import ConfigError
from wardround.common.tasks import TASKS, Records
from wardround.common.tasks.augment import moved_films
from wardround.common.tasks.networks import one_of

COUNT = 4


def films() -> Records:
    image = torch.rand(COUNT, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    return Records({"image": image}, torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 2]))


def numbers(values: Tensor) -> Callable[[int], Tensor]:
    def chance(count: int) -> Tensor:
        assert count == values.numel()
        return values.flatten()

    return chance


def drawn(seed: int) -> Tensor:
    return torch.rand(4, COUNT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 2**31))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_label_patient_shape_and_range_stay(seed: int):
    before = films()
    after = moved_films(before, numbers(drawn(seed)))
    assert torch.equal(after.label, before.label)
    assert torch.equal(after.patient, before.patient)
    image, changed = before.fields["image"], after.fields["image"]
    assert changed.shape == image.shape
    assert changed.dtype == image.dtype
    assert changed.min() >= image.min() * 0.9 - 0.05 - 1e-6
    assert changed.max() <= image.max() * 1.1 + 0.05 + 1e-6


def test_the_middle_of_every_number_changes_nothing():
    before = films()
    after = moved_films(before, numbers(torch.full((4, COUNT), 0.5, dtype=torch.float64)))
    assert torch.equal(after.fields["image"], before.fields["image"])


@given(seed=st.integers(0, 2**31), other=st.integers(0, 2**31), row=st.integers(0, COUNT - 1))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_a_films_change_depends_on_its_own_numbers_only(seed: int, other: int, row: int):
    before, values = films(), drawn(seed)
    after = moved_films(before, numbers(values)).fields["image"]
    of_others = drawn(other)
    of_others[:, row] = values[:, row]
    neighbours = films()
    image = torch.full_like(neighbours.fields["image"], 7.0)
    image[row] = before.fields["image"][row]
    again = moved_films(Records({"image": image}, neighbours.label, neighbours.patient), numbers(of_others))
    assert torch.equal(again.fields["image"][row], after[row])


@pytest.mark.parametrize(("down", "right"), [(0, 0), (4, 0), (0, 4), (4, 4), (2, 3)])
def test_a_film_moves_by_whole_pixels_and_repeats_its_edge(down: int, right: int):
    before = films()
    values = torch.full((4, COUNT), 0.5, dtype=torch.float64)
    values[0], values[1] = down / 5, right / 5
    moved = moved_films(before, numbers(values)).fields["image"]
    wide = torch.nn.functional.pad(before.fields["image"], (4, 4, 4, 4), mode="replicate")
    top, left = 4 - (down - 2), 4 - (right - 2)
    assert torch.equal(moved, wide[:, :, top : top + 12, left : left + 12])


@pytest.mark.parametrize("name", ["chest-phantom", "chest-xray"])
def test_views_are_many_of_each_record_and_of_the_same_patient(name: str):
    task = TASKS[name]
    records = task.blank(2)
    seen = task.views(records, 3, lambda count: torch.rand(count, dtype=torch.float64))
    assert seen.patient.tolist() == [0, 0, 0, 1, 1, 1]
    assert task.views(records, None, lambda count: pytest.fail("no number is needed")) is records


def test_a_network_the_task_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"no network of this task is called 'mpl'.*cnn"):
        one_of("cnn", "ws-cnn", channels=1, side=28, classes=2)({"network": "mpl"})


def test_a_network_is_the_first_unless_the_plan_chooses():
    build = one_of("cnn", "ws-cnn", channels=1, side=28, classes=2)
    assert type(build({})) is type(build({"network": "cnn"}))
    assert type(build({"network": "ws-cnn", "width": 8})) is not type(build({}))


def test_what_follows_from_the_data_is_not_the_plans_to_choose():
    with pytest.raises(ConfigError, match="channels: follows from the task's data"):
        one_of("cnn", channels=1, side=28, classes=2)({"channels": 3})


@pytest.mark.parametrize("name", ["chest-phantom-segmentation", "chest-phantom-detection"])
def test_a_task_whose_target_lies_in_the_film_has_no_views(name: str):
    assert TASKS[name].augment is None  # the film would move away from under its mask or boxes
