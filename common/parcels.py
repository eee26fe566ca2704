"""A message in as few parts as Flower can carry: each part of a message costs a request on a network, however small it is.

All facts become one record; all tensors become one block of bytes, inside that record where it is small, else one array that
Flower cuts into pieces of its own and keeps once for all sites. What is unpacked is what was packed, to the bit; nothing in a
parcel is believed before its seal is checked, so here only shapes and sizes are.
"""

from __future__ import annotations

import json
import math
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from wardround.common.errors import OrderRefused

_FACTS, _TENSORS, _LAYOUT, _BLOCK = "parcel", "tensors", "layout", "block"
_INLINE = 256 << 10  # bytes
_MOST_TENSORS = 100_000
_ITEM = {"float32": 4}  # bytes of a number; nothing else travels


def packed(content: RecordDict) -> RecordDict:
    """`content` as a parcel.

    Args:
        content: config records and at most one array record, whose arrays are float32 in NumPy's format.
    """
    facts: dict[str, Any] = {}
    layout: dict[str, list[list[Any]]] = {}
    block: list[bytes] = []
    for name, record in content.items():
        if isinstance(record, ConfigRecord):
            facts |= {f"{name}/{key}": value for key, value in record.items()}
        elif isinstance(record, ArrayRecord):
            layout[name] = [
                [key, array.dtype, list(array.shape), array.stype, len(array.data)] for key, array in record.items()
            ]
            block += [array.data for array in record.values()]
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
        for key, dtype, shape, stype, size in arrays:
            if type(size) is not int or size < _ITEM[dtype] * math.prod(shape) or start + size > len(data):
                raise ValueError
            record[key] = Array(dtype, tuple(shape), stype, data[start : start + size])
            start += size
    if start != len(data):
        raise ValueError
    return found
