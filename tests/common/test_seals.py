"""A seal says who made a message, for whom, about what, and what is in it; whatever else is tried is refused."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rosters import Consortium, a_stranger
from wardround.common.contents import tensors_of
from wardround.common.errors import OrderRefused, SignatureRefused, UpdateRefused
from wardround.common.messages import Farewell, OrderFacts, RollCall, UpdateFacts, pack_with_model
from wardround.common.seals import (
    CLOCKS,
    Order,
    content_digest,
    model_manifest,
    open_order,
    open_reply,
    refusal,
    refusal_in,
    seal_order,
    seal_reply,
)
from wardround.common.trust.signing import Signed
from wardround.common.weights import pack

STUDY, RUN, NOW = "a" * 64, "b" * 16, 1_700_000_000.0
MODEL = {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.0, -1.0])}
ORDER = OrderFacts(STUDY, RUN, 3, 1, "c" * 64)
UPDATE = UpdateFacts("va", STUDY, RUN, 3, 1, "c" * 64, 3)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("trust") / "public")


def sent(content: RecordDict) -> RecordDict:
    """Through Flower's own bytes."""
    return recorddict_from_proto(ProtoRecordDict.FromString(recorddict_to_proto(content).SerializeToString()))


def manifest_of(consortium: Consortium, model: dict[str, torch.Tensor] = MODEL, **changes: Any) -> Signed:
    body = model_manifest(pack(model), study=STUDY, run=RUN, round=3, previous="d" * 64)
    return consortium.signers["coordinator"].sign("model", body | changes)


def an_order(consortium: Consortium, **changes: Any) -> RecordDict:
    content = changes.pop("content", None) or pack_with_model(ORDER, MODEL)
    signer = changes.pop("signer", consortium.signers["coordinator"])
    options = {"study": STUDY, "to": "va", "action": "train", "manifest": manifest_of(consortium), "now": NOW} | changes
    return sent(seal_order(content, signer, **options)[0])


def opened(consortium: Consortium, content: RecordDict, **changes: Any) -> Order:
    options = {"site": "va", "study": STUDY, "action": "train", "patience": 3600.0, "now": NOW} | changes
    return open_order(content, roster=consortium.roster, **options)


# ---- orders


def test_an_order_arrives_as_it_was_sealed(consortium: Consortium):
    before = pack_with_model(ORDER, MODEL)
    sealed, digest = seal_order(
        before, consortium.signers["coordinator"], study=STUDY, to="va", action="train",
        manifest=manifest_of(consortium), audit=(7, "e" * 64), now=NOW,
    )  # fmt: skip
    assert set(before) == {"facts", "model"}
    order = opened(consortium, sent(sealed))
    assert set(order.content) == {"facts", "model"}
    assert content_digest(order.content) == content_digest(before)
    assert (order.digest, order.study, order.action, order.audit) == (digest, STUDY, "train", (7, "e" * 64))
    assert (order.run, order.round, order.attempt) == (RUN, 3, 1)
    assert order.manifest == manifest_of(consortium)


def test_an_order_without_a_model_needs_no_manifest(consortium: Consortium):
    for facts in (RollCall(STUDY, RUN), Farewell(STUDY, RUN)):
        sealed = an_order(consortium, content=facts.pack(), action="query", manifest=None)
        order = opened(consortium, sealed, action="query")
        assert (order.manifest, order.run, order.round) == (None, RUN, 0)


def test_an_order_without_a_model_names_none(consortium: Consortium):
    sealed = an_order(consortium, content=RollCall(STUDY, RUN).pack(), action="query")
    for manifest in (manifest_of(consortium).text(), ""):
        seal = ConfigRecord({**sealed["seal"], "manifest": manifest})
        with pytest.raises(OrderRefused, match="names a model that it does not carry"):
            opened(consortium, RecordDict({**sealed, "seal": seal}), action="query")


def test_sealed_twice_it_is_two_orders(consortium: Consortium):
    one, two = (opened(consortium, an_order(consortium)) for _ in range(2))
    assert one.digest != two.digest
    assert one.manifest is not None
    assert two.manifest is not None
    assert one.manifest.digest == two.manifest.digest


