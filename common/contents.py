"""What a message holds, as one digest, and which model it carries, tensor by tensor.

A digest covers the name, kind and every bit of every record: the dtype, shape, format and bytes of arrays, and of all other
values their type as well, so that 1, 1.0 and true differ. Each part is hashed alone and the list of hashes once more, as JSON,
so no bytes can move from one part to the next. Order does not count, because transport does not keep it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from wardround.common.errors import OrderRefused

Parts = dict[str, list[Any]]  # record -> [kind, {key: what it holds}]
Tensors = list[list[Any]]  # [name, dtype, shape, SHA-256 of the bytes], by name

_KINDS: dict[type, str] = {ArrayRecord: "arrays", ConfigRecord: "config", MetricRecord: "metrics"}


def parts_of(content: RecordDict, hashed: Mapping[str, str] | None = None) -> Parts:
    """Each record in short; every byte of an array is read once, unless its hash is known.

    Args:
        content: the message.
        hashed: SHA-256 of arrays of the record "model", by name, which is then taken on trust.

    Raises:
        OrderRefused: it holds what Flower cannot send.
    """
    try:
        return {
            str(name): [_kind(record), {key: _value(record[key], known.get(key)) for key in record}]
            for name, record in content.items()
            for known in [hashed if hashed and name == "model" else {}]
        }
    except (TypeError, ValueError, AttributeError, RecursionError, OverflowError):
        raise OrderRefused("the message holds something that cannot be sent") from None


def content_digest(content: RecordDict) -> str:
    """SHA-256 over everything in `content`, in hex.

    Raises:
        OrderRefused: it holds what Flower cannot send.
    """
    return digest_of(parts_of(content))


def digest_of(parts: Parts) -> str:
    """The same, of parts at hand."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tensors_of(parts: Parts, record: str) -> Tensors:
    """The arrays of one record."""
    return [[name, dtype, shape, sha256] for name, (dtype, shape, _, sha256) in sorted(parts[record][1].items())]


def model_manifest(
    record: ArrayRecord, *, study: str, run: str, round: int, previous: str, action: str = "train"
) -> dict[str, Any]:
    """What the coordinator signs, as kind "model", of the one model that all sites get in a round.

    The same model gives the same manifest, so two hospitals can compare what they were sent, and a round that is ordered
    again after a crash changes nothing.

    Args:
        record: the model.
        study: SHA-256 of the plan's text.
        run: which run of it.
        round: counted from 1.
        previous: digest of the manifest of the round before, for a model to be trained ("" in round 1); for one to be
            judged, that of the same round.
        action: Flower's type of the message it goes with: "train" or "evaluate".
    """
    tensors = tensors_of(parts_of(RecordDict({"model": record})), "model")
    return {"study": study, "run": run, "action": action, "round": round, "tensors": tensors, "previous": previous}


def _kind(record: object) -> str:
    return next(kind for of, kind in _KINDS.items() if isinstance(record, of))


def _value(value: object, known: str | None = None) -> list[Any]:
    if isinstance(value, Array):
        sha256 = known or hashlib.sha256(value.data).hexdigest()  # a LiveArray makes its bytes here, once
        return [str(value.dtype), [int(size) for size in value.shape], str(value.stype), sha256]
    if isinstance(value, bool):
        return ["bool", value]
    if isinstance(value, int):
        return ["int", hex(value)]
    if isinstance(value, float):
        return ["float", struct.pack(">d", value).hex()]  # every bit, also of what is no number
    if isinstance(value, str):
        return ["text", value]
    if isinstance(value, bytes):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    if isinstance(value, list):
        return ["list", [_value(one) for one in value]]
    raise TypeError
