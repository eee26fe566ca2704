"""Parcels: what comes out is what went in, to the bit, and nothing hostile comes out as anything but a refusal."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.contents import content_digest
from wardround.common.errors import OrderRefused
from wardround.common.parcels import packed, unpacked
from wardround.common.weights import pack, rounded

FACTS = {"kind": "order", "round": 3, "share": 0.5, "last": True, "sums": b"\0\1/", "text": "a/b"}


def message(numbers: int = 4, *, tensors: bool = True) -> RecordDict:
    found = RecordDict({"facts": ConfigRecord(dict(FACTS)), "seal": ConfigRecord({"text": "x" * 300})})
    if tensors:
        found["model"] = pack({"layer.weight": torch.arange(numbers, dtype=torch.float32), "bias": torch.tensor(1.5)})
    return found


@pytest.mark.parametrize("content", [message(), message(200_000), message(0), message(tensors=False)])
def test_what_was_packed_is_unpacked_to_the_bit(content: RecordDict):
    found = unpacked(packed(content))
    assert content_digest(found) == content_digest(content)
    assert dict(found["facts"]) == FACTS  # type: ignore[arg-type]


def test_a_small_model_travels_as_one_record_and_a_large_one_as_one_array():
    assert list(packed(message())) == ["parcel"]
    large = packed(message(200_000))
    assert set(large) == {"parcel", "tensors"}
    assert len(large["tensors"]) == 1


@pytest.mark.parametrize("numbers", [4, 200_000])
def test_numbers_that_float16_can_hold_take_half_the_bytes_and_come_back_to_the_bit(numbers: int):
    content = message()
    content["model"] = pack(rounded({"w": torch.randn(numbers), "b": torch.tensor([1e9, -0.0, 6e-8])}, "float16"))
    whole, half = packed(content), packed(content, halves=True)
    assert content_digest(unpacked(half)) == content_digest(content)
    assert length(half) < 0.6 * length(whole) if numbers > 1000 else length(half) < length(whole)


def test_numbers_that_float16_cannot_hold_are_sent_whole():
    content = message()
    content["model"] = pack({"w": torch.tensor([0.1, float("nan"), 1e9])})
    assert content_digest(unpacked(packed(content, halves=True))) == content_digest(content)


def length(parcel: RecordDict) -> int:
    block = dict(parcel["parcel"]).get("block")  # type: ignore[call-overload]
    return len(block if isinstance(block, bytes) else parcel["tensors"]["block"].data)  # type: ignore[index]


def test_a_large_model_is_the_same_array_whoever_it_is_for():
    one, other = message(200_000), message(200_000)
    other["seal"] = ConfigRecord({"text": "for another site"})
    assert packed(one)["tensors"].object_id == packed(other)["tensors"].object_id


def test_what_is_no_part_of_our_messages_is_not_packed():
    with pytest.raises(OrderRefused, match="cannot be sent"):
        packed(RecordDict({"metrics": MetricRecord({"loss": 1.0})}))


def meddled(**changes: object) -> RecordDict:
    facts = dict(packed(message())["parcel"])  # type: ignore[call-overload]
    facts |= changes
    return RecordDict({"parcel": ConfigRecord({key: value for key, value in facts.items() if value is not None})})


LAYOUT = json.loads(str(dict(packed(message())["parcel"])["layout"]))  # type: ignore[call-overload]


def with_first(**changes: object) -> str:
    names = ("key", "dtype", "shape", "stype", "size", "half")
    first = dict(zip(names, LAYOUT["model"][0], strict=True)) | changes
    return json.dumps({"model": [list(first.values()), *LAYOUT["model"][1:]]})


@pytest.mark.parametrize(
    "parcel",
    [
        RecordDict(),
        message(),
        meddled(layout=None),
        meddled(block=None),
        meddled(layout="no json"),
        meddled(layout="[" * 100_000),
        meddled(layout=json.dumps([])),
        meddled(layout=json.dumps({"facts": []})),
        meddled(layout=json.dumps({})),
        meddled(layout=with_first(size=10**12)),
        meddled(layout=with_first(size=-1)),
        meddled(layout=with_first(size=True)),
        meddled(layout=with_first(shape=[10**12])),
        meddled(layout=with_first(shape=["4"])),
        meddled(layout=with_first(dtype="object")),
        meddled(layout=with_first(half=True)),
        meddled(layout=with_first(half=True, size=8, shape=[5])),
        meddled(block="text"),
        meddled(block=b""),
        meddled(block=b"more" * 1000),
        RecordDict({**packed(message()), "more": ConfigRecord({})}),
        RecordDict({**packed(message()), "tensors": ArrayRecord({"block": Array("uint8", (1,), "bytes", b"x")})}),
        RecordDict({"parcel": ArrayRecord({"block": Array(np.zeros(3))})}),
    ],
    ids=range(23),
)
def test_what_was_not_packed_here_is_refused(parcel: RecordDict):
    with pytest.raises(OrderRefused):
        unpacked(parcel)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.text(max_size=60), st.binary(max_size=40), st.integers(0, 400), st.characters())
def test_a_hostile_parcel_raises_nothing_but_a_refusal(layout: str, block: bytes, place: int, letter: str):
    whole = json.dumps(LAYOUT)
    changed = whole[: place % len(whole)] + letter + whole[place % len(whole) + 1 :]
    for parcel in (meddled(layout=layout, block=block), meddled(layout=changed)):
        try:
            unpacked(parcel)
        except OrderRefused:
            continue