def test_an_order_for_somebody_or_something_else_is_refused(consortium: Consortium):
    sealed = an_order(consortium)
    for asked, said in (
        ({"site": "cleveland"}, "for another site"),
        ({"study": "0" * 64}, "another study plan"),
        ({"action": "evaluate"}, "another purpose"),
        ({"now": NOW + 3600 + CLOCKS + 1}, "3901 s old"),
        ({"now": NOW - CLOCKS - 1}, "301 s ahead of this site's clock"),
    ):
        with pytest.raises(OrderRefused, match=said):
            opened(consortium, sealed, **asked)
    opened(consortium, sealed, now=NOW + 3600)
    opened(consortium, sealed, now=NOW - CLOCKS)


def test_only_the_coordinator_gives_orders(consortium: Consortium, tmp_path: Path):
    for signer in (consortium.signers["cleveland"], consortium.signers["va"], a_stranger("coordinator")):
        with pytest.raises(SignatureRefused):
            opened(consortium, an_order(consortium, signer=signer))
    revoked = Consortium(tmp_path / "public")
    sealed = an_order(revoked)
    opened(revoked, sealed)
    revoked.revoke("coordinator")
    with pytest.raises(SignatureRefused, match="revoked"):
        opened(revoked, sealed)


def test_a_seal_of_another_kind_opens_nothing(consortium: Consortium):
    sealed = an_order(consortium)
    text = consortium.signers["coordinator"].sign("reply", Signed.parse(sealed["seal"]["text"], kind="order").body).text()
    with pytest.raises(SignatureRefused, match="a signed order was wanted"):
        opened(consortium, RecordDict({**sealed, "seal": ConfigRecord({**sealed["seal"], "text": text})}))


def meddled(sealed: RecordDict, part: str) -> RecordDict:
    """`sealed` with something changed in the most inconspicuous way."""
    facts, model, seal = sealed["facts"], sealed["model"], sealed["seal"]
    w = model["w"]
    records: dict[str, dict[str, Any]] = {
        "a round": {"facts": ConfigRecord({**facts, "round": 4})},
        "a number's type": {"facts": ConfigRecord({**facts, "round": 3.0})},
        "a fact more": {"facts": ConfigRecord({**facts, "more": 1})},
        "a fact's name": {"facts": ConfigRecord({**{k: v for k, v in facts.items() if k != "run"}, "Run": facts["run"]})},
        "a record more": {"more": ConfigRecord({})},
        "the kind of a record": {"facts": MetricRecord({"round": 3})},
        "a tensor's last bit": {"model": ArrayRecord({**model, "w": Array(w.dtype, w.shape, w.stype, w.data[:-1] + b"\1")})},
        "a tensor's shape": {"model": ArrayRecord({**model, "w": Array(w.dtype, (3, 2), w.stype, w.data)})},
        "a tensor's dtype": {"model": ArrayRecord({**model, "w": Array("int32", w.shape, w.stype, w.data)})},
        "a tensor's format": {"model": ArrayRecord({**model, "w": Array(w.dtype, w.shape, "torch", w.data)})},
        "a tensor's name": {"model": ArrayRecord({"v": w, "b": model["b"]})},
        "tensors exchanged": {"model": ArrayRecord({"w": model["b"], "b": w})},
        "a tensor more": {"model": ArrayRecord({**model, "x": w})},
        "no seal": {"seal": ConfigRecord({})},
        "a seal that is no record": {"seal": MetricRecord({"text": 1})},
        "a seal of bytes": {"seal": ConfigRecord({**seal, "text": seal["text"].encode()})},
        "a seal and more": {"seal": ConfigRecord({**seal, "more": ""})},
        "no manifest": {"seal": ConfigRecord({**seal, "manifest": ""})},
    }
    return RecordDict({**sealed, **records[part]})


