"""Whether an audit log still says what it said when it was written."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from wardround.common.audit_records import ANCHOR, Entry, about_of, entries, speaking_plainly
from wardround.common.errors import AuditBroken, SignatureRefused
from wardround.common.trust.signing import verify

if TYPE_CHECKING:
    from cryptography import x509


@dataclass(frozen=True)
class Verified:
    """A log that holds.

    Attributes:
        log: who signs it.
        about: what tells it from other logs of theirs.
        records: how many.
        digest: of the newest.
        first: time of the first record; `last` likewise.
        signature_checked: whether a certificate was given to check the newest signature with.
        anchors: how many heads known to others were found in it.
    """

    log: str
    about: str
    records: int
    digest: str
    first: str
    last: str
    signature_checked: bool
    anchors: int


def verify_log(path: Path, certificate: x509.Certificate | None = None, anchors: Iterable[tuple[int, str]] = ()) -> Verified:
    """Check that nothing in a log was changed, cut out, put in, moved or written anew.

    Args:
        path: the log; its writer may have it open.
        certificate: of its signer; without it a log that was rewritten under a made-up signature passes.
        anchors: (seq, digest) of heads that others have seen; without them its signer can rewrite it.

    Raises:
        AuditBroken: naming the first record that is wrong.
    """
    known = sorted(set(anchors))
    wanted = {seq for seq, _ in known}
    first = last = None
    seen: dict[int, str] = {}
    with speaking_plainly(path), path.open("rb") as file:
        for entry in entries(file):
            first, last = first or entry, entry
            if entry.seq in wanted:
                seen[entry.seq] = entry.digest
        torn = file.tell() > (last.end if last else 0) and not _is_open(file)  # else its writer is writing it right now
    if first is None or last is None:
        raise AuditBroken("the log holds no record")
    for seq, digest in known:
        if seq > last.seq:
            raise AuditBroken(f"the log ends with record {last.seq}, but others have seen record {seq}: it was cut or restored")
        if seen.get(seq) != digest:
            raise AuditBroken(f"record {seq} is not the one that others have seen: the log was rewritten")
    if torn:
        raise AuditBroken(f"record {last.seq + 1} is torn: a crash, or a cut; opening the log cuts it off and writes that down")
    _check_signature(last, certificate)
    return Verified(
        log=last.statement.signer,
        about=about_of(first),
        records=last.seq + 1,
        digest=last.digest,
        first=first.time,
        last=last.time,
        signature_checked=certificate is not None,
        anchors=len(known),
    )


def anchors_about(log: str, path: Path, *, about: str = "") -> list[tuple[int, str]]:
    """The heads of the log of `log` about `about` that the log at `path` has written down.

    Raises:
        AuditBroken: that log does not hold together, or knows nothing of the other.
    """
    with speaking_plainly(path), path.open("rb") as file:
        anchors = [entry.body for entry in entries(file) if entry.event == ANCHOR]
    found = [body for body in anchors if (body.get("of"), body.get("about", "")) == (log, about)]
    if not found:
        raise AuditBroken(f"{path.name} holds no head of this log of {log or 'nobody'}")
    return [_head_in(body) for body in found]


def _head_in(body: dict[str, Any]) -> tuple[int, str]:
    seq, digest = body.get("seq"), body.get("digest")
    if type(seq) is not int or type(digest) is not str:
        raise AuditBroken("a head of another log is written down without its number or digest")
    return seq, digest


def _is_open(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _check_signature(last: Entry, certificate: x509.Certificate | None) -> None:
    if not last.statement.signer:
        raise AuditBroken(f"record {last.seq}, the last, is not signed: whoever wrote it could have written all of them")
    if certificate is not None:
        try:
            verify(last.statement, certificate)
        except SignatureRefused:
            raise AuditBroken(f"record {last.seq}, the last, is not signed with that certificate's key") from None
