"""What a hospital does with an order that came over the network, before and after the ClientApp sees it.

    sealed order -> is it the coordinator's, for this site, about a plan that was approved here, and new?
                 -> the installed ClientApp, with the order as it was written
                 -> the reply, sealed by this site, kept until the next one in case it must be sent again

Nothing that arrives is unpacked, imported or run. Everything said back is one of our own texts.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message, RecordDict

from wardround.client.approvals import ApprovalBook
from wardround.client.network.answers import Answers
from wardround.client.order_book import OrderBook
from wardround.client.policy import SiteConfig
from wardround.common.agreement import SignedStudy
from wardround.common.audit_log import AuditLog
from wardround.common.errors import ConfigError, OrderRefused, PlanRefused, RoundTaken, WardroundError
from wardround.common.parcels import packed, unpacked
from wardround.common.plan import SignedText
from wardround.common.refusals import INTERNAL, REFUSED, ROUND_TAKEN
from wardround.common.seal_parts import LONGEST_NAME, texts_in
from wardround.common.seals import Order, open_order, refusal, seal_reply
from wardround.common.trust.signing import Signed
from wardround.common.trust.site_folder import SiteFolder

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

log = logging.getLogger("wardround.site")


class Desk:
    """One hospital's desk.

    Args:
        path: the site file.
        config: what it says.
        make_app: builds the ClientApp when the first order is carried out: it imports torch, and an idle hospital does not.
    """

    def __init__(self, path: Path, config: SiteConfig, make_app: Callable[[], ClientApp] | None = None) -> None:
        self.config = config
        self._make_app = make_app or _installed_app
        self._path = path
        folder = SiteFolder(config.site, config.state)
        self._roster, self._signer = folder.roster(), folder.signer()
        self._approvals = ApprovalBook(config.state, self._roster, config.site)
        self._orders = OrderBook(config.state)
        self._answers = Answers(config.state / "answers")
        self.audit = AuditLog.open(config.state / "audit.jsonl", self._signer)
        self._read: dict[str, SignedStudy] = {}  # the newest one
        self._app: ClientApp | None = None

    def close(self) -> None:
        """Sign the log and give the files back."""
        self._orders.close()
        self.audit.close()

    def answer(self, message: Message, settings: dict[str, Any]) -> Message:
        """The sealed reply to a message; a refusal is one, too.

        Args:
            message: as it came.
            settings: what the coordinator says of its run: the plan and its signatures.
        """
        order: Order | None = None
        halves = False
        try:
            signed = self._signed_study(settings)
            halves = signed.study.plan.update_numbers == "float16"
            study = signed.study
            order = open_order(
                unpacked(message.content),
                roster=self._roster,
                site=self.config.site,
                study=study.digest,
                action=message.metadata.message_type,
                patience=study.plan.deadline_seconds,
            )
            signed.check(self._roster)  # at every order: an approval may have ended since, or a certificate been taken back
            self._approvals.admits(study, self.config.allow.studies)
            if not self.audit.has_room():
                raise OrderRefused("this site's disk is full")
            self._orders.accept(order, runs=self._approvals.runs(study.digest))
            self.audit.anchor("coordinator", *order.audit, about=order.study)
            self.audit.add("order.accepted", study=order.study, action=order.action, round=order.round, order=order.digest)
            content = self._answers.again(order) or self._carried_out(message, order, study)
        except WardroundError as error:
            content = self._no(error, order)
        except Exception:
            text = f"internal error, see the site's log, ref {secrets.token_hex(2)}"
            log.exception("%s", text)
            self.audit.add("order.refused", order=order.digest if order else "", why=text)
            content = refusal(INTERNAL, text)
        asked, digest = (order.study, order.digest) if order else _claimed(message)
        sealed = seal_reply(content, self._signer, study=asked, order=digest, audit=self.audit.head)
        return Message(packed(sealed, halves=halves), reply_to=message)

    def _signed_study(self, settings: dict[str, Any]) -> SignedStudy:
        """The plan and its signatures, read but not yet believed."""
        text = settings.get("signatures")
        if not isinstance(text, str):
            raise PlanRefused("the study comes without signatures")
        if text not in self._read:
            self._read = {text: SignedStudy.parse(text)}
        return self._read[text]

    def _carried_out(self, message: Message, order: Order, study: SignedText) -> RecordDict:
        if self._app is None:
            self.config.compute.apply()
            self._app = self._make_app()
        bare = Message(order.content, reply_to=message)
        bare.__dict__["_metadata"] = message.metadata
        context = Context(
            message.metadata.run_id,
            message.metadata.dst_node_id,
            {"site": str(self._path)},
            RecordDict(),
            {"plan": study.text},
        )
        reply = self._app(bare, context)
        if reply.has_error():
            self.audit.add("order.refused", order=order.digest, why=reply.error.reason or "")
            return refusal(reply.error.code, reply.error.reason or "")
        self._answers.keep(order, reply.content)
        return reply.content

    def _no(self, error: WardroundError, order: Order | None) -> RecordDict:
        text = "this site's file is not valid" if isinstance(error, ConfigError) else str(error)
        log.warning("refused: %s%s", error, f" ({error.detail})" if error.detail else "")
        self.audit.add("order.refused", order=order.digest if order else "", why=text)
        return refusal(ROUND_TAKEN if isinstance(error, RoundTaken) else REFUSED, text)


def _claimed(message: Message) -> tuple[str, str]:
    """(study, digest) of what came, believed or not: a refusal says what it refuses, so that the coordinator can read why."""
    try:
        text = texts_in(unpacked(message.content), ("text", "manifest"), OrderRefused("the order is not sealed"))["text"]
        signed = Signed.parse(text, kind="order")
    except WardroundError:
        return "", ""
    study = signed.body.get("study")
    return (study, signed.digest) if isinstance(study, str) and len(study) <= LONGEST_NAME else ("", "")


def _installed_app() -> ClientApp:
    from wardround.client.app import client_app

    return client_app()