@pytest.mark.parametrize("part", [
    "a round", "a number's type", "a fact more", "a fact's name", "a record more", "the kind of a record",
    "a tensor's last bit", "a tensor's shape", "a tensor's dtype", "a tensor's format", "a tensor's name", "tensors exchanged",
    "a tensor more", "no seal", "a seal that is no record", "a seal of bytes", "a seal and more", "no manifest",
])  # fmt: skip
def test_whatever_is_changed_under_a_seal_is_refused(consortium: Consortium, part: str):
    with pytest.raises((OrderRefused, SignatureRefused)):
        opened(consortium, meddled(an_order(consortium), part))


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_byte_of_a_sealed_order_passes(consortium: Consortium, data: st.DataObject):
    sealed = an_order(consortium)
    whole = bytearray(recorddict_to_proto(sealed).SerializeToString(deterministic=True))
    at, by = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    whole[at] ^= by
    try:
        content = recorddict_from_proto(ProtoRecordDict.FromString(bytes(whole)))
    except Exception:  # Flower cannot read it either
        return
    try:
        order = opened(consortium, content)
    except (OrderRefused, SignatureRefused):
        return
    assert content_digest(order.content) == content_digest(pack_with_model(ORDER, MODEL))  # a field that Flower skips


# ---- the model's manifest


def test_a_manifest_says_the_same_of_the_same_model(consortium: Consortium):
    there = sent(RecordDict({"model": pack(dict(reversed(MODEL.items())))}))["model"]
    body = manifest_of(consortium).body
    assert model_manifest(there, study=STUDY, run=RUN, round=3, previous="d" * 64) == body
    assert [tensor[:3] for tensor in body["tensors"]] == [["b", "float32", [2]], ["w", "float32", [2, 3]]]


@pytest.mark.parametrize(("manifest", "said"), [
    ({"model": {"w": MODEL["w"], "b": MODEL["b"] + 1e-6}}, "not the one of its manifest"),
    ({"model": {"w": MODEL["w"]}}, "not the one of its manifest"),
    ({"round": 2}, "belongs to another round"),
    ({"run": "e" * 16}, "belongs to another round"),
    ({"study": "e" * 64}, "another study or purpose"),
    ({"action": "evaluate"}, "another study or purpose"),
    ({"more": 1}, "cannot be read"),
    ({"round": "3"}, "cannot be read"),
    ({"tensors": "none"}, "cannot be read"),
    ({"previous": "d" * 1000}, "cannot be read"),
])  # fmt: skip
def test_a_model_that_its_manifest_does_not_describe_is_refused(consortium: Consortium, manifest: dict[str, Any], said: str):
    sealed, other = an_order(consortium), manifest_of(consortium, **manifest)
    body = Signed.parse(sealed["seal"]["text"], kind="order").body | {"model": other.digest}
    text = consortium.signers["coordinator"].sign("order", body).text()
    seal = ConfigRecord({"text": text, "manifest": other.text()})
    with pytest.raises(OrderRefused, match=said):
        opened(consortium, RecordDict({**sealed, "seal": seal}))


def test_a_model_is_hashed_once_and_not_once_a_site(consortium: Consortium):
    manifest, content = manifest_of(consortium), pack_with_model(ORDER, MODEL)
    options = {"study": STUDY, "to": "va", "action": "train", "manifest": manifest, "now": NOW}
    sealed, _ = seal_order(content, consortium.signers["coordinator"], **options)
    assert all("data" not in array.__dict__ for array in content["model"].values())
    opened(consortium, sent(sealed))
    changed = pack_with_model(ORDER, {"w": MODEL["w"] + 1, "b": MODEL["b"]})
    sealed, _ = seal_order(changed, consortium.signers["coordinator"], **options)
    with pytest.raises(OrderRefused, match="not what the coordinator sealed"):
        opened(consortium, sent(sealed))


def test_a_manifest_is_the_coordinators_and_the_orders_own(consortium: Consortium):
    sealed = an_order(consortium)
    body = manifest_of(consortium).body
    for text in (
        consortium.signers["va"].sign("model", body).text(),
        a_stranger("coordinator").sign("model", body).text(),
        "x",
    ):
        with pytest.raises(SignatureRefused):
            opened(consortium, RecordDict({**sealed, "seal": ConfigRecord({**sealed["seal"], "manifest": text})}))
    other = manifest_of(consortium, previous="f" * 64).text()
    with pytest.raises(OrderRefused, match="not the one the order names"):
        opened(consortium, RecordDict({**sealed, "seal": ConfigRecord({**sealed["seal"], "manifest": other})}))


