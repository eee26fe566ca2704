"""A refusal as an ordinary message, so that it can be sealed; Flower's own error replies cannot."""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

from wardround.common.errors import UpdateRefused

REFUSED = 700  # codes of error replies; Flower keeps those below 100 for itself
INTERNAL = 701
ROUND_TAKEN = 702

_REFUSAL = "refusal"
_LONGEST = 1000  # characters


def refusal(code: int, text: str) -> RecordDict:
    """A message that says no, with one of the codes above and a reason; a long one is cut."""
    return RecordDict({_REFUSAL: ConfigRecord({"code": code, "text": text[:_LONGEST]})})


def refusal_in(content: RecordDict) -> tuple[int, str] | None:
    """(code, text) of a refusal; None where the message is something else.

    Raises:
        UpdateRefused: it looks like a refusal and is none.
    """
    if _REFUSAL not in content:
        return None
    record = content[_REFUSAL]
    if len(content) == 1 and isinstance(record, ConfigRecord) and set(record) == {"code", "text"}:
        code, text = record["code"], record["text"]
        if type(code) is int and isinstance(text, str) and len(text) <= _LONGEST:
            return code, text
    raise UpdateRefused("the refusal cannot be read")
