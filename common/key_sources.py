"""Where a vault's key comes from: a file of 32 random bytes, a passphrase in a file, or a credential of systemd.

    FILE or file:FILE     32 random bytes, as `wardround vault new-key` writes them
    passphrase:FILE       the first line of FILE, through scrypt
    credential:NAME       32 random bytes that systemd put at $CREDENTIALS_DIRECTORY/NAME

The key itself is never an argument or an environment variable: both are shown to every process of the machine's user.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from wardround.common.errors import ConfigError
from wardround.common.trust.private_files import read_private, write_private

KEY_BYTES = 32
SALT_BYTES = 16
_SHORTEST_PASSPHRASE = 16  # characters; scrypt slows guesses down, it does not make a word into a key
_SCRYPT = {"n": 1 << 17, "r": 8, "p": 1, "maxmem": 1 << 28}  # 128 MiB, a third of a second; never read from a file
_CREDENTIAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")


@dataclass(frozen=True)
class Secret:
    """What turns the salt of a sealed file into the vault's key.

    Attributes:
        salt: (16 bytes) what new files carry; zeros where the key is used as it is.
        key: salt -> the vault's key (32 bytes).
    """

    salt: bytes
    key: Callable[[bytes], bytes] = field(repr=False)


def secret_of(source: str) -> Secret:
    """The secret that `source` names, checked.

    Raises:
        ConfigError: missing, readable by others, of the wrong length, or a passphrase that is too short.
    """
    kind, found, rest = source.partition(":")
    if found and kind in _KINDS:
        return _KINDS[kind](rest)
    return _key_file(source)


def new_key_file(path: Path) -> None:
    """Write a new key, readable by this user alone.

    Raises:
        ConfigError: something stands at `path`.
        OSError: it cannot be written.
    """
    write_private(path, secrets.token_bytes(KEY_BYTES))


def _key_file(name: str) -> Secret:
    return _as_it_is(read_private(Path(name)), name)


def _passphrase_file(name: str) -> Secret:
    line = read_private(Path(name)).split(b"\n")[0].removesuffix(b"\r")
    try:
        length = len(line.decode())
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not UTF-8 text") from None
    if length < _SHORTEST_PASSPHRASE:
        raise ConfigError(f"{name} holds a passphrase of {length} characters, wanted at least {_SHORTEST_PASSPHRASE}")

    @functools.lru_cache(maxsize=8)  # a folder holds files of a few processes, each of which drew a salt
    def key(salt: bytes) -> bytes:
        return hashlib.scrypt(line, salt=salt, dklen=KEY_BYTES, **_SCRYPT)

    return Secret(secrets.token_bytes(SALT_BYTES), key)


def _credential(name: str) -> Secret:
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise ConfigError(
            f"credential:{name}: $CREDENTIALS_DIRECTORY is not set; see LoadCredentialEncrypted= in systemd.exec(5)"
        )
    if not _CREDENTIAL.fullmatch(name):
        raise ConfigError(f"credential:{name!r}: not the name of a credential")
    path = Path(folder) / name  # systemd guards that folder, sometimes by access lists that look like group bits
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return _as_it_is(file.read(KEY_BYTES + 1), f"credential:{name}")
    except OSError as error:
        raise ConfigError(f"credential:{name} cannot be read: {error.strerror}") from None


def _as_it_is(key: bytes, name: str) -> Secret:
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{name} is no key: wanted {KEY_BYTES} random bytes, as `wardround vault new-key` writes them")
    return Secret(bytes(SALT_BYTES), lambda salt: key)


_KINDS: dict[str, Callable[[str], Secret]] = {"file": _key_file, "passphrase": _passphrase_file, "credential": _credential}
