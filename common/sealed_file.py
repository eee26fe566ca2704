"""How a sealed file is laid out: which key, the file's own key wrapped under it, size and label, chunks of 1 MiB.

Every file is encrypted under a random key of its own, which is wrapped (AES-256-GCM under HKDF of the vault's key and a
salt) together with the file's size and label. Chunks carry their number and whether they are the last (the STREAM
construction: Hoang, Reyhanitabar, Rogaway & Vizar 2015, https://eprint.iacr.org/2015/189), so none can be cut, moved or
added.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, Self

from wardround.common.errors import VaultBroken
from wardround.common.key_sources import KEY_BYTES, Secret

CHUNK = 1 << 20  # bytes of plain text
LONGEST_LABEL = 255  # bytes
_TAG = 16
_MAGIC = b"WRSEAL1\n"
_SLOT = struct.Struct("16s16s32s48s")  # which key, salt of its passphrase, salt of the wrapping, wrapped key
_FACTS = struct.Struct(">QH")  # size of the plain text, length of the label
_FIXED = len(_MAGIC) + _SLOT.size + _FACTS.size


@dataclass(frozen=True)
class Header:
    """What stands before the chunks; `size` is that of the plain text in bytes."""

    key_id: bytes
    passphrase_salt: bytes
    wrap_salt: bytes
    wrapped: bytes
    size: int
    label: bytes

    @classmethod
    def read(cls, file: BinaryIO, name: str) -> Self:
        """The header of an open file; what it says is not trusted before `unwrapped`.

        Raises:
            VaultBroken: there is none, or the file's length is not what it says.
        """
        fixed = file.read(_FIXED)
        if len(fixed) < _FIXED or not fixed.startswith(_MAGIC):
            raise VaultBroken(f"{name} is not a sealed file")
        size, length = _FACTS.unpack_from(fixed, len(_MAGIC) + _SLOT.size)
        key_id, passphrase_salt, wrap_salt, wrapped = _SLOT.unpack_from(fixed, len(_MAGIC))
        found = cls(key_id, passphrase_salt, wrap_salt, wrapped, size, file.read(length))
        if os.fstat(file.fileno()).st_size != len(found.packed) + size + _TAG * found.chunks:  # before any memory is taken
            raise VaultBroken(f"{name} is damaged: its length is not what its header says")
        return found

    @property
    def chunks(self) -> int:
        """How many follow; an empty file has one."""
        return max(1, -(-self.size // CHUNK))

    @property
    def packed(self) -> bytes:
        """As it stands in the file."""
        slot = _SLOT.pack(self.key_id, self.passphrase_salt, self.wrap_salt, self.wrapped)
        return _MAGIC + slot + _FACTS.pack(self.size, len(self.label)) + self.label

    @property
    def bound(self) -> bytes:
        """What the wrapped key vouches for besides itself."""
        return _MAGIC + self.passphrase_salt + _FACTS.pack(self.size, len(self.label)) + self.label


def wrapped(header: Header, key: bytes, secret: Secret) -> Header:
    """The header with `key`, the file's own, wrapped for the vault whose secret this is."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    vault_key, salt = secret.key(header.passphrase_salt), secrets.token_bytes(32)
    once = AESGCM(_derived(vault_key, salt, b"wrap"))  # the salt is new, so no nonce is needed
    return replace(header, key_id=key_id(vault_key), wrap_salt=salt, wrapped=once.encrypt(bytes(12), key, header.bound))


def unwrapped(header: Header, secret: Secret, name: str) -> bytes:
    """The file's own key.

    Raises:
        VaultBroken: another key wrapped it, or the header was changed.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    vault_key = secret.key(header.passphrase_salt)
    if key_id(vault_key) != header.key_id:
        raise VaultBroken(f"{name} is sealed with another key")
    try:
        return AESGCM(_derived(vault_key, header.wrap_salt, b"wrap")).decrypt(bytes(12), header.wrapped, header.bound)
    except InvalidTag:
        raise VaultBroken(f"{name} is damaged: its header was changed") from None


def key_id(vault_key: bytes) -> bytes:
    """Tells keys apart without telling anything of them."""
    return _derived(vault_key, b"", b"name")[:16]


def _derived(key: bytes, salt: bytes, purpose: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), KEY_BYTES, salt, b"wardround vault 1 " + purpose).derive(key)


def _nonce(number: int, header: Header) -> bytes:
    return number.to_bytes(11, "big") + bytes([number == header.chunks - 1])


def sealed(header: Header, key: bytes, parts: Iterable[bytes]) -> Iterator[bytes]:
    """The whole file, a chunk at a time."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cipher = AESGCM(key)
    yield header.packed
    for number, piece in enumerate(_pieces(parts)):
        yield cipher.encrypt(_nonce(number, header), piece, None)


def _pieces(parts: Iterable[bytes]) -> Iterator[bytes | bytearray | memoryview]:
    """The parts, cut into chunks that may begin in one and end in the next; one empty chunk where there is nothing."""
    begun, first = bytearray(), True
    for part in parts:
        view = memoryview(part).cast("B")
        while len(begun) + len(view) > CHUNK:  # not >=: the last chunk is whoever comes last, however long
            take = CHUNK - len(begun)
            yield bytes(begun) + view[:take] if begun else view[:take]
            begun, view, first = bytearray(), view[take:], False
        begun += view
    if begun or first:
        yield begun


def opened(file: BinaryIO, header: Header, key: bytes, name: str) -> Iterator[bytes]:
    """The plain text after the header, a chunk at a time.

    Raises:
        VaultBroken: a chunk was changed.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cipher = AESGCM(key)
    for number in range(header.chunks):
        try:
            yield cipher.decrypt(_nonce(number, header), file.read(CHUNK + _TAG), None)
        except InvalidTag:
            raise VaultBroken(f"{name} is damaged: chunk {number + 1} of {header.chunks} was changed") from None


def copied(header: Header, file: BinaryIO) -> Iterator[bytes]:
    """The whole file with another header; its chunks as they are."""
    yield header.packed
    while piece := file.read(CHUNK):
        yield piece
