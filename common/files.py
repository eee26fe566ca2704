"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: Path, *parts: bytes) -> None:
    """Replace `path` by `parts`, all or nothing, and have both content and name on disk before returning.

    Raises:
        OSError: the disk is full or read-only; what stood at `path` is untouched.
    """
    replace_atomically(path, parts)


def replace_atomically(path: Path, parts: Iterable[bytes], *, mode: int = 0o666) -> None:
    """The same for parts that are made while they are written; the umask takes its bits off `mode`.

    Raises:
        OSError: the disk is full or read-only; what stood at `path` is untouched.
        Whatever making the parts raises: likewise.
    """
    draft = path.with_name(f".{path.name}.draft")  # always the same, so that one left by a crash is written over
    draft.unlink(missing_ok=True)  # not reused: whoever made it may still have it open, or have opened it to everybody
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # on a full disk half a draft would only be in the way
            draft.unlink(missing_ok=True)
        raise
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(parent)  # else a power cut may bring the old name back
    finally:
        os.close(parent)
