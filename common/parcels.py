"""A message in as few parts as Flower can carry: each part of a message costs a request on a network, however small it is.

All facts become one record; all tensors become one block of bytes, inside that record where it is small, else one array that
Flower cuts into pieces of its own and keeps once for all sites. What is unpacked is what was packed, to the bit; nothing in a
parcel is believed before its seal is checked, so here only shapes and sizes are.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from wardround.common.errors import OrderRefused

_FACTS, _TENSORS, _LAYOUT, _BLOCK = "parcel", "tensors", "layout", "block"
_INLINE = 256 << 10  # bytes
_MOST_TENSORS = 100_000
_ITEM = {"float32": 4}  # bytes of a number; nothing else travels


def packed(content: RecordDict, *, halves: bool = False) -> RecordDict:
    """`content` as a parcel.

    Args:
        content: config records and at most one array record, whose arrays are float32 in NumPy's format.
        halves: send arrays as float16 whose every number float16 can hold, which `unpacked` undoes.
    """
    facts: dict[str, Any] = {}
    layout: dict[str, list[list[Any]]] = {}
    block: list[bytes] = []
    for name, record in content.items():
        if isinstance(record, ConfigRecord):
            facts |= {f"{name}/{key}": value for key, value in record.items()}
        elif isinstance(record, ArrayRecord):
            layout[name] = []
            for key, array in record.items():
                half = _halved(array) if halves else None
                block.append(array.data if half is None else half)
                layout[name].append([key, array.dtype, list(array.shape), array.stype, len(block[-1]), half is not None])
        else:
            raise OrderRefused("the message holds something that cannot be sent")
    data = b"".join(block)
    facts[_LAYOUT] = json.dumps(layout)
    found = RecordDict()
    if len(data) <= _INLINE:
        facts[_BLOCK] = data
    else:
        found[_TENSORS] = ArrayRecord({_BLOCK: Array("uint8", (len(data),), "bytes", data)})
    found[_FACTS] = ConfigRecord(facts)
    return found


def unpacked(parcel: RecordDict) -> RecordDict:
    """What was packed.

    Raises:
        OrderRefused: it is no parcel, or the sizes in it are not those of what is there.
    """
    try:
        return _unpacked(parcel)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise OrderRefused("the message is no parcel of wardround's") from None


def _unpacked(parcel: RecordDict) -> RecordDict:
    record = parcel[_FACTS]
    if not isinstance(record, ConfigRecord) or not set(parcel) <= {_FACTS, _TENSORS}:
        raise ValueError
    facts = dict(record)
    layout, data = json.loads(str(facts.pop(_LAYOUT))), facts.pop(_BLOCK, None)
    if _TENSORS in parcel:
        tensors = parcel[_TENSORS]
        if data is not None or not isinstance(tensors, ArrayRecord) or set(tensors) != {_BLOCK}:
            raise ValueError
        data = tensors[_BLOCK].data
    if not isinstance(data, bytes) or not isinstance(layout, dict):
        raise ValueError
    configs: dict[str, dict[str, Any]] = {}
    for path, value in facts.items():
        name, _, key = path.partition("/")
        configs.setdefault(name, {})[key] = value
    found = RecordDict({name: ConfigRecord(values) for name, values in configs.items()})
    start = 0
    for name, arrays in layout.items():
        if name in configs or len(arrays) > _MOST_TENSORS:
            raise ValueError
        record = found[name] = ArrayRecord()
        for key, dtype, shape, stype, size, half in arrays:
            least = _ITEM[dtype] * math.prod(shape) // (2 if half else 1)
            if type(size) is not int or size < least or start + size > len(data) or (half and size != least):
                raise ValueError
            part = data[start : start + size]
            record[key] = Array(dtype, tuple(shape), stype, _doubled(part, shape) if half else part)
            start += size
    if start != len(data):
        raise ValueError
    return found


def _halved(array: Array) -> bytes | None:
    """The numbers as float16, where that loses nothing and `_doubled` gives the same bytes back; else None."""
    if array.dtype != "float32" or array.stype != "numpy.ndarray":
        return None
    numbers = np.frombuffer(array.data, "<f4", offset=len(array.data) - 4 * math.prod(array.shape))
    with np.errstate(over="ignore", invalid="ignore"):
        half = numbers.astype("<f2")
    same = bool(np.array_equal(half.astype("<f4").view("<u4"), numbers.view("<u4")))  # of bits, so that NaN is no exception
    data = half.tobytes()
    return data if same and _doubled(data, array.shape) == array.data else None


def _doubled(data: bytes, shape: Sequence[int]) -> bytes:
    """float16 numbers as a float32 array in NumPy's format."""
    found = io.BytesIO()
    np.save(found, np.frombuffer(data, "<f2").astype("<f4").reshape(tuple(shape)), allow_pickle=False)
    return found.getvalue()
