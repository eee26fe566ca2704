"""What every seal is made of: a record of texts, a signature, a body that is read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, RecordDict

from wardround.common.errors import SignatureRefused, TrustRefused, WardroundError
from wardround.common.trust.signing import Signed

if TYPE_CHECKING:
    from wardround.common.trust.certificates import Role
    from wardround.common.trust.roster import Roster

Head = tuple[int, str]  # of an audit log: number and hash of its newest entry

SEAL = "seal"  # the record's name
LONGEST_NAME = 128  # characters of a digest, a name, a nonce


def texts_in(content: RecordDict, keys: tuple[str, ...], otherwise: WardroundError) -> dict[str, str]:
    """The texts under a seal, if it has these and no other; raises `otherwise`."""
    record = content.get(SEAL)
    if not isinstance(record, ConfigRecord) or set(record) != set(keys):
        raise otherwise
    found = {key: value for key, value in record.items() if isinstance(value, str)}
    if len(found) != len(keys):
        raise otherwise
    return found


def signed_by(text: str, kind: str, role: Role, roster: Roster) -> Signed:
    """The statement in `text`, if somebody with that role signed it now; raises `SignatureRefused`."""
    try:
        signed = Signed.parse(text, kind=kind)
        roster.check(signed, role=role)
    except SignatureRefused:
        raise
    except TrustRefused as error:  # unknown, revoked, out of its time
        raise SignatureRefused(str(error), detail=error.detail) from None
    return signed


def strict(body: dict[str, Any], wanted: Mapping[str, type], otherwise: WardroundError) -> dict[str, Any]:
    """`body`, if it has these keys, of these types, and no other; raises `otherwise`."""
    if body.keys() != wanted.keys() or any(type(body[key]) is not of for key, of in wanted.items()):
        raise otherwise
    if any(len(value) > LONGEST_NAME for value in body.values() if isinstance(value, str)):
        raise otherwise
    if "audit" in wanted:
        seq, digest = (*body["audit"], None, None)[:2]
        if len(body["audit"]) != 2 or type(seq) is not int or seq < 0 or type(digest) is not str or len(digest) > LONGEST_NAME:
            raise otherwise
    return body


def head_in(body: dict[str, Any]) -> Head:
    """The head in a body that was read strictly."""
    seq, digest = body["audit"]
    return seq, digest
