"""Series: what stands for an hour follows from that record alone, and another unit is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.errors import ConfigError, DataRefused
from wardround.common.tasks import TASKS, Column, Records
from wardround.common.tasks.icu_fusion import BOTH, HOURLY
from wardround.common.tasks.icu_mortality import SCHEMA
from wardround.common.tasks.series import FEW, Events, SeriesSchema, Variable

PULSE, HEAT = (
    Variable("pulse", "", 20, 300, centre=80, scale=20, also=("hr",)),
    Variable("heat", "", 30, 45, centre=37, scale=1),
)
PLAIN = SeriesSchema((PULSE, HEAT), hours=4)
WITH_TABLE = SeriesSchema(
    (PULSE, HEAT), hours=4, static=(Column("age", "", 15, 110, centre=60, scale=10, absent_values=(-1,)),)
)

Event = tuple[int, float, str, float]  # record, hour, name, value


def encode(schema: SeriesSchema, *events: Event, count: int = 1, static: Any = None) -> Records:
    columns = list(zip(*((r, h, schema.names[n], v) for r, h, n, v in events), strict=True)) or [(), (), (), ()]
    record, what = (np.array(columns[at], dtype=np.int64) for at in (0, 2))
    hour, value = (np.array(columns[at], dtype=np.float64) for at in (1, 3))
    return schema.encode(Events(record, hour, what, value), static or {}, [0] * count, [str(n) for n in range(count)])


def series(*events: Event, schema: SeriesSchema = PLAIN, at: int = 0) -> tuple[list[float], list[float]]:
    """One variable of the first record: values, and whether they were measured."""
    found = encode(schema, *events).fields["series"][0]
    return found[:, at].tolist(), found[:, len(schema.variables) + at].tolist()


def test_a_value_stays_until_the_next_and_says_when_it_was_measured():
    assert series((0, 1.5, "pulse", 100), (0, 3.0, "pulse", 60)) == ([0, 1, 1, -1], [0, 1, 0, 1])


def test_of_several_values_in_a_step_the_last_counts():
    late_first = series((0, 0.9, "pulse", 100), (0, 0.1, "pulse", 60))
    assert late_first[0][0] == 1
    assert series((0, 0.5, "pulse", 60), (0, 0.5, "hr", 100))[0][0] == 1  # at one moment: the file's last


def test_a_value_in_the_middle_is_zero_and_an_extreme_one_is_cut():
    assert series((0, 0, "pulse", 80))[0] == [0, 0, 0, 0]
    assert series((0, 0, "pulse", 299))[0] == [3, 3, 3, 3]


def test_hours_can_share_a_step():
    shared = SeriesSchema((PULSE, HEAT), hours=5, step=2)
    assert shared.steps == 3
    assert series((0, 1.9, "pulse", 100), (0, 4.9, "pulse", 60), schema=shared) == ([1, 1, -1], [1, 0, 1])


def test_what_is_measured_before_or_after_is_left_out():
    assert series((0, -0.1, "pulse", 100), (0, 4.0, "pulse", 100)) == ([0] * 4, [0] * 4)


def test_an_implausible_value_was_not_measured():
    assert series((0, 0, "pulse", 100), (0, 1, "pulse", -1)) == ([1, 1, 1, 1], [1, 0, 0, 0])


@pytest.mark.parametrize("name", ["heat", "age"])
def test_another_unit_is_refused_without_a_count(name: str):
    wrong = [(n, 0.0, name, 98.6 if name == "heat" else 540.0) for n in range(FEW)]
    with pytest.raises(DataRefused, match=f"the unit of {name} does not fit") as found:
        encode(WITH_TABLE, *wrong, count=FEW)
    assert str(FEW) not in str(found.value)
    assert str(FEW) in found.value.detail


def test_a_few_mistyped_values_are_not_another_unit():
    right = [(n, 0.0, "heat", 37.5) for n in range(FEW)]
    found = encode(PLAIN, *right, (FEW, 0.0, "heat", 98.6), count=FEW + 1).fields["series"]
    assert found[0, 0].tolist() == [0, 0.5, 0, 1]
    assert found[FEW, 0].tolist() == [0, 0, 0, 0]


def test_a_static_finding_comes_from_the_labels_or_is_the_first_event_of_its_name():
    of_labels = encode(WITH_TABLE, (0, 0, "age", 90), static={"age": np.array([70.0])})
    of_events = encode(WITH_TABLE, (0, 0, "age", -1), (0, 1, "age", 70), (0, 2, "age", 80))
    assert of_labels.fields["table"].tolist() == of_events.fields["table"].tolist() == [[1, 0]]


def test_an_absent_or_implausible_static_finding_says_so():
    for static in (np.nan, -1, 540.0):
        assert encode(WITH_TABLE, static={"age": np.array([static])}).fields["table"].tolist() == [[0, 1]]


def test_a_label_beyond_the_classes_is_refused():
    nothing = Events(*(np.zeros(0, dtype=kind) for kind in (np.int64, np.float64, np.int64, np.float64)))
    with pytest.raises(DataRefused, match="label does not fit"):
        PLAIN.encode(nothing, {}, [2], ["a"])


moments = st.lists(
    st.tuples(
        st.integers(0, 2), st.floats(-1, 5), st.sampled_from(["pulse", "hr", "heat", "age"]), st.floats(-10, 400)
    ),
    max_size=FEW - 1,
)  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=60)
@given(moments)
def test_a_records_numbers_never_depend_on_other_records(events: list[Event]):
    together = encode(WITH_TABLE, *events, count=3).fields
    for record in range(3):
        alone = encode(WITH_TABLE, *((0, *event[1:]) for event in events if event[0] == record)).fields
        assert all(torch.equal(alone[name][0], together[name][record]) for name in alone)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(moments)
def test_every_number_is_finite_and_within_its_bounds(events: list[Event]):
    found = encode(WITH_TABLE, *events, count=3)
    like = WITH_TABLE.blank(3)
    for name, tensor in found.fields.items():
        assert tensor.shape == like.fields[name].shape
        assert tensor.dtype == like.fields[name].dtype
        assert float(tensor.abs().max()) <= 3


def test_a_name_of_both_kinds_is_the_variables_among_events_and_the_columns_among_labels():
    both = SeriesSchema((PULSE,), hours=2, static=(Column("pulse", "highest of the day", 20, 300, centre=100, scale=20),))
    of_labels = encode(both, (0, 0, "pulse", 100), static={"pulse": np.array([140.0])})
    assert of_labels.fields["series"][0, :, 0].tolist() == [1, 1]
    assert of_labels.fields["table"].tolist() == [[2, 0]]
    assert encode(both, (0, 0, "pulse", 100)).fields["table"].tolist() == [[0, 1]]


@pytest.mark.parametrize("schema", [SCHEMA, HOURLY, BOTH])
def test_a_shipped_schema_has_plausible_constants_and_no_name_twice(schema: SeriesSchema):
    listed = [name for v in schema.variables for name in (v.name, *v.also)]
    assert len(set(listed)) == len(listed)
    for variable in schema.variables:
        assert variable.low <= variable.centre <= variable.high
        assert variable.scale > 0
    for column in schema.static:
        assert column.yes or column.low < column.centre < column.high


@pytest.mark.parametrize("branches", ["table+", [1], ["table"], 1])
def test_branches_that_are_not_there_are_refused(branches: object):
    with pytest.raises(ConfigError, match=r"model\.branches: .*; there are: both, series, table"):
        TASKS["icu-fusion"].model({"branches": branches}, seed=0)


def test_a_network_may_read_one_branch_alone():
    task = TASKS["icu-fusion"]
    records = task.blank(2)
    sizes = {branches: task.size({"branches": branches}) for branches in ("both", "series", "table")}
    assert sizes["both"] > sizes["series"] > sizes["table"]
    one = task.model({"branches": "table"}, seed=0)
    other = {**records.fields, "series": torch.ones_like(records.fields["series"])}
    assert torch.equal(one(**records.fields), one(**other))
