"""The last reply of each study, on disk: an order that comes again is answered with the same tensors, in no time.

A line that breaks for an hour, or a coordinator that was restarted, then costs minutes and not a round of training.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import BinaryIO

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from wardround.common.contents import content_digest
from wardround.common.errors import WardroundError
from wardround.common.files import replace_atomically
from wardround.common.seals import Order

_MAGIC = b"wardround answer 1\n"

log = logging.getLogger("wardround.site")
_LONGEST_HEAD = 64 << 20  # bytes


class Answers:
    """Kept replies, one a study, in an owner-only folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def keep(self, order: Order, content: RecordDict) -> None:
        """Keep what was answered to an order that trained; others are answered anew."""
        if order.action != "train" or order.manifest is None:
            return
        head: dict[str, object] = {"of": _name(order), "digest": content_digest(content), "config": {}, "arrays": {}}
        parts: list[bytes] = []
        for name, record in content.items():
            if isinstance(record, ConfigRecord):
                head["config"][name] = dict(record)  # type: ignore[index]
            elif isinstance(record, ArrayRecord):
                head["arrays"][name] = [  # type: ignore[index]
                    [key, array.dtype, list(array.shape), array.stype, len(array.data)] for key, array in record.items()
                ]
                parts += [array.data for array in record.values()]
        text = json.dumps(head).encode()
        # the order of the coordinator may come again; what it was answered is no secret from it
        try:
            replace_atomically(self._path(order), [_MAGIC, len(text).to_bytes(8, "little"), text, *parts], mode=0o600)
        except OSError as error:  # the answer was paid for and leaves all the same; it can be made again
            log.warning("an answer is not kept: %s", error.strerror)

    def again(self, order: Order) -> RecordDict | None:
        """What this very order, or the same one sealed anew, was answered with; None where it was not, or is not kept."""
        if order.action != "train" or order.manifest is None:
            return None
        try:
            with self._path(order).open("rb") as file:
                return _read(file, order)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, WardroundError):  # none, or damaged: trained anew
            return None

    def _path(self, order: Order) -> Path:
        return self._folder / f"{order.study[:32]}.answer"


def _name(order: Order) -> list[object]:
    assert order.manifest is not None
    return [order.study, order.run, order.round, order.attempt, order.manifest.digest]


def _read(file: BinaryIO, order: Order) -> RecordDict | None:
    if file.read(len(_MAGIC)) != _MAGIC:
        return None
    head = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEAD)))
    if head["of"] != _name(order):
        return None
    found = RecordDict({name: ConfigRecord(record) for name, record in head["config"].items()})
    for name, arrays in head["arrays"].items():
        record = ArrayRecord()
        for key, dtype, shape, stype, size in arrays:
            record[key] = Array(dtype, tuple(shape), stype, _whole(file.read(size), size))
        found[name] = record
    return found if content_digest(found) == head["digest"] else None  # a bit that fell over would be signed as ours


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise ValueError("cut short")
    return data
