"""The lines of an audit log: each a signed statement that names the digest of the line before it.

    {"body": {"body": {...}, "event": "...", "prev": "...", "seq": 7, "time": "..."}, "kind": "audit", "signature", "signer"}

A line is what `trust.signing.Signed` writes; its digest is SHA-256 over all its bytes. So the newest signature stands for
every line, and a renewed key needs no old certificate. Without a signer both its fields are empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from wardround.common.errors import AuditBroken, ConfigError, SignatureRefused
from wardround.common.trust.signing import LARGEST_SIGNED, Signed, Signer

GENESIS = "0" * 64
KIND = "audit"
ANCHOR = "log.anchor"  # of whom, about what, and the head of theirs: seq and digest
_UNSIGNED = '"signature":"","signer":""}'  # how a line without a signer ends
_FIELDS = {"body": dict, "event": str, "prev": str, "seq": int, "time": str}
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One record of a log that hangs together up to here.

    Attributes:
        time: UTC, as the clock of the machine had it.
        digest: SHA-256 of its line.
        end: bytes of the file up to here.
    """

    seq: int
    time: str
    event: str
    body: dict[str, Any]
    statement: Signed
    digest: str
    end: int


def line_of(signer: Signer | None, facts: dict[str, Any]) -> bytes:
    """A record as it stands in the file, without its line feed."""
    signed = signer.sign(KIND, facts) if signer else Signed(KIND, "", facts, "")
    return signed.text().encode()


def digest_of(line: bytes) -> str:
    """What the next record names."""
    return hashlib.sha256(line).hexdigest()


def about_of(first: Entry) -> str:
    """What a log is about, by its first record; empty where its signer has only one."""
    return str(first.body.get("about", ""))


def entries(file: BinaryIO) -> Iterator[Entry]:
    """The records of a log, checked one by one against the one before; a last line without its line feed is left out.

    Raises:
        AuditBroken: naming the first record that is not what was written.
    """
    seq, digest, end, signer = 0, GENESIS, 0, None
    while (line := file.readline(LARGEST_SIGNED + 2)).endswith(b"\n"):
        statement = _statement(line[:-1], seq)
        facts = statement.body
        if facts["seq"] != seq:
            raise AuditBroken(f"record {seq} is missing or out of order: record {facts['seq']} stands there")
        if facts["prev"] != digest:
            raise AuditBroken(f"record {seq} does not follow record {seq - 1}: one of them was changed")
        if signer not in (None, statement.signer):
            raise AuditBroken(f"record {seq} is signed by {statement.signer or 'nobody'}, those before by {signer or 'nobody'}")
        digest, end, signer = digest_of(line[:-1]), end + len(line), statement.signer
        yield Entry(seq, facts["time"], facts["event"], facts["body"], statement, digest, end)
        seq += 1
    if len(line) > LARGEST_SIGNED:
        raise AuditBroken(f"record {seq} is longer than any record")


def _statement(line: bytes, seq: int) -> Signed:
    try:
        text = line.decode("ascii")
        statement = _unsigned(text) if text.endswith(_UNSIGNED) else Signed.parse(text, kind=KIND)
        facts = statement.body
        if {key: type(value) for key, value in facts.items()} != _FIELDS or not _HEX.fullmatch(facts["prev"]):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError, SignatureRefused, ConfigError):
        raise AuditBroken(f"record {seq} is damaged") from None
    return statement


def _unsigned(text: str) -> Signed:
    statement = Signed(**json.loads(text))
    if statement.kind != KIND or statement.text() != text:
        raise ValueError
    return statement


@contextlib.contextmanager
def speaking_plainly(path: Path | None = None) -> Iterator[None]:
    """What the system says of a log, as `AuditBroken`."""
    try:
        yield
    except OSError as error:
        raise AuditBroken(f"the log cannot be read or written: {error.strerror}", detail=str(path or "")) from None
