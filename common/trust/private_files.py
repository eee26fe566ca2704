"""Secrets on disk: nobody but their owner reads them, and a file that others could have read is refused."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from wardround.common.errors import ConfigError

LARGEST_SECRET = 1 << 20  # bytes; a key is a page


def write_private(path: Path, data: bytes) -> None:
    """A new file of mode 0600 that is whole and on disk when this returns; nothing is ever written over.

    Raises:
        ConfigError: something stands at `path`, be it a link that leads nowhere.
        OSError: the disk is full or read-only; nothing was made.
    """
    with _draft(path, data) as draft:
        try:
            os.link(draft, path, follow_symlinks=False)  # unlike a rename, it takes nobody's place
        except FileExistsError:
            raise ConfigError(f"{path} exists and is not written over") from None


def replace_private(path: Path, data: bytes) -> None:
    """Replace `path` by a file of mode 0600, all or nothing.

    Raises:
        OSError: the disk is full or read-only; what stood at `path` is untouched.
    """
    with _draft(path, data) as draft:
        draft.replace(path)


def read_private(path: Path) -> bytes:
    """The content of a secret that only this user could read or write.

    Raises:
        ConfigError: missing, a link, no ordinary file, open to others, another user's, empty or far too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block for ever
    except OSError as error:
        link = error.errno == errno.ELOOP
        said = "is a symbolic link, wanted the file itself" if link else f"cannot be read: {error.strerror}"
        raise ConfigError(f"{path} {said}") from None
    try:
        problem = _problem(os.fstat(descriptor))  # of what was opened, not of what may stand there by now
        if problem:
            raise ConfigError(f"{path} {problem}")
        return os.read(descriptor, LARGEST_SECRET)
    finally:
        os.close(descriptor)


def make_private_folder(path: Path) -> None:
    """Make `path` with mode 0700, or check that it is such a folder of this user.

    Raises:
        ConfigError: it is a link, no folder, or open to others.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path} is not a folder")
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to user {found.st_uid}, wanted {os.geteuid()}")
    if found.st_mode & 0o077:
        raise ConfigError(f"{path} has mode {found.st_mode & 0o777:o}, wanted 700: secrets lie in it")


def _problem(found: os.stat_result) -> str:
    problems = {
        "is not an ordinary file": not stat.S_ISREG(found.st_mode),
        f"belongs to user {found.st_uid}, wanted {os.geteuid()}": found.st_uid != os.geteuid(),
        f"has mode {found.st_mode & 0o777:o}, wanted 600: others may have read it": bool(found.st_mode & 0o077),
        "is empty": found.st_size == 0,
        f"has {found.st_size} bytes; a secret has at most {LARGEST_SECRET}": found.st_size > LARGEST_SECRET,
    }
    return next((said for said, true in problems.items() if true), "")


@contextlib.contextmanager
def _draft(path: Path, data: bytes) -> Iterator[Path]:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # two writers never share one
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield draft
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
