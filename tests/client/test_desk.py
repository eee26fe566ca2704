"""What a hospital does with an order from the network: it carries out what was approved here, once, and says no in one line."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from rosters import ALLOW, PLAN, Consortium, a_stranger, a_study
from wardround.client.app import client_app
from wardround.client.approvals import ApprovalBook
from wardround.client.network.desk import Desk
from wardround.client.policy import SiteConfig
from wardround.common.agreement import Approval, SignedStudy
from wardround.common.messages import OrderFacts, RollCall, pack_with_model
from wardround.common.parcels import packed, unpacked
from wardround.common.plan import SignedText
from wardround.common.refusals import INTERNAL, REFUSED, ROUND_TAKEN
from wardround.common.seals import Reply, model_manifest, open_reply, seal_order
from wardround.common.trust.signing import Signed, Signer
from wardround.common.weights import pack

STUDY, RUN, SECRET = a_study(), "b" * 16, "Hansen, 1952"
NOW = datetime.now(UTC)


@dataclass
class App:
    """Notes what it is given, and answers with the same tensors doubled, or as it is told."""

    heard: list[tuple[RecordDict, dict[str, object]]] = field(default_factory=list)
    made: int = 0
    says: Callable[[Message], Message] | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        self.heard.append((message.content, {"type": message.metadata.message_type, **context.run_config}))
        if self.says is not None:
            return self.says(message)
        content = RecordDict({"facts": ConfigRecord({"heard": len(self.heard)})})
        if "model" in message.content:
            content["model"] = pack({"w": torch.full((3,), float(len(self.heard)))})
        return Message(content, reply_to=message)


class Ward:
    """One hospital with a desk, and everything a coordinator needs to send it orders."""

    def __init__(self, folder: Path, study: SignedText = STUDY, allow: str = ALLOW) -> None:
        self.study = study
        self.consortium = Consortium(folder / "public")
        self.coordinator = self.consortium.signers["coordinator"]
        self.path = self.consortium.site_file(folder / "va", allow=allow)
        self.config = SiteConfig.load(self.path)
        self.app = App()
        self.book = ApprovalBook(self.config.state, self.consortium.roster, "va")
        self.desk = Desk(self.path, self.config, self._made)
        self.chain: dict[int, Signed] = {}

    def _made(self) -> App:
        self.app.made += 1
        return self.app

    def approve(self) -> None:
        self.book.approve(self.study, self.consortium.signers["va"], NOW, None)

    def signed(self, *approve: str, by: Signer | None = None) -> SignedStudy:
        """The study with the coordinator's signature, and yeses of two sites unless told."""
        signers = [self.consortium.signers[site] for site in approve or ("cleveland", "va")]
        yeses = [Approval.sign(self.study, signer, NOW, None) for signer in signers]
        return SignedStudy.sign(self.study, by or self.coordinator, yeses)

    def order(
        self,
        round: int = 1,
        *,
        action: str = "train",
        model: float = 0.0,
        by: Signer | None = None,
        to: str = "va",
        now: float | None = None,
        meddle: Callable[[RecordDict], RecordDict] = lambda content: content,
        type: str | None = None,
    ) -> tuple[Message, str]:
        """A sealed order as it arrives, and its digest."""
        by, manifest = by or self.coordinator, None
        if action == "train":
            content = pack_with_model(OrderFacts(self.study.digest, RUN, round, 1, ""), {"w": torch.full((3,), model)})
            previous = self.chain[round - 1].digest if round - 1 in self.chain else ""
            arrays = content["model"]
            assert isinstance(arrays, ArrayRecord)
            body = model_manifest(arrays, study=self.study.digest, run=RUN, round=round, previous=previous, action=action)
            manifest = self.chain[round] = by.sign("model", body)
        else:
            content = RollCall(self.study.digest, RUN).pack()
        sealed, digest = seal_order(content, by, study=self.study.digest, to=to, action=action, manifest=manifest, now=now)
        message = Message(packed(meddle(sealed)), 1000, type or action, group_id=str(round))
        message.metadata.__dict__["_message_id"] = f"flower-{digest[:8]}"
        return message, digest

    def answer(self, order: tuple[Message, str], signed: SignedStudy | None = None) -> Reply:
        """The opened reply; a seal that does not hold raises."""
        message, digest = order
        said = self.desk.answer(message, {"plan": "", "signatures": (signed or self.signed()).to_text()})
        assert said.metadata.reply_to_message_id == message.metadata.message_id
        study = self.study.digest if digest else ""  # what carries no seal is not named
        return open_reply(unpacked(said.content), roster=self.consortium.roster, site="va", study=study, order=digest)

    def records(self) -> list[dict[str, object]]:
        lines = (self.config.state / "audit.jsonl").read_text().splitlines()
        return [json.loads(line)["body"] for line in lines]

    def events(self) -> list[str]:
        return [str(record["event"]) for record in self.records()]


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    found = Ward(tmp_path)
    found.approve()
    yield found
    found.desk.close()


