"""Disk space set aside, so that on a full disk the last words can still be written."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class Reserve:
    """A file that only takes up room, until the room is needed."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size

    def in_place(self) -> bool:
        """Whether the room is set aside; sets it aside where it is not and the disk allows."""
        with contextlib.suppress(OSError):
            if self._path.lstat().st_size == self._size:
                return True
        try:
            self.free()
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            return False
        try:
            os.posix_fallocate(file, 0, self._size)  # takes the blocks; a file with a hole would take none
        except OSError:
            self._path.unlink()
            return False
        finally:
            os.close(file)
        return True

    def free(self) -> bool:
        """Give the room back to the disk; False where there was none to give."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            return False
        return True
