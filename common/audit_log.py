"""An append-only log in which every record hangs on the one before, and which others can hold us to.

Records hold names, digests and numbers of rounds; never a patient's value, never another library's message. Each side
writes the head of the other's log into its own (`anchor`), so that not even the owner of a key can rewrite what the other
has seen.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from wardround.common.audit_check import Verified, verify_log
from wardround.common.audit_records import ANCHOR, GENESIS, about_of, digest_of, entries, line_of, speaking_plainly
from wardround.common.disk_reserve import Reserve
from wardround.common.errors import AuditBroken
from wardround.common.trust.signing import Signed, Signer

__all__ = ["AuditLog", "Verified", "verify_log"]

RESERVE = 1 << 20  # bytes; some two thousand records
_LONGEST_TEXT = 500  # characters of one value; what is longer came from somebody else
_EVENT = re.compile(r"[a-z][a-z0-9-]*(\.[a-z0-9-]+)*")
_FULL = (errno.ENOSPC, errno.EDQUOT)

Value = str | int | float | bool


class _Place(NamedTuple):
    seq: int
    digest: str
    end: int  # bytes


class AuditLog:
    """The one writer of a log file; threads may share it, processes may not."""

    def __init__(self, path: Path, file: int, signer: Signer | None, *, about: str, sync: bool, reserve: int) -> None:
        self._file, self._signer, self._about, self._sync = file, signer, about, sync
        self._reserve = Reserve(path.with_name(f"{path.name}.reserve"), reserve)
        self._lock = threading.Lock()
        self._at = _Place(-1, GENESIS, 0)
        self._dirty = self._lost = False

    @classmethod
    def open(cls, path: Path, signer: Signer | None, *, about: str = "", sync: bool = False, reserve: int = RESERVE) -> Self:
        """Open or begin the log at `path`, and write down that it was opened.

        A last line that a crash tore is cut off, and that is written down too.

        Args:
            path: the file; it and what lies beside it belong to this user alone.
            signer: who signs every record; None only where nobody will ever ask.
            about: what tells it from the signer's other logs, such as a study's digest; others name it in their anchors.
            sync: whether every record is on disk before `add` returns, instead of at the next `head`.
            reserve: bytes set aside beside it, for what must be said on a full disk.

        Raises:
            AuditBroken: another process writes it, it was changed, is another's, or cannot be written.
        """
        with speaking_plainly(path):
            file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            log = cls(path, file, signer, about=about, sync=sync, reserve=reserve)
            try:
                _owned_by_us_alone(file, path)
                _ours_to_write(file, path)
                log._catch_up(path)
            except BaseException:
                os.close(file)
                raise
        return log

    def add(self, event: str, /, **body: Value) -> None:
        """Append one record: an event such as "round.done", and what it is about.

        Text is cut after 500 characters. On a full disk the reserve is given up, which is a record of its own.

        Raises:
            AuditBroken: it cannot be written; the log is as it was.
        """
        if not _EVENT.fullmatch(event):
            raise ValueError(f"no name of an event: {event!r}")
        with self._lock, speaking_plainly():
            try:
                self._append(event, body)
            except OSError as error:
                if error.errno not in _FULL or not self._reserve.free():
                    raise
                self._append("log.disk-full", {})
                self._append(event, body)

    def anchor(self, other: str, seq: int, digest: str, *, about: str = "") -> None:
        """Write down the head of somebody else's log `about` something, as it reached us under their signature."""
        self.add(ANCHOR, of=other, about=about, seq=seq, digest=digest)

    @property
    def head(self) -> tuple[int, str]:
        """Number and digest of the newest record, which is on disk when this returns: others may be told.

        Raises:
            AuditBroken: the disk does not take it.
        """
        with self._lock, speaking_plainly():
            self._flush()
            return self._at.seq, self._at.digest

    def sign_head(self) -> Signed:
        """The head as a statement of kind "audit-head": {seq, digest}. Needs a signer."""
        if self._signer is None:
            raise ValueError("a log without a signer has no signed head")
        seq, digest = self.head
        return self._signer.sign("audit-head", {"seq": seq, "digest": digest})

    def has_room(self) -> bool:
        """Whether the reserve is in place, made anew where there is room again. Where it is not, begin nothing."""
        with self._lock:
            return self._reserve.in_place()

    def close(self) -> None:
        """Everything on disk, and the file free for another writer."""
        with self._lock, speaking_plainly():
            if self._file >= 0:
                try:
                    self._flush()
                finally:
                    os.close(self._file)
                    self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _catch_up(self, path: Path) -> None:
        with os.fdopen(os.dup(self._file), "rb") as file:
            for entry in entries(file):
                if entry.statement.signer != (self._signer.name if self._signer else ""):
                    raise AuditBroken("the log belongs to another signer", detail=str(path))
                if entry.seq == 0 and about_of(entry) != self._about:
                    raise AuditBroken("the log is about something else", detail=str(path))
                self._at = _Place(entry.seq, entry.digest, entry.end)
            file.seek(self._at.end)
            torn = file.read()
        self._reserve.in_place()
        if torn:
            os.ftruncate(self._file, self._at.end)
            self.add("log.torn-line", bytes=len(torn), sha256=digest_of(torn))
        self.add("log.opened", about=self._about)
        self._flush()
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)

    def _append(self, event: str, body: dict[str, Value]) -> None:
        if self._lost:
            raise OSError(errno.EIO, "an earlier record may be lost; open it anew")
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        said = {name: _plain(value) for name, value in body.items()}
        facts = {"seq": self._at.seq + 1, "time": now, "event": event, "body": said, "prev": self._at.digest}
        line = line_of(self._signer, facts)
        try:
            if os.write(self._file, line + b"\n") != len(line) + 1:  # one write: whole, or torn and cut below
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._dirty = True
            if self._sync:
                self._flush()
            self._at = _Place(self._at.seq + 1, digest_of(line), self._at.end + len(line) + 1)
        except BaseException:  # Ctrl-C, too, must not leave a record that this object knows nothing of
            self._lost = True
            os.ftruncate(self._file, self._at.end)
            self._lost = False
            raise

    def _flush(self) -> None:
        if self._lost:
            raise OSError(errno.EIO, "an earlier record may be lost; open it anew")
        if self._dirty:
            self._lost = True  # a disk that refused once may say yes the second time and have forgotten
            os.fdatasync(self._file)
            self._dirty = self._lost = False


def _plain(value: Value) -> Value:
    if isinstance(value, str):
        return value[:_LONGEST_TEXT].encode(errors="replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON knows no NaN
    if type(value) in (bool, int, float):
        return value
    raise TypeError(f"a record holds text and numbers, not {type(value).__name__}")


def _owned_by_us_alone(file: int, path: Path) -> None:
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise AuditBroken("the log is not a file of this user alone", detail=f"{path}: wanted mode 600")


def _ours_to_write(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AuditBroken("the log is open in another process", detail=str(path)) from None
