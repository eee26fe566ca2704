"""What crosses the wire comes out as it went in, or is refused before it does harm."""

from __future__ import annotations

import io
import math
import string
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wardround.common.errors import OrderRefused, UpdateRefused
from wardround.common.messages import (
    CountedFacts,
    CountFacts,
    Facts,
    Farewell,
    LookFacts,
    OrderFacts,
    Present,
    RollCall,
    Settled,
    TallyFacts,
    UpdateFacts,
    pack_with_model,
    unpack_model,
)
from wardround.common.weights import Shapes, Weights, digest, norm, pack, unpack

WORDS = st.text(max_size=1000).filter(lambda text: text.isprintable())
NUMBERS = st.integers(-(2**63), 2**63 - 1)
VALUES: dict[str, st.SearchStrategy[object]] = {"int": NUMBERS, "str": WORDS, "bytes": st.binary(max_size=1000)}
FACTS: dict[type[Facts], st.SearchStrategy[Facts]] = {
    kind: st.builds(kind, **{part.name: VALUES[str(part.type)] for part in fields(kind)})
    for kind in (RollCall, Present, OrderFacts, UpdateFacts, LookFacts, TallyFacts, CountFacts, CountedFacts, Farewell, Settled)
}
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
UPDATE = UpdateFacts("va", "a" * 64, "b" * 16, 3, 1, "c" * 64, 3)
MODEL = {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.0, -1.0])}


def sent(content: RecordDict) -> RecordDict:
    """Through Flower's own bytes."""
    return recorddict_from_proto(ProtoRecordDict.FromString(recorddict_to_proto(content).SerializeToString()))


# ---- facts


@given(st.sampled_from(list(FACTS)).flatmap(FACTS.__getitem__))
@settings(max_examples=200, deadline=None)
def test_facts_arrive_as_they_were_sent(facts: Facts):
    assert type(facts).unpack(sent(facts.pack())) == facts


@pytest.mark.parametrize(
    "change",
    [
        {"round": None},
        {"records": 120},
        {"round": True},
        {"round": 1.0},
        {"round": "1"},
        {"site": 7},
        {"site": b"va"},
        {"site": ["va"]},
        {"site": "v" * 1001},
        {"kind": "order"},
        {"kind": ["update"]},
        {"kind": None},
    ],
    ids=str,
)
def test_facts_that_are_not_what_was_asked_for_are_refused(change: dict[str, object]):
    told = {key: value for key, value in ({**UPDATE.record()} | change).items() if value is not None}
    with pytest.raises(OrderRefused):
        UpdateFacts.unpack(sent(RecordDict({"facts": ConfigRecord(told)})))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", FACTS, ids=lambda kind: kind.kind)
def test_one_kind_of_facts_is_never_taken_for_another(kind: type[Facts]):
    for other in FACTS:
        if other is not kind:
            with pytest.raises(OrderRefused, match=f"no {kind.kind}"):
                kind.unpack(RecordDict({"facts": ConfigRecord({"kind": other.kind})}))


def test_a_message_holds_facts_and_one_model_and_nothing_else():
    shapes = Shapes.like(MODEL)
    whole = pack_with_model(UPDATE, MODEL)
    assert unpack_model(sent(whole), shapes).keys() == MODEL.keys()
    for hostile in (
        RecordDict(),
        UPDATE.pack(),
        RecordDict({**whole, "metrics": MetricRecord({"patients": 120})}),
        RecordDict({"facts": UPDATE.record(), "model": MetricRecord({"w": 1.0})}),
        RecordDict({"facts": UPDATE.record(), "model": ConfigRecord({"w": b""})}),
        RecordDict({"facts": UPDATE.record(), "model": pack(MODEL), "more": pack(MODEL)}),
    ):
        with pytest.raises(OrderRefused, match="facts and one model"):
            unpack_model(sent(hostile), shapes)


# ---- tensors


