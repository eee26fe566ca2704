"""Boxes as heat-maps: what is read from a map is what was written into it, and the loss wants just that."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wardround.common.errors import ConfigError
from wardround.common.models import MODELS
from wardround.common.models.detector import _aim, _radius, decode, detection_loss

CELLS = 16
parts = st.floats(0, 1, width=32)
made_up = st.floats(-3, 3, width=32)


def written(boxes: Tensor, classes: int = 1, *, sure: float = 12.0) -> Tensor:
    """The output that stands for `boxes` (batch, most, 4 or 5)."""
    output = torch.zeros(len(boxes), classes + 4, CELLS, CELLS)
    output[:, :classes] = -sure
    for record, of_record in enumerate(boxes):
        for box in of_record[of_record[:, 2] > 0]:
            x, y = (int(min(c, CELLS - 1)) for c in box[:2] * CELLS)
            kind = int(box[4]) if classes > 1 else 0
            output[record, kind, y, x] = sure
            output[record, classes:, y, x] = torch.cat([box[2:4] * CELLS, box[:2] * CELLS - torch.tensor([x, y])])
    return output


BOXES = torch.tensor(
    [[[0.3, 0.6, 0.2, 0.4], [0.8, 0.1, 0.1, 0.1], [0, 0, 0, 0]], [[0.5, 0.5, 1.0, 1.0], [0, 0, 0, 0], [0, 0, 0, 0]]]
)


def test_what_was_written_is_read_again():
    found = decode(written(BOXES), most=2)
    assert found.boxes.shape == (2, 2, 4)
    assert found.scores[0].tolist() == pytest.approx([1, 1], abs=1e-4)
    assert found.scores[1].tolist() == pytest.approx([1, 0], abs=1e-4)
    torch.testing.assert_close(found.boxes[0].sort(0)[0], BOXES[0, :2].sort(0)[0])
    torch.testing.assert_close(found.boxes[1, 0], BOXES[1, 0])


def test_classes_are_told_apart():
    boxes = torch.cat([BOXES, torch.tensor([[2.0, 1, 0], [0, 0, 0]])[..., None]], 2)
    found = decode(written(boxes, 3), most=2)
    by_x = found.boxes[0, :, 0].argsort()
    assert found.kind[0][by_x].tolist() == [2, 1]
    right = detection_loss(written(boxes, 3), boxes)
    boxes[0, 0, 4] = 0
    assert float(detection_loss(written(boxes, 3), boxes)[0] - right[0]) == pytest.approx(0, abs=1e-3)
    assert float(detection_loss(written(boxes, 3), boxes.roll(1, 1))[0] - right[0]) == pytest.approx(0, abs=1e-3)
    wrong = boxes.clone()
    wrong[0, 0, 4] = 1
    assert float(detection_loss(written(boxes, 3), wrong)[0]) > float(right[0]) + 1


def test_the_loss_is_least_where_the_output_says_the_boxes():
    right = detection_loss(written(BOXES), BOXES)
    assert right.tolist() == pytest.approx([0, 0], abs=1e-3)
    moved = BOXES.clone()
    moved[..., 0] += 0.1
    larger = BOXES.clone()
    larger[..., 3] *= 2
    assert bool((detection_loss(written(moved), BOXES) > 1).all())
    assert float(detection_loss(written(larger), BOXES)[0]) == pytest.approx(1, rel=1e-3)  # twice as high is off by a whole
    assert bool((detection_loss(torch.zeros(2, 5, CELLS, CELLS), BOXES) > 1).all())


def test_a_size_that_is_off_costs_as_much_on_a_finer_map():
    def of_sizes(cells: int) -> float:
        boxes = torch.tensor([[[0.5, 0.5, 0.25, 0.25]]])
        output = torch.full((1, 5, cells, cells), -12.0)
        output[0, 0, cells // 2, cells // 2] = 12.0
        output[0, 1:, cells // 2, cells // 2] = torch.tensor([0.2 * cells, 0.25 * cells, 0.0, 0.0])
        return float(detection_loss(output, boxes))

    assert of_sizes(16) == pytest.approx(0.2, rel=1e-2)
    assert of_sizes(32) == pytest.approx(of_sizes(16), rel=1e-2)


@pytest.mark.parametrize("stride", [2, 4])
def test_cells_are_as_large_as_the_stride(stride: int):
    found = MODELS["detector"]({"width": 4, "depth": 2, "stride": stride}, side=32)(torch.zeros(2, 1, 32, 32))
    assert found.shape == (2, 5, 32 // stride, 32 // stride)


@pytest.mark.parametrize(("options", "told"), [
    ({"stride": 3}, "stride is 3; 2 or 4 is wanted"),
    ({"stride": 2, "depth": 6}, "a multiple of 64 is wanted"),
], ids=str)  # fmt: skip
def test_cells_that_do_not_fit_are_refused(options: dict[str, int], told: str):
    with pytest.raises(ConfigError, match=told):
        MODELS["detector"](options, side=32)


def test_a_records_loss_is_over_its_own_number_of_boxes_and_padding_adds_nothing():
    output = torch.randn(2, 5, CELLS, CELLS, generator=torch.Generator().manual_seed(1))
    both = detection_loss(output, BOXES)
    torch.testing.assert_close(both[1:], detection_loss(output[1:], BOXES[1:, :1]))
    torch.testing.assert_close(both, detection_loss(output, torch.cat([BOXES, torch.zeros(2, 4, 4)], 1)))
    torch.testing.assert_close(both, detection_loss(output, BOXES.flip(1)))
    empty = detection_loss(output, torch.zeros(2, 3, 4))
    assert bool(empty.isfinite().all())


def test_boxes_without_their_class_are_refused_where_there_are_several():
    with pytest.raises(ValueError, match="boxes have 4 numbers each; 3 classes want 5"):
        detection_loss(torch.zeros(2, 7, 4, 4), BOXES)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(made_up, made_up, made_up, made_up), min_size=3, max_size=3))
def test_no_made_up_box_breaks_the_loss(boxes: list[tuple[float, ...]]):
    output = torch.randn(1, 5, 4, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    loss = detection_loss(output, torch.tensor([boxes]))
    assert bool(loss.isfinite().all())
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert bool(gradient.isfinite().all())


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.tuples(parts, parts, st.floats(2**-9, 1, width=32), parts))
def test_any_box_is_read_from_the_map_it_was_written_into(box: tuple[float, ...]):
    boxes = torch.tensor([[box]])
    found = decode(written(boxes), most=1)
    torch.testing.assert_close(found.boxes, boxes, rtol=0, atol=1e-5)


def test_a_box_that_is_off_by_its_radius_overlaps_by_seven_tenths():
    size = torch.tensor([[4.0, 9.0], [1.0, 1.0], [16.0, 2.0]])
    r = _radius(size)[:, None]
    common = (size - r).prod(1)
    torch.testing.assert_close(common / (2 * size.prod(1) - common), torch.full((3,), 0.7))


def test_the_map_is_1_at_each_centre_and_less_everywhere_else():
    aim = _aim(BOXES, CELLS, CELLS)
    assert (aim.heat == 1).flatten(2).sum(2).tolist() == [[1, 1, 0], [1, 0, 0]]
    assert aim.heat[0, 0].flatten().argmax() == aim.cell[0, 0]


def test_neighbours_of_a_peak_are_no_boxes():
    output = torch.full((1, 5, CELLS, CELLS), -5.0)
    output[0, 0, 7:10, 7:10] = 1.0
    output[0, 0, 8, 8] = 2.0
    found = decode(output, most=3)
    assert (found.scores > 0.5).sum() == 1