def test_an_order_carries_the_one_model_its_purpose_needs(consortium: Consortium):
    for content, action in (
        (ORDER.pack(), "train"),
        (pack_with_model(ORDER, MODEL), "query"),
        (RecordDict({**pack_with_model(ORDER, MODEL), "more": pack(MODEL)}), "train"),
        (RecordDict({"facts": ORDER.record(), "other": pack(MODEL)}), "evaluate"),
    ):
        with pytest.raises(OrderRefused, match=r"should carry (one|no) model"):
            opened(consortium, an_order(consortium, content=content, action=action), action=action)


@pytest.mark.parametrize("facts", [
    {"study": "e" * 64}, {"run": ""}, {"run": "x" * 129}, {"run": "a\x1b[31m"}, {"run": 7}, {"round": -1}, {"round": True},
    {"round": 3.0}, {"attempt": "1"},
], ids=str)  # fmt: skip
def test_an_order_says_where_it_belongs(consortium: Consortium, facts: dict[str, Any]):
    content = RecordDict({"facts": ConfigRecord({**ORDER.record(), **facts}), "model": pack(MODEL)})
    with pytest.raises(OrderRefused, match="does not say which"):
        opened(consortium, an_order(consortium, content=content))


# ---- replies


def a_reply(
    consortium: Consortium, content: RecordDict | None = None, *, site: str = "va", order: str = "f" * 64
) -> RecordDict:
    content = content or pack_with_model(UPDATE, MODEL)
    return sent(seal_reply(content, consortium.signers[site], study=STUDY, order=order, audit=(9, "e" * 64)))


def test_a_reply_arrives_as_it_was_sealed(consortium: Consortium):
    reply = open_reply(a_reply(consortium), roster=consortium.roster, site="va", study=STUDY, order="f" * 64)
    assert content_digest(reply.content) == content_digest(pack_with_model(UPDATE, MODEL))
    assert (reply.refusal, reply.audit) == (None, (9, "e" * 64))


def test_a_reply_is_worth_nothing_elsewhere(consortium: Consortium):
    sealed, roster = a_reply(consortium), consortium.roster
    for asked, said in (
        ({"site": "cleveland"}, "another site's"),
        ({"order": "0" * 64}, "answers another order"),
        ({"study": "0" * 64}, "answers another order"),
    ):
        with pytest.raises(UpdateRefused, match=said):
            open_reply(sealed, roster=roster, **{"site": "va", "study": STUDY, "order": "f" * 64, **asked})


def test_nobody_answers_in_a_sites_name(consortium: Consortium):
    content = pack_with_model(UPDATE, MODEL)
    for signer in (a_stranger("va"), consortium.signers["coordinator"]):
        sealed = seal_reply(content, signer, study=STUDY, order="f" * 64)
        with pytest.raises(SignatureRefused):
            open_reply(sent(sealed), roster=consortium.roster, site="va", study=STUDY, order="f" * 64)
    with pytest.raises(UpdateRefused, match="another site's"):
        open_reply(a_reply(consortium, site="cleveland"), roster=consortium.roster, site="va", study=STUDY, order="f" * 64)


def test_a_changed_reply_is_refused(consortium: Consortium):
    sealed = a_reply(consortium)
    for changed in (
        RecordDict({**sealed, "facts": ConfigRecord({**sealed["facts"], "steps_spent": 4})}),
        RecordDict({"facts": sealed["facts"], "seal": sealed["seal"]}),
        RecordDict({"facts": sealed["facts"], "model": sealed["model"]}),
        RecordDict({**sealed, "seal": ConfigRecord({"text": "{}"})}),
        RecordDict({**sealed, "seal": ConfigRecord({"text": sealed["seal"]["text"], "manifest": ""})}),
    ):
        with pytest.raises((UpdateRefused, SignatureRefused)):
            open_reply(changed, roster=consortium.roster, site="va", study=STUDY, order="f" * 64)