def refused(ward: Ward, reply: Reply, why: str, code: int = REFUSED) -> None:
    """It is a sealed refusal in one line, it stands in the log, and the app has heard nothing."""
    assert reply.refusal is not None
    assert reply.refusal[0] == code
    assert re.search(why, reply.refusal[1]), reply.refusal
    assert set(reply.content) == {"refusal"}
    assert ward.events()[-1] == "order.refused"
    assert ward.app.heard == []


# --- what is carried out ---------------------------------------------------------------------------------------------------


def test_an_approved_order_reaches_the_app_as_it_was_written_and_the_reply_is_sealed(ward: Ward):
    order = ward.order(model=2.5)
    reply = ward.answer(order)
    assert reply.refusal is None
    ((content, told),) = ward.app.heard
    assert set(content) == {"facts", "model"}
    assert content["model"]["w"].numpy().tolist() == [2.5] * 3  # type: ignore[index]
    assert told == {"type": "train", "plan": STUDY.text}
    assert reply.content["model"]["w"].numpy().tolist() == [1.0] * 3  # type: ignore[index]
    assert "order.accepted" in ward.events()


def test_the_app_is_made_once_and_not_before_there_is_something_to_do(ward: Ward):
    assert ward.app.made == 0
    for round in (1, 2, 3):
        assert ward.answer(ward.order(round)).refusal is None
    assert ward.app.made == 1


@pytest.mark.parametrize("action", ["query", "query.counts", "query.close"])
def test_questions_without_a_model_are_answered_too(ward: Ward, action: str):
    assert ward.answer(ward.order(action=action)).refusal is None
    assert ward.app.heard[0][1]["type"] == action


def test_what_the_app_refuses_is_said_in_its_words_and_written_down(ward: Ward):
    ward.app.says = lambda message: Message(Error(ROUND_TAKEN, "round 1 was begun"), reply_to=message)
    assert ward.answer(ward.order()).refusal == (ROUND_TAKEN, "round 1 was begun")
    assert ward.events()[-1] == "order.refused"


def test_a_study_named_in_the_site_file_needs_no_approval(tmp_path: Path):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    ward = Ward(tmp_path, allow=f'{ALLOW}\nstudies = ["heart"]')
    assert ward.answer(ward.order()).refusal is None
    ward.desk.close()


