"""Seals: every message says who made it, for whom, about which study, and what exactly is in it.

An order carries the coordinator's signature over its addressee, the study, a fresh nonce, the time and the digest of all it
holds; with a model comes the manifest, the same for all sites, that names the model's every tensor. A reply carries the
site's signature over its own digest and that of the order it answers, so neither can be moved to another round, study, site
or run. A refusal travels as a record, so that it is sealed like anything else.

Whoever opens a seal trusts nothing in the message before its signature holds.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, RecordDict

from wardround.common.contents import Parts, content_digest, digest_of, model_manifest, parts_of, tensors_of
from wardround.common.errors import OrderRefused, UpdateRefused
from wardround.common.refusals import refusal, refusal_in
from wardround.common.seal_parts import LONGEST_NAME, SEAL, Head, head_in, signed_by, strict, texts_in
from wardround.common.trust.signing import Signed, Signer

if TYPE_CHECKING:
    from wardround.common.trust.roster import Roster

__all__ = [
    "Head", "Order", "Reply", "content_digest", "model_manifest", "open_order", "open_reply", "refusal", "refusal_in",
    "seal_order", "seal_reply",
]  # fmt: skip

CLOCKS = 300.0  # seconds by which two machines' clocks may differ
_MODEL, _FACTS = "model", "facts"
_WITH_MODEL = ("train", "evaluate")
_ORDER = {"study": str, "to": str, "action": str, "nonce": str, "time": int, "content": str, "model": str, "audit": list}
_REPLY = {"study": str, "from": str, "to_order": str, "content": str, "audit": list}
_MANIFEST = {"study": str, "run": str, "action": str, "round": int, "tensors": list, "previous": str}


@dataclass(frozen=True)
class Order:
    """An order whose seal holds.

    Attributes:
        signed: the seal itself.
        content: what the coordinator wrote, without the seal.
        manifest: of the model in it; None where there is none.
        run: which run of the study.
        round: 0 where the order is about none.
        attempt: 0 where the order is about none.
    """

    signed: Signed
    content: RecordDict
    manifest: Signed | None
    run: str
    round: int
    attempt: int

    @property
    def digest(self) -> str:
        """What a reply refers to."""
        return self.signed.digest

    @property
    def study(self) -> str:
        """SHA-256 of the plan's text."""
        return str(self.signed.body["study"])

    @property
    def action(self) -> str:
        """Flower's type of the message."""
        return str(self.signed.body["action"])

    @property
    def audit(self) -> Head:
        """Where the coordinator's audit log stood."""
        return head_in(self.signed.body)


@dataclass(frozen=True)
class Reply:
    """A reply whose seal holds; `content` is what the site wrote, `refusal` (code, text) where it said no."""

    signed: Signed
    content: RecordDict
    refusal: tuple[int, str] | None

    @property
    def audit(self) -> Head:
        """Where the site's audit log stood."""
        return head_in(self.signed.body)


def seal_order(
    content: RecordDict,
    signer: Signer,
    *,
    study: str,
    to: str,
    action: str,
    manifest: Signed | None = None,
    audit: Head = (0, ""),
    now: float | None = None,
) -> tuple[RecordDict, str]:
    """`content` sealed for one site, and the digest that its reply will name. Sealed anew, it is another order.

    Args:
        content: what to send; not changed.
        signer: the coordinator.
        study: SHA-256 of the plan's text.
        to: the site.
        action: Flower's type of the message, such as "train".
        manifest: signed, kind "model"; where `content` has a model and only there.
        audit: where the coordinator's audit log stands.
        now: seconds since 1970; left out: the clock's.
    """
    signed = signer.sign(
        "order",
        {
            "study": study,
            "to": to,
            "action": action,
            "nonce": secrets.token_hex(16),
            "time": int(time.time() if now is None else now),
            "content": digest_of(parts_of(content, _hashed(manifest))),
            "model": manifest.digest if manifest else "",
            "audit": list(audit),
        },
    )
    texts = {"text": signed.text(), "manifest": manifest.text() if manifest else ""}
    return RecordDict({**content, SEAL: ConfigRecord(dict(texts))}), signed.digest


