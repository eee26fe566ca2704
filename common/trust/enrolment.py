"""What a hospital sends to be enrolled: three public keys with proof that it holds the private ones, and why it may ask.

A first request is vouched for by an invitation's token: HMAC-SHA-256 over the request, under a key derived from the token,
which itself never travels. A renewal is vouched for by the signing key that is enrolled already.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from wardround.common.errors import ConfigError, TrustRefused
from wardround.common.trust.certificates import KEY_KINDS, UNREADABLE, PublicKey, Use, fingerprint, is_name, key_kind
from wardround.common.trust.private_files import read_private
from wardround.common.trust.signing import Signed, Signer, canonical

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
LARGEST_REQUEST = 1 << 16  # characters

_TOKEN = re.compile(r"token-([0-9a-f]{64})")
_HEX = re.compile(r"[0-9a-f]{64}")
_RENEWAL = "renewal"
_USES: tuple[Use, ...] = get_args(Use)


@dataclass(frozen=True)
class Token:
    """What an invitation hands to a hospital, once. The consortium keeps `id` and `mac_key`, from which it does not follow."""

    secret: bytes

    @classmethod
    def new(cls) -> Self:
        """32 bytes of the system's randomness."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `text()` wrote; raises `ConfigError` for anything else, without repeating it."""
        found = _TOKEN.fullmatch(text.strip())
        if not found:
            raise ConfigError("that is no token; wanted token- and 64 hex digits, as `wardround invite` printed it")
        return cls(bytes.fromhex(found[1]))

    def text(self) -> str:
        """To be typed or pasted."""
        return f"token-{self.secret.hex()}"

    @property
    def id(self) -> str:
        """By which the consortium finds the invitation."""
        return hashlib.sha256(b"id" + self.secret).hexdigest()

    @property
    def mac_key(self) -> str:
        """Hex; what a request is vouched for with."""
        return hashlib.sha256(b"mac" + self.secret).hexdigest()


@dataclass(frozen=True)
class Request:
    """An enrolment request, as it lies in SITE.request.

    Attributes:
        body: "site" and, for every use of a key, a certificate signing request (PKCS#10, PEM).
        voucher: {"token": id, "mac": hex}, or {"signature": hex} of a renewal.
    """

    body: dict[str, str]
    voucher: dict[str, str]

    @classmethod
    def by_token(cls, site: str, keys: Mapping[Use, PrivateKey], token: Token) -> Self:
        """A first request."""
        body = _body(site, keys)
        return cls(body, {"token": token.id, "mac": _mac(token.mac_key, body)})

    @classmethod
    def by_signer(cls, keys: Mapping[Use, PrivateKey], signer: Signer) -> Self:
        """A renewal: new certificates for the keys that are enrolled."""
        body = _body(signer.name, keys)
        return cls(body, {"signature": signer.sign(_RENEWAL, body).signature})

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `text()` wrote; raises `TrustRefused` for anything else."""
        refused = TrustRefused("that is no enrolment request")
        if len(text) > LARGEST_REQUEST:
            raise refused
        try:
            found: Any = json.loads(text)
        except (ValueError, RecursionError):
            raise refused from None
        if not (isinstance(found, dict) and found.keys() == {"body", "voucher"} and all(map(_is_texts, found.values()))):
            raise refused
        by_token, by_signature = {"token", "mac"}, {"signature"}
        if found["body"].keys() != {"site", *_USES} or found["voucher"].keys() not in (by_token, by_signature):
            raise refused
        if not is_name(found["body"]["site"]):
            raise refused
        return cls(found["body"], found["voucher"])

    def text(self) -> str:
        """One line of JSON; nothing in it is secret."""
        return canonical({"body": self.body, "voucher": self.voucher}).decode()

    @property
    def site(self) -> str:
        """Who asks, by its own account."""
        return self.body["site"]

    @property
    def token_id(self) -> str | None:
        """Of the invitation it rests on; None for a renewal."""
        return self.voucher.get("token")

    @property
    def fingerprint(self) -> str:
        """Of the site's name and its public keys: to compare by telephone, and the same however often the site asks.

        Raises:
            TrustRefused: as `public_keys` does.
        """
        keys = {use: key_digest(key) for use, key in self.public_keys().items()}
        return fingerprint(canonical([self.site, keys]))

    def is_vouched_by(self, mac_key: str) -> bool:
        """Whether somebody with the token wrote this request, all of it."""
        return hmac.compare_digest(_mac(mac_key, self.body), self.voucher.get("mac", ""))

    def as_signed(self) -> Signed:
        """A renewal as the signed statement that it is; the roster tells whether it holds."""
        signature = self.voucher.get("signature", "")
        if not re.fullmatch(r"[0-9a-f]{128}", signature):
            raise TrustRefused("the renewal has no signature")
        return Signed(_RENEWAL, self.site, dict(self.body), signature)

    def public_keys(self) -> dict[Use, PublicKey]:
        """The keys it proves to hold. Whatever else a signing request asks for is not looked at.

        Raises:
            TrustRefused: a broken proof of possession, or a key of the wrong kind.
        """
        return {use: _proved(self.body[use], use) for use in _USES}


def new_key(use: Use) -> PrivateKey:
    """A key for one use: P-256 for TLS, Ed25519 to sign, and P-384 for Flower, which takes no other."""
    if KEY_KINDS[use] == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(ec.SECP256R1() if use == "tls" else ec.SECP384R1())


def key_text(key: PrivateKey, use: Use) -> bytes:
    """As it lies in a file: PKCS#8, and OpenSSH's format for Flower, which reads no other."""
    form = serialization.PrivateFormat.OpenSSH if use == "node" else serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def read_key(path: Path, use: Use) -> PrivateKey:
    """Read what `key_text` wrote; raises `ConfigError` for any other key, or a file that others could have read."""
    load = serialization.load_ssh_private_key if use == "node" else serialization.load_pem_private_key
    data = read_private(path)
    try:
        key = load(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} is no unencrypted {use} key") from None
    if not isinstance(key, PrivateKey) or key_kind(key.public_key()) != KEY_KINDS[use]:
        raise ConfigError(f"{path} holds a key of the wrong kind; wanted {KEY_KINDS[use]}")
    return key


def key_digest(key: PublicKey) -> str:
    """SHA-256 of a public key, in hex: the same key in whatever certificate."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def _body(site: str, keys: Mapping[Use, PrivateKey]) -> dict[str, str]:
    return {"site": site} | {use: _asked(site, keys[use]) for use in _USES}


def _asked(site: str, key: PrivateKey) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)]))
    asked = builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA384())
    return asked.public_bytes(serialization.Encoding.PEM).decode()


def _proved(text: str, use: Use) -> PublicKey:
    try:
        asked = x509.load_pem_x509_csr(text.encode())
        key = asked.public_key()
        proved = asked.is_signature_valid
    except (*UNREADABLE, UnsupportedAlgorithm):
        raise TrustRefused(f"the request's {use} key cannot be read") from None
    if not isinstance(key, PublicKey) or key_kind(key) != KEY_KINDS[use]:
        raise TrustRefused(f"the request's {use} key is of the wrong kind; wanted {KEY_KINDS[use]}")
    if not proved:
        raise TrustRefused(f"the request does not prove possession of its {use} key")
    return key


def _mac(mac_key: str, body: dict[str, str]) -> str:
    return hmac.new(bytes.fromhex(mac_key), canonical(body), hashlib.sha256).hexdigest()


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