@given(SHAPES, st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_a_tensor_of_any_shape_keeps_every_bit(shape: tuple[int, ...], seed: int):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for layout in (tensor, tensor.permute(tuple(reversed(range(len(shape)))))):
        weights = {"w": layout}
        there = sent(RecordDict({"model": pack(weights)})).array_records["model"]
        assert type(there["w"]) is Array
        back = unpack(there, Shapes.like(weights))["w"]
        assert back.shape == layout.shape
        assert back.numpy().tobytes() == layout.contiguous().numpy().tobytes()


def test_not_a_number_travels_too_and_shows_in_the_norm():
    for bad in (math.nan, math.inf, -math.inf):
        weights = {"w": torch.tensor([1.0, bad]), "b": torch.ones(3)}
        back = unpack(sent(RecordDict({"m": pack(weights)})).array_records["m"], Shapes.like(weights))
        assert not math.isfinite(norm(back))


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


def npz(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


def headed(header: str, body: bytes = bytes(24)) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header.encode()).to_bytes(2, "little") + header.encode() + body


def array(data: bytes, shape: tuple[int, ...] = (2, 3), dtype: str = "float32", stype: str = "numpy.ndarray") -> Array:
    return Array(dtype, shape, stype, data)


GOOD = np.arange(6, dtype=np.float32).reshape(2, 3)
HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
BAD: dict[str, Array] = {
    "wrong shape": array(npy(GOOD.T.copy()), (3, 2)),
    "a shape that would broadcast": array(npy(GOOD[0, :1].copy()), (1,)),
    "no shape at all": array(npy(np.float32(1).reshape(())), ()),
    "float64": array(npy(GOOD.astype(np.float64)), dtype="float64"),
    "float64 called float32": array(npy(GOOD.astype(np.float64))),
    "int32 called float32": array(npy(GOOD.astype(np.int32))),
    "float16 called float32": array(npy(GOOD.astype(np.float16))),
    "big-endian": array(npy(GOOD.astype(">f4"))),
    "complex": array(npy(GOOD[:, :3].astype(np.complex64)), dtype="complex64"),
    "complex called float32": array(npy(GOOD.astype(np.complex64))),
    "text": array(npy(np.array([["a"] * 3] * 2)), dtype="<U1"),
    "text called float32": array(npy(np.array([["a"] * 3] * 2))),
    "objects": array(headed("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }", b"cposix\nsystem\n" + bytes(10))),
    "an npz body": array(npz(GOOD)),
    "another serialisation": array(npy(GOOD), stype="torch.Tensor"),
    "a header of 10^12 numbers": array(headed("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }")),
    "10^12 numbers, also declared": array(headed(HEADER), (10**6, 10**6)),
    "another shape in the header": array(npy(GOOD.T.copy())),
    "cut off": array(npy(GOOD)[:-1]),
    "bytes behind the end": array(npy(GOOD) + b"\0"),
    "column order": array(npy(np.asfortranarray(GOOD))),
    "npy version 2": array(npy(GOOD, (2, 0))),
    "npy version 3": array(npy(GOOD, (3, 0))),
    "a huge header": array(headed(HEADER + " " * 60_000)),
    "an open bracket": array(headed(HEADER + "(")),
    "four thousand brackets": array(headed("[" * 4000)),
    "four thousand signs": array(headed("-" * 4000 + "1")),
    "a structured dtype": array(headed("{'descr': ('<f4',), 'fortran_order': False, 'shape': (2, 3), }")),
    "Python 2 numbers": array(headed("{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L), }")),
    "nothing": array(b""),
    "a header only": array(b"\x93NUMPY\x01\x00"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_tensor_that_is_not_the_plans_is_refused_before_memory_is_taken(bad: Array):
    record = sent(RecordDict({"model": ArrayRecord({"w": bad})})).array_records["model"]
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(UpdateRefused, match="tensor w"):
            unpack(record, Shapes({"w": (2, 3)}))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        assert time.process_time() - start < 1
    finally:
        tracemalloc.stop()


def test_a_missing_tensor_and_one_too_many_are_refused():
    shapes = Shapes.like(MODEL)
    with pytest.raises(UpdateRefused, match="tensor b is missing"):
        unpack(pack({"w": MODEL["w"]}), shapes)
    with pytest.raises(UpdateRefused, match="1 tensors are not part of the model"):
        unpack(pack({**MODEL, "x\x1b[31m": torch.zeros(1)}), shapes)


def test_inside_one_process_a_tensor_is_checked_as_well():
    for wrong in (torch.zeros(3, 2), torch.zeros(1), torch.zeros(2, 3, dtype=torch.float64)):
        record = pack({"w": wrong})
        record["w"].__dict__["shape"] = (2, 3)  # what it says of itself
        with pytest.raises(UpdateRefused):
            unpack(record, Shapes({"w": (2, 3)}))


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise_anything_but_a_refusal(data: bytes):
    refused_or_read(data)
    refused_or_read(b"\x93NUMPY\x01\x00" + data)


@given(st.lists(st.tuples(st.integers(0, 151), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, 152))
@settings(max_examples=500, deadline=None)
def test_no_damage_to_honest_bytes_raises_anything_but_a_refusal(changes: list[tuple[int, int]], end: int):
    data = bytearray(npy(GOOD))
    for place, value in changes:
        data[place] = value
    refused_or_read(bytes(data))
    refused_or_read(bytes(data[:end]))


@given(st.text(alphabet=string.printable, max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_header_raises_anything_but_a_refusal(header: str):
    refused_or_read(headed(header))
    refused_or_read(headed(HEADER[:-1] + header))


def refused_or_read(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            (tensor,) = unpack(ArrayRecord({"w": array(data)}), Shapes({"w": (2, 3)})).values()
        except UpdateRefused:
            return
    assert tensor.shape == (2, 3)
    assert tensor.dtype == torch.float32


# ---- identity

CHANGES: dict[str, Callable[[Weights], Weights]] = {
    "a name": lambda w: {"v": w["w"], "b": w["b"]},
    "a shape": lambda w: {"w": w["w"].view(3, 2), "b": w["b"]},
    "a value": lambda w: {"w": w["w"] + torch.eye(2, 3) * 1e-6, "b": w["b"]},
    "the sign of a zero": lambda w: {"w": -w["w"], "b": w["b"]},
    "a tensor less": lambda w: {"w": w["w"]},
    "a tensor more": lambda w: {**w, "c": torch.zeros(0)},
    "tensors exchanged": lambda w: {"w": w["b"], "b": w["w"]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_digest_names_one_model(change: Callable[[Weights], Weights]):
    first: dict[str, Tensor] = {"w": torch.zeros(2, 3), "b": torch.zeros(3)}
    assert digest(change(first)) != digest(first)


def test_a_digest_is_the_same_however_the_model_is_held():
    first = {"w": torch.randn(4, 3), "b": torch.randn(())}
    assert digest({"b": first["b"], "w": first["w"].T.contiguous().T}) == digest(first)