@pytest.mark.parametrize("audit", [[], [1], [1, "a", 2], [-1, "a"], [True, "a"], ["1", "a"], [1, 2], [1, "a" * 1000]], ids=str)
def test_a_head_of_an_audit_log_is_a_number_and_a_hash(consortium: Consortium, audit: list[Any]):
    body = {"study": STUDY, "from": "va", "to_order": "f" * 64, "content": content_digest(UPDATE.pack()), "audit": audit}
    text = consortium.signers["va"].sign("reply", body).text()
    with pytest.raises(UpdateRefused, match="seal cannot be read"):
        open_reply(
            RecordDict({"facts": UPDATE.record(), "seal": ConfigRecord({"text": text})}),
            roster=consortium.roster, site="va", study=STUDY, order="f" * 64,
        )  # fmt: skip


# ---- refusals


@given(st.integers(100, 999), st.text(max_size=1200))
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_refusal_is_sealed_and_says_the_same_after(consortium: Consortium, code: int, text: str):
    if any("\ud800" <= character <= "\udfff" for character in text):
        return
    sealed = a_reply(consortium, refusal(code, text))
    reply = open_reply(sealed, roster=consortium.roster, site="va", study=STUDY, order="f" * 64)
    assert reply.refusal == (code, text[:1000])


def test_what_is_no_refusal_is_not_taken_for_one():
    assert refusal_in(UPDATE.pack()) is None
    good = dict(refusal(700, "no")["refusal"])
    for bad in (
        {"refusal": MetricRecord({"code": 700})},
        {"refusal": ConfigRecord({"code": 700})},
        {"refusal": ConfigRecord({**good, "more": 1})},
        {"refusal": ConfigRecord({**good, "code": True})},
        {"refusal": ConfigRecord({**good, "code": "700"})},
        {"refusal": ConfigRecord({**good, "text": "x" * 1001})},
        {"refusal": ConfigRecord({**good, "text": b"no"})},
        {"refusal": ConfigRecord(good), "facts": UPDATE.record()},
    ):
        with pytest.raises(UpdateRefused, match="cannot be read"):
            refusal_in(RecordDict(bad))  # type: ignore[arg-type]


# ---- anything else


def sealed_here(consortium: Consortium, content: RecordDict) -> RecordDict:
    """As the coordinator would seal it, but not sent: Flower would not send all of it."""
    return seal_order(content, consortium.signers["coordinator"], study=STUDY, to="va", action="train", now=NOW)[0]


NAMES = st.sampled_from(["seal", "facts", "model", "refusal", "x"])
SCALARS = st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(max_size=9))
CONFIGS = st.dictionaries(
    st.sampled_from(["text", "manifest", "study", "run", "code", "é"]),
    SCALARS | st.lists(st.integers(), max_size=3),
    max_size=4,
).map(ConfigRecord)
ARRAYS = st.builds(
    Array, st.text(max_size=5), st.lists(st.integers(), max_size=3).map(tuple), st.text(max_size=5), st.binary(max_size=20)
)
RECORDS = st.one_of(
    CONFIGS,
    st.dictionaries(st.text(max_size=4), st.integers() | st.floats(), max_size=3).map(MetricRecord),
    st.dictionaries(st.text(max_size=4), ARRAYS, max_size=3).map(ArrayRecord),
)