def open_order(
    content: RecordDict, *, roster: Roster, site: str, study: str, action: str, patience: float, now: float | None = None
) -> Order:
    """The order in a message, if this coordinator wrote it, for this site and study, not long ago, and nobody changed it.

    Whether it was seen before is for the site's order book to say.

    Args:
        content: what came; not changed.
        roster: who is who.
        site: this one.
        study: SHA-256 of the plan's text that this site agreed to.
        action: the type that Flower gives the message.
        patience: seconds that the coordinator waits for an answer; an older order is stale.
        now: seconds since 1970; left out: the clock's.

    Raises:
        SignatureRefused: it is not signed, or not by the coordinator.
        OrderRefused: it is for another site, study or action, stale, changed, or carries a model that its manifest does not.
    """
    texts = texts_in(content, ("text", "manifest"), OrderRefused("the order is not sealed"))
    signed = signed_by(texts["text"], "order", "coordinator", roster)
    body = strict(signed.body, _ORDER, OrderRefused("the order's seal cannot be read"))
    if body["to"] != site:
        raise OrderRefused("the order is for another site")
    if body["study"] != study:
        raise OrderRefused("the order belongs to another study plan")
    if body["action"] != action:
        raise OrderRefused("the order was sealed for another purpose")
    _check_time(int(body["time"]), time.time() if now is None else now, patience)
    inner = _without_seal(content)
    parts = parts_of(inner)
    if body["content"] != digest_of(parts):
        raise OrderRefused("the order is not what the coordinator sealed")
    run, round, attempt = _facts(inner, study)
    manifest = _manifest(texts["manifest"], body, parts, roster)
    if manifest is not None and (manifest.body["run"], manifest.body["round"]) != (run, round):
        raise OrderRefused("the model's manifest belongs to another round")
    return Order(signed, inner, manifest, run, round, attempt)


def seal_reply(content: RecordDict, signer: Signer, *, study: str, order: str, audit: Head = (0, "")) -> RecordDict:
    """`content` sealed by this site as its answer to the order with digest `order`."""
    body = {"study": study, "from": signer.name, "to_order": order, "content": content_digest(content), "audit": list(audit)}
    return RecordDict({**content, SEAL: ConfigRecord({"text": signer.sign("reply", body).text()})})


def open_reply(content: RecordDict, *, roster: Roster, site: str, study: str, order: str) -> Reply:
    """The reply in a message, if it is this site's answer to this very order, and nobody changed it.

    Raises:
        SignatureRefused: it is not signed, or not by the site.
        UpdateRefused: it answers another order, is in another's name, was changed, or cannot be read.
    """
    texts = texts_in(content, ("text",), UpdateRefused("the reply is not sealed"))
    signed = signed_by(texts["text"], "reply", "site", roster)
    body = strict(signed.body, _REPLY, UpdateRefused("the reply's seal cannot be read"))
    if signed.signer != site or body["from"] != site:
        raise UpdateRefused("the reply is another site's")
    if (body["study"], body["to_order"]) != (study, order):
        raise UpdateRefused("the reply answers another order")
    inner = _without_seal(content)
    try:
        same = body["content"] == content_digest(inner)
    except OrderRefused as error:
        raise UpdateRefused(str(error)) from None
    if not same:
        raise UpdateRefused("the reply is not what the site sealed")
    return Reply(signed, inner, refusal_in(inner))


def _check_time(sealed: int, now: float, patience: float) -> None:
    if sealed > now + CLOCKS:
        raise OrderRefused(f"the order is dated {sealed - now:.0f} s ahead of this site's clock; clocks must agree")
    if sealed < now - patience - CLOCKS:
        raise OrderRefused(f"the order is {now - sealed:.0f} s old; the coordinator waits {patience:g} s for an answer")


def _without_seal(content: RecordDict) -> RecordDict:
    return RecordDict({name: record for name, record in content.items() if name != SEAL})


def _hashed(manifest: Signed | None) -> dict[str, str]:
    """What the coordinator hashed once a round, and not once a site. If it does not fit, no site takes the order."""
    return {name: sha256 for name, _, _, sha256 in manifest.body["tensors"]} if manifest else {}


def _facts(content: RecordDict, study: str) -> tuple[str, int, int]:
    """(run, round, attempt) of the facts in an order."""
    facts = content.get(_FACTS)
    told = dict(facts) if isinstance(facts, ConfigRecord) else {}
    run, round, attempt = told.get("run"), told.get("round", 0), told.get("attempt", 0)
    if told.get("study") != study or not isinstance(run, str) or not 0 < len(run) <= LONGEST_NAME or not run.isprintable():
        raise OrderRefused("the order does not say which study and run it belongs to")
    if type(round) is not int or type(attempt) is not int or round < 0 or attempt < 0:
        raise OrderRefused("the order does not say which round it belongs to")
    return run, round, attempt


def _manifest(text: str, order: dict[str, Any], parts: Parts, roster: Roster) -> Signed | None:
    arrays = [name for name, (kind, _) in parts.items() if kind == "arrays"]
    if arrays != [_MODEL] * (order["action"] in _WITH_MODEL):
        raise OrderRefused("the order should carry " + ("one model" if order["action"] in _WITH_MODEL else "no model"))
    if not arrays:
        if text or order["model"]:
            raise OrderRefused("the order names a model that it does not carry")
        return None
    signed = signed_by(text, "model", "coordinator", roster)
    body = strict(signed.body, _MANIFEST, OrderRefused("the model's manifest cannot be read"))
    if signed.digest != order["model"]:
        raise OrderRefused("the model's manifest is not the one the order names")
    if (body["study"], body["action"]) != (order["study"], order["action"]):
        raise OrderRefused("the model's manifest belongs to another study or purpose")
    if body["tensors"] != tensors_of(parts, _MODEL):
        raise OrderRefused("the model is not the one of its manifest")
    return signed
