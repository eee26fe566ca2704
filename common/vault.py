"""Files at rest that only the holder of a key reads, and that nobody changes, cuts, swaps or renames unnoticed.

Every file has a key of its own, wrapped under the vault's (see `sealed_file`), so a new vault key wraps those keys anew
and leaves the content as it is.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Self

from wardround.common.errors import VaultBroken
from wardround.common.files import replace_atomically, write_atomically
from wardround.common.key_sources import KEY_BYTES, Secret, secret_of
from wardround.common.sealed_file import LONGEST_LABEL, Header, copied, key_id, opened, sealed, unwrapped, wrapped


@dataclass(frozen=True)
class Vault:
    """Writes and reads sealed files; the one of `Vault.none()` writes and reads plain ones."""

    secret: Secret | None

    @classmethod
    def open(cls, source: str) -> Self:
        """The vault whose key `source` names: a key file, `passphrase:FILE` or `credential:NAME`.

        Raises:
            ConfigError: there is no such key, or others could have read it.
        """
        return cls(secret_of(source))

    @classmethod
    def none(cls) -> Self:
        """No encryption."""
        return cls(None)

    @property
    def seals(self) -> bool:
        """Whether what it writes is encrypted."""
        return self.secret is not None

    def write(self, path: Path, *parts: bytes, label: str) -> None:
        """Replace `path` by `parts`, one after the other; a crash leaves the old file or the new one, whole.

        The label says what the file is; it is readable without the key, and checked when the file is read.

        Raises:
            OSError: the disk is full or read-only; what stood at `path` is untouched.
        """
        if self.secret is None:
            return write_atomically(path, *parts)
        key = secrets.token_bytes(KEY_BYTES)
        blank = Header(b"", self.secret.salt, b"", b"", sum(len(part) for part in parts), label.encode())
        if len(blank.label) > LONGEST_LABEL:
            raise ValueError(f"a label of {len(blank.label)} bytes, wanted at most {LONGEST_LABEL}")
        replace_atomically(path, sealed(wrapped(blank, key, self.secret), key, parts), mode=0o600)

    def read(self, path: Path, *, label: str | None = None) -> bytes | bytearray:
        """The whole content of `path`; where `label` is given, it must have been written with that one.

        Raises:
            VaultBroken: it is not sealed, or with another key, or damaged, or is something else, or cannot be read.
        """
        if self.secret is None:
            with _named(path):
                return path.read_bytes()
        whole = bytearray()
        for chunk in self.stream(path, label=label):
            whole += chunk
        return whole

    def stream(self, path: Path, *, label: str | None = None) -> Iterator[bytes]:
        """The same, a chunk at a time. A chunk is genuine when it comes out; the file is once the last one has.

        Raises:
            VaultBroken: as in `read`, at the chunk where it shows.
        """
        if self.secret is None:
            raise ValueError("a plain file needs no vault to be read")
        with _named(path), path.open("rb") as file:
            header, key = self._opened(file, path.name, label)
            yield from opened(file, header, key, path.name)

    def holds(self, path: Path) -> bool:
        """Whether `path` is sealed with this vault's key; only its header is looked at.

        Raises:
            VaultBroken: it is no sealed file, or its header is damaged.
        """
        with _named(path), path.open("rb") as file:
            header = Header.read(file, path.name)
        if self.secret is None or key_id(self.secret.key(header.passphrase_salt)) != header.key_id:
            return False
        unwrapped(header, self.secret, path.name)
        return True

    def hand_over(self, path: Path, new: Vault) -> None:
        """Wrap the key of `path` for the vault `new`, atomically; its content is copied as it is.

        Raises:
            VaultBroken: it cannot be opened with this vault's key.
            OSError: the disk is full or read-only; the file is as it was.
        """
        if new.secret is None:
            raise ValueError("a file is handed over to a vault with a key")
        with path.open("rb") as file:
            header, key = self._opened(file, path.name, None)
            mine = wrapped(replace(header, passphrase_salt=new.secret.salt), key, new.secret)
            replace_atomically(path, copied(mine, file), mode=0o600)

    def _opened(self, file: BinaryIO, name: str, label: str | None) -> tuple[Header, bytes]:
        header = Header.read(file, name)
        assert self.secret is not None
        key = unwrapped(header, self.secret, name)
        if label is not None and header.label != label.encode():
            raise VaultBroken(f"{name} is sealed as {header.label.decode(errors='replace')!r}, not as {label!r}")
        return header, key


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VaultBroken(f"{path.name} cannot be read: {error.strerror}") from None