@given(st.dictionaries(NAMES, RECORDS, max_size=4), st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_message_raises_anything_but_a_refusal(consortium: Consortium, records: dict[str, Any], signed: bool):
    content = RecordDict(records)
    with pytest.raises((OrderRefused, SignatureRefused)):
        opened(consortium, content)
    with pytest.raises((UpdateRefused, SignatureRefused)):
        open_reply(content, roster=consortium.roster, site="va", study=STUDY, order="f" * 64)
    records.pop("seal", None)
    inner = RecordDict(records)
    reply = seal_reply(inner, consortium.signers["va"], study=STUDY, order="f" * 64)
    try:
        open_reply(reply, roster=consortium.roster, site="va", study=STUDY, order="f" * 64)
    except UpdateRefused:
        assert "refusal" in records
    with pytest.raises((OrderRefused, SignatureRefused)):
        opened(consortium, sealed_here(consortium, inner) if signed else inner)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(["study", "to", "action", "nonce", "time", "content", "model", "audit", "more"]), JSON, st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_coordinator_that_signs_nonsense_is_refused_too(consortium: Consortium, key: str, value: Any, drop: bool):
    sealed = an_order(consortium)
    body = dict(Signed.parse(sealed["seal"]["text"], kind="order").body)
    if drop:
        body.pop(key, None)
    if not drop or key == "more":
        body[key] = value
    if key == "nonce" and isinstance(value, str) and not drop:
        return
    text = consortium.signers["coordinator"].sign("order", body).text()
    with pytest.raises(OrderRefused):
        opened(consortium, RecordDict({**sealed, "seal": ConfigRecord({**sealed["seal"], "text": text})}))


# ---- digests

DIFFERENT: list[dict[str, Any]] = [
    {},
    {"a": ConfigRecord({})},
    {"a": MetricRecord({})},
    {"a": ArrayRecord({})},
    {"a": ConfigRecord({"x": 1})},
    {"a": ConfigRecord({"x": 1.0})},
    {"a": ConfigRecord({"x": True})},
    {"a": ConfigRecord({"x": "1"})},
    {"a": ConfigRecord({"x": b"1"})},
    {"a": ConfigRecord({"x": [1]})},
    {"a": ConfigRecord({"x": [1, 1]})},
    {"a": ConfigRecord({"x": [1.0, 1.0]})},
    {"a": ConfigRecord({"x": ["1", "1"]})},
    {"a": ConfigRecord({"x": ["11"]})},
    {"a": ConfigRecord({"x": 0.0})},
    {"a": ConfigRecord({"x": -0.0})},
    {"a": ConfigRecord({"x": float("nan")})},
    {"a": MetricRecord({"x": 1})},
    {"a": MetricRecord({"x": 1.0})},
    {"a": ConfigRecord({"x": 1}), "b": ConfigRecord({})},
    {"a": ConfigRecord({}), "b": ConfigRecord({"x": 1})},
    {"a": ArrayRecord({"x": Array("f", (1,), "n", b"12"), "y": Array("f", (1,), "n", b"3")})},
    {"a": ArrayRecord({"x": Array("f", (1,), "n", b"1"), "y": Array("f", (1,), "n", b"23")})},
    {"a": ArrayRecord({"x": Array("f", (1,), "n", b"123")})},
    {"a": ArrayRecord({"x": Array("f", (1, 1), "n", b"123")})},
    {"a": ArrayRecord({"x": Array("g", (1,), "n", b"123")})},
    {"a": ArrayRecord({"x": Array("f", (1,), "m", b"123")})},
]  # fmt: skip


def test_two_contents_never_share_a_digest_and_transport_changes_none():
    digests = [content_digest(RecordDict(records)) for records in DIFFERENT]
    assert len(set(digests)) == len(DIFFERENT)
    assert [content_digest(sent(RecordDict(records))) for records in DIFFERENT] == digests


def test_the_order_of_records_and_keys_does_not_count():
    one = RecordDict({"a": ConfigRecord({"x": 1, "y": 2}), "b": ConfigRecord({})})
    other = RecordDict({"b": ConfigRecord({}), "a": ConfigRecord({"y": 2, "x": 1})})
    assert content_digest(one) == content_digest(other)


def test_what_flower_cannot_send_has_no_digest():
    record = ArrayRecord({"w": Array("f", (1,), "n", b"1")})
    record["w"].__dict__["data"] = "text"
    with pytest.raises(OrderRefused, match="cannot be sent"):
        content_digest(RecordDict({"model": record}))


def test_a_digest_takes_hardly_longer_than_hashing():
    data = np.zeros(6_000_000, np.float32).tobytes()
    content = RecordDict({"model": ArrayRecord({"w": Array("float32", (6_000_000,), "numpy.ndarray", data)})})

    def seconds(act: Any) -> float:
        start = time.process_time()
        act()
        return time.process_time() - start

    hashing = min(seconds(lambda: hashlib.sha256(data).digest()) for _ in range(3))
    assert min(seconds(lambda: content_digest(content)) for _ in range(3)) < 2 * hashing + 0.005


def test_the_tensors_of_a_record_are_named_in_order():
    assert tensors_of({"m": ["arrays", {"b": ["f", [1], "n", "x"], "a": ["f", [], "n", "y"]}]}, "m") == [
        ["a", "f", [], "y"], ["b", "f", [1], "x"],
    ]  # fmt: skip
