"""Signed statements: what is signed is one canonical text, so nothing can be read in two ways.

A signature is Ed25519 (RFC 8032) over canonical JSON of ["wardround/1", kind, signer, body]. The kind is in it, so a signature
given for one purpose is worth nothing for another.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from wardround.common.errors import ConfigError, SignatureRefused
from wardround.common.trust.certificates import is_name, name_of
from wardround.common.trust.private_files import read_private

LARGEST_SIGNED = 1 << 20  # characters
_CONTEXT = "wardround/1"
_FIELDS = {"kind": str, "signer": str, "body": dict, "signature": str}
_SIGNATURE = re.compile(r"[0-9a-f]{128}")


def canonical(value: object) -> bytes:
    """The one way to write `value` as JSON: sorted keys, no spaces, ASCII. A tuple is written as a list.

    >>> canonical({"round": 3, "from": "st-olav"})
    b'{"from":"st-olav","round":3}'

    Raises:
        ConfigError: anything that JSON cannot say exactly: NaN, a key that is no text, bytes, half of a surrogate pair.
    """
    try:
        _check(value)
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    except RecursionError:
        raise ConfigError("a text to be signed is nested too deeply") from None
    except ValueError:  # an integer of thousands of digits, half of a surrogate pair
        raise ConfigError("a text to be signed holds what JSON cannot say") from None


def _check(value: object) -> None:
    if value is None or type(value) in (bool, int):
        return
    if type(value) is str:
        value.encode()
    elif type(value) is float and math.isfinite(value):
        return
    elif type(value) in (list, tuple):
        for item in value:  # type: ignore[attr-defined]
            _check(item)
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise ConfigError(f"a text to be signed has a key of type {type(key).__name__}, wanted text")
            key.encode()
            _check(item)
    else:
        raise ConfigError(f"a text to be signed holds a {type(value).__name__} that JSON cannot say")


@dataclass(frozen=True)
class Signed:
    """A statement of `signer`: what travels, or lies in a file. Holding one proves nothing until it is verified.

    Attributes:
        kind: what the statement is for: "study", "approval", "order", "reply", ...
        signer: the name in the certificate that verifies it.
        body: plain JSON.
        signature: 128 hex digits.
    """

    kind: str
    signer: str
    body: dict[str, Any]
    signature: str

    def text(self) -> str:
        """One line of canonical JSON, without a line feed."""
        fields = {"kind": self.kind, "signer": self.signer, "body": self.body, "signature": self.signature}
        return canonical(fields).decode()

    @classmethod
    def parse(cls, text: str, *, kind: str) -> Self:
        """Read what `text()` wrote; any other way to write the same is refused.

        Raises:
            SignatureRefused: not such a text, of another kind, or longer than 1 MiB.
        """
        if len(text) > LARGEST_SIGNED:
            raise SignatureRefused(f"a signed text of {len(text)} characters is refused; the most is {LARGEST_SIGNED}")
        try:
            fields = json.loads(text)
            read_back = canonical(fields).decode()
        except (ValueError, RecursionError, ConfigError):
            raise SignatureRefused(f"the {kind} is no signed text") from None
        if read_back != text:  # a key twice, a space, a number spelt another way
            raise SignatureRefused(f"the {kind} is not written as it was signed")
        if type(fields) is not dict or {key: type(value) for key, value in fields.items()} != _FIELDS:
            raise SignatureRefused(f"the {kind} does not have the fields of a signed text")
        if not is_name(fields["signer"]) or not _SIGNATURE.fullmatch(fields["signature"]):
            raise SignatureRefused(f"the {kind} has no name of a signer, or no signature")
        if fields["kind"] != kind:
            raise SignatureRefused(f"a signed {kind} was wanted, this text is another")
        return cls(**fields)

    @property
    def digest(self) -> str:
        """SHA-256 over kind, signer and body, in hex: the same however often the statement is signed."""
        return hashlib.sha256(_signed_bytes(self.kind, self.signer, self.body)).hexdigest()


class Signer:
    """Somebody who can sign: a name and its Ed25519 key."""

    def __init__(self, name: str, key: Ed25519PrivateKey) -> None:
        self.name = name
        self._key = key

    @classmethod
    def load(cls, name: str, path: Path) -> Self:
        """The signer whose key lies at `path` (PKCS8); raises `ConfigError` if it is open to others or no such key."""
        try:
            key = serialization.load_pem_private_key(read_private(path), password=None)
        except (ValueError, TypeError):  # TypeError: it is encrypted
            raise ConfigError(f"{path} is no unencrypted private key") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path} is no Ed25519 key, so it cannot sign")
        return cls(name, key)

    def sign(self, kind: str, body: dict[str, Any]) -> Signed:
        """`body` as a statement of this signer.

        Raises:
            ConfigError: the body is not JSON, or too long to be read back.
        """
        plain = json.loads(canonical(body))  # a copy, so what was signed does not change with the caller's
        signed = Signed(kind, self.name, plain, self._key.sign(_signed_bytes(kind, self.name, plain)).hex())
        if len(signed.text()) > LARGEST_SIGNED:
            raise ConfigError(
                f"a {kind} of {len(signed.text())} characters is too long to be signed; the most is {LARGEST_SIGNED}"
            )
        return signed


def verify(signed: Signed, certificate: x509.Certificate) -> None:
    """Return if the owner of `certificate` signed it; whether the certificate holds is the roster's question.

    Raises:
        SignatureRefused: another's certificate, or the signature is not over this kind, signer and body.
    """
    key = certificate.public_key()
    refused = SignatureRefused(f"the {signed.kind} is not signed by {signed.signer}")
    if name_of(certificate) != signed.signer or not isinstance(key, Ed25519PublicKey):
        raise refused
    try:
        key.verify(bytes.fromhex(signed.signature), _signed_bytes(signed.kind, signed.signer, signed.body))
    except (InvalidSignature, ValueError, ConfigError):
        raise refused from None


def _signed_bytes(kind: str, signer: str, body: dict[str, Any]) -> bytes:
    return canonical([_CONTEXT, kind, signer, body])