# --- plans -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Ward]:
    """A hospital that has approved nothing."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    found = Ward(tmp_path)
    yield found
    found.desk.close()


def test_an_unapproved_plan_is_refused(stranger: Ward):
    refused(stranger, stranger.answer(stranger.order()), "is not approved here")


def test_an_approval_that_was_taken_back_ends_the_study_here(ward: Ward):
    assert ward.answer(ward.order(1)).refusal is None
    (page,) = ward.book.pages()
    ward.book.revoke(page, ward.consortium.signers["va"], datetime.now(UTC))
    ward.app.heard.clear()
    refused(ward, ward.answer(ward.order(2)), "not approved here: it was taken back")
    refused(ward, ward.answer(ward.order(1)), "not approved here: it was taken back")


def test_an_approval_is_for_one_run(ward: Ward, monkeypatch: pytest.MonkeyPatch):
    assert ward.answer(ward.order(action="query")).refusal is None
    ward.app.heard.clear()
    monkeypatch.setattr(sys.modules[__name__], "RUN", "c" * 16)
    refused(ward, ward.answer(ward.order(action="query")), "wants another approval")
    refused(ward, ward.answer(ward.order()), "wants another approval")
    ward.approve()
    assert ward.answer(ward.order()).refusal is None


def test_an_approval_ends_with_its_last_day(ward: Ward):
    assert ward.answer(ward.order(1)).refusal is None
    ward.book.approve(STUDY, ward.consortium.signers["va"], NOW, NOW.date() - timedelta(days=1))
    ward.app.heard.clear()
    refused(ward, ward.answer(ward.order(2)), "not approved here: the approval of va ended on")


def test_an_unsigned_plan_is_refused(ward: Ward):
    message, digest = ward.order()
    for settings in ({}, {"plan": PLAN}, {"plan": PLAN, "signatures": 7}):
        found = unpacked(ward.desk.answer(message, dict(settings)).content)
        said = open_reply(found, roster=ward.consortium.roster, site="va", study=STUDY.digest, order=digest)
        refused(ward, said, "without signatures")


def test_a_plan_without_the_coordinators_signature_is_refused(ward: Ward):
    yeses = ward.signed().signatures[1:]
    refused(ward, ward.answer(ward.order(), SignedStudy(STUDY, yeses)), "the coordinator did not sign it")


def test_a_plan_that_somebody_else_signed_is_refused(ward: Ward):
    refused(ward, ward.answer(ward.order(), ward.signed(by=a_stranger("coordinator"))), "not signed by coordinator")


def test_a_plan_that_was_altered_is_another_study(ward: Ward):
    altered = SignedStudy(a_study(PLAN.replace("rounds = 10", "rounds = 11")), ward.signed().signatures)
    refused(ward, ward.answer(ward.order(), altered), "belongs to another study plan")


def test_an_altered_plan_with_orders_to_match_is_not_the_one_that_was_signed(ward: Ward, tmp_path: Path):
    signatures = ward.signed().signatures
    ward.study = a_study(PLAN.replace("rounds = 10", "rounds = 11"))
    ward.approve()  # even so: signatures are of the other text
    refused(ward, ward.answer(ward.order(), SignedStudy(ward.study, signatures)), "the coordinator signed another text")


def test_two_of_three_hospitals_must_have_said_yes(ward: Ward):
    assert ward.answer(ward.order(1), ward.signed("va", "hungarian")).refusal is None
    ward.app.heard.clear()
    refused(ward, ward.answer(ward.order(2), ward.signed("va")), "1 of the 2 approvals it needs hold")


def test_a_yes_counts_no_longer_once_its_hospital_was_taken_back(ward: Ward):
    assert ward.answer(ward.order(1)).refusal is None
    ward.consortium.revoke("cleveland")
    ward.app.heard.clear()
    refused(ward, ward.answer(ward.order(2)), "1 of the 2 approvals it needs hold")


# --- orders ----------------------------------------------------------------------------------------------------------------


def test_an_order_given_before_is_a_replay(ward: Ward):
    first = ward.order(1)
    assert ward.answer(first).refusal is None
    assert ward.answer(ward.order(2)).refusal is None
    ward.app.heard.clear()
    refused(ward, ward.answer(first), "replay")


def test_an_older_round_is_over(ward: Ward):
    late = ward.order(1)
    assert ward.answer(ward.order(2)).refusal is None
    ward.app.heard.clear()
    refused(ward, ward.answer(late), "round 1 is over")


def test_an_order_for_another_site_is_refused(ward: Ward):
    refused(ward, ward.answer(ward.order(to="cleveland")), "for another site")


@pytest.mark.parametrize("name", ["coordinator", "mallory", "cleveland"])
def test_an_order_of_anybody_else_is_refused(ward: Ward, name: str):
    refused(ward, ward.answer(ward.order(by=a_stranger(name))), "sign|roster")


def test_a_hospital_orders_nothing(ward: Ward):
    refused(ward, ward.answer(ward.order(by=ward.consortium.signers["cleveland"])), "role of a coordinator|signed by cleveland")


def test_a_coordinator_that_was_taken_back_orders_nothing(ward: Ward):
    ward.consortium.revoke("coordinator")
    refused(ward, ward.answer(ward.order()), "revoked")


def test_an_order_older_than_the_coordinator_waits_is_stale(ward: Ward):
    old = time.time() - STUDY.plan.deadline_seconds - 400
    refused(ward, ward.answer(ward.order(now=old)), r"the order is \d+ s old")


def test_an_order_from_the_future_says_that_clocks_differ(ward: Ward):
    refused(ward, ward.answer(ward.order(now=time.time() + 600)), "ahead of this site's clock")


def test_a_model_that_is_not_its_manifests_is_refused(ward: Ward):
    def swapped(content: RecordDict) -> RecordDict:
        return RecordDict({**content, "model": pack({"w": torch.full((3,), 9.0)})})

    refused(ward, ward.answer(ward.order(meddle=swapped)), "not what the coordinator sealed|not the one of its manifest")


def test_a_round_has_one_model(ward: Ward):
    assert ward.answer(ward.order(1, model=1.0)).refusal is None
    ward.app.heard.clear()
    refused(ward, ward.answer(ward.order(1, model=2.0)), "already begun from another model", ROUND_TAKEN)


def test_an_order_under_another_type_is_refused(ward: Ward):
    refused(ward, ward.answer(ward.order(action="query", type="query.close")), "sealed for another purpose")


def test_an_unsealed_message_is_refused(ward: Ward):
    def bare(content: RecordDict) -> RecordDict:
        return RecordDict({name: record for name, record in content.items() if name != "seal"})

    message, _ = ward.order(meddle=bare)
    refused(ward, ward.answer((message, "")), "not sealed")


def test_what_is_no_parcel_is_refused(ward: Ward):
    message, _ = ward.order()
    message.__dict__["_content"] = RecordDict({"anything": ConfigRecord({"x": 1})})
    refused(ward, ward.answer((message, "")), "no parcel")


def test_on_a_full_disk_nothing_is_begun(ward: Ward, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ward.desk.audit, "has_room", lambda: False)
    refused(ward, ward.answer(ward.order()), "^this site's disk is full$")
    monkeypatch.undo()
    assert ward.answer(ward.order()).refusal is None


# --- no word of another library, no code -----------------------------------------------------------------------------------


def test_nothing_of_another_librarys_message_leaves(ward: Ward, caplog: pytest.LogCaptureFixture):
    def breaks(message: Message) -> Message:
        raise KeyError(SECRET)

    ward.app.says = breaks
    with caplog.at_level(logging.ERROR, logger="wardround.site"):
        reply = ward.answer(ward.order())
    assert reply.refusal is not None
    assert reply.refusal[0] == INTERNAL
    assert re.fullmatch(r"internal error, see the site's log, ref [0-9a-f]{4}", reply.refusal[1])
    assert SECRET in caplog.text
    assert SECRET not in json.dumps(ward.records())
    assert ward.events()[-1] == "order.refused"
    assert reply.refusal[1].split()[-1] in str(ward.records()[-1])


@pytest.mark.parametrize("type", ["query.install", "query.evil", "train.evil", "evaluate.evil", "system.fab"])
def test_the_installed_app_answers_its_own_kinds_of_orders_and_no_other(ward: Ward, type: str):
    ward.desk._make_app = client_app
    reply = ward.answer(ward.order(action=type)) if not type.startswith("train") else ward.answer(ward.order(type=type))
    assert reply.refusal is not None


def test_code_beside_a_model_is_not_even_looked_at(ward: Ward):
    bundle = ConfigRecord({"content": b"PK\x03\x04", "hash": "0" * 64})
    slipped_in = ward.order(meddle=lambda content: RecordDict({**content, "fab": bundle}))
    refused(ward, ward.answer(slipped_in), "not what the coordinator sealed")
    ward.desk._make_app = client_app  # and from the coordinator itself
    content = RecordDict({**RollCall(STUDY.digest, RUN).pack(), "fab": bundle})
    sealed, digest = seal_order(content, ward.coordinator, study=STUDY.digest, to="va", action="query")
    message, _ = ward.order(action="query")
    message.__dict__["_content"] = packed(sealed)
    reply = ward.answer((message, digest))
    assert reply.refusal is None
    assert set(reply.content) == {"facts"}


# --- answers that were given before ----------------------------------------------------------------------------------------


def test_a_round_asked_again_is_answered_with_the_same_tensors_by_nobody(ward: Ward):
    first = ward.answer(ward.order(1, model=1.0))
    again = ward.answer(ward.order(1, model=1.0))
    assert len(ward.app.heard) == 1
    assert again.content == first.content
    assert again.signed.body["to_order"] != first.signed.body["to_order"]


def test_the_very_same_order_twice_is_answered_twice_and_trained_once(ward: Ward):
    order = ward.order(1)
    assert ward.answer(order).content == ward.answer(order).content
    assert len(ward.app.heard) == 1


def test_a_desk_opened_anew_remembers_its_answer(ward: Ward):
    first = ward.answer(ward.order(1, model=1.0))
    ward.desk.close()
    ward.desk = Desk(ward.path, ward.config, ward._made)
    assert ward.answer(ward.order(1, model=1.0)).content == first.content
    assert len(ward.app.heard) == 1


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: b"other" + data])
def test_a_damaged_answer_is_trained_anew(ward: Ward, damage: Callable[[bytes], bytes]):
    ward.answer(ward.order(1, model=1.0))
    (kept,) = (ward.config.state / "answers").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert ward.answer(ward.order(1, model=1.0)).refusal is None
    assert len(ward.app.heard) == 2


def test_a_refusal_is_not_kept(ward: Ward):
    ward.app.says = lambda message: Message(Error(REFUSED, "not today"), reply_to=message)
    ward.answer(ward.order(1, model=1.0))
    ward.app.says = None
    assert ward.answer(ward.order(1, model=1.0)).refusal is None
