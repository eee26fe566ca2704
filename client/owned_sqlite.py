"""SQLite files that a hospital's safety rests on: nobody else reads them, and every change is whole or did not happen."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path


def owned_by_us_alone(path: Path, what: str) -> None:
    """Make the file where there is none; nobody else may read it, and a link may not lead elsewhere.

    Raises:
        OSError: it is a link, or cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.is_symlink():
        raise OSError(f"the {what} is a symbolic link")
    # an existing file is not opened here: closing it would drop SQLite's locks of this process on it
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    path.chmod(path.stat().st_mode & 0o700)


@contextlib.contextmanager
def whole_change(database: sqlite3.Connection) -> Iterator[None]:
    """One writer at a time, over all processes; everything or nothing."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise
