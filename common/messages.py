"""Every record that crosses the wire, and nothing else does.

    coordinator                         hospital
      RollCall      -- query ------->     which study
                    <---------------     Present: who I am, whether I take part, my ledger's head
      Order         -- train ------->     the model, round and attempt, what I last saw of your ledger
                    <---------------     Update: tensors, and the same round repeated back
      LookFacts     -- evaluate ---->     a model to be judged; only where the plan has [validation]
                    <---------------     TallyFacts: sums over the patients set aside, with [privacy] noised
      CountFacts    -- query.counts ->     how many patients of each class; only where the plan has them counted
                    <---------------     CountedFacts: sums over the patients trained on, with [privacy] noised
      Farewell      -- query.close ->     the study is over
                    <---------------     Settled: what it cost here, in steps

But for these two sums there is no field for a record count, a loss or a metric: a hospital has no way to send one by accident.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from wardround.common.errors import OrderRefused
from wardround.common.weights import Shapes, Weights, pack, unpack

_LONGEST_TEXT = 1000  # characters of one field; ours are names, digests and short refusals


@dataclass(frozen=True)
class Facts:
    """A small message of named strings and numbers; `kind` keeps one from being taken for another."""

    kind: ClassVar[str] = "facts"

    def record(self) -> ConfigRecord:
        """These facts as Flower's record."""
        return ConfigRecord({"kind": self.kind, **vars(self)})

    def pack(self) -> RecordDict:
        """A message with nothing but these facts."""
        return RecordDict({"facts": self.record()})

    @classmethod
    def unpack(cls, content: RecordDict) -> Self:
        """Read facts back, strictly: every field, of its own type, and no other.

        Raises:
            OrderRefused: anything else was sent.
        """
        record = content.get("facts")
        if not isinstance(record, ConfigRecord) or record.get("kind") != cls.kind:
            raise OrderRefused(f"the message is no {cls.kind}")
        found = {key: value for key, value in record.items() if key != "kind"}
        wanted: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        if found.keys() != wanted.keys():
            raise OrderRefused(f"the {cls.kind} has other fields than {', '.join(wanted)}")
        for name, value in found.items():
            if type(value).__name__ != wanted[name] or (isinstance(value, str) and len(value) > _LONGEST_TEXT):
                raise OrderRefused(f"field {name} of the {cls.kind} is not a {wanted[name]}")
        return cls(**found)


@dataclass(frozen=True)
class RollCall(Facts):
    """Who is there for this study?"""

    kind: ClassVar[str] = "roll call"
    study: str  # SHA-256 of the plan's text
    run: str


@dataclass(frozen=True)
class Present(Facts):
    """A hospital's answer to the roll call."""

    kind: ClassVar[str] = "presence"
    site: str
    study: str
    refusal: str  # empty when the hospital takes part
    ledger_head: str  # hash of the newest entry; empty without privacy


@dataclass(frozen=True)
class OrderFacts(Facts):
    """Which round is to be trained."""

    kind: ClassVar[str] = "order"
    study: str
    run: str
    round: int
    attempt: int
    ledger_head: str  # the newest entry the coordinator has seen of this site's ledger; empty at first
    shares: bytes = b""  # of each class, where the plan has them counted: float64, little-endian


@dataclass(frozen=True)
class UpdateFacts(Facts):
    """Which round an update belongs to."""

    kind: ClassVar[str] = "update"
    site: str
    study: str
    run: str
    round: int
    attempt: int
    ledger_head: str
    steps_spent: int  # noised steps of this study so far: follows from the plan and the rounds taken part in


@dataclass(frozen=True)
class LookFacts(Facts):
    """After which round the patients set aside are looked at."""

    kind: ClassVar[str] = "look"
    study: str
    run: str
    round: int
    ledger_head: str = ""  # as in an order
    shares: bytes = b""  # as in an order


@dataclass(frozen=True)
class TallyFacts(Facts):
    """How a model does on the patients a site has set aside, all of them summed up."""

    kind: ClassVar[str] = "tally"
    site: str
    study: str
    run: str
    round: int
    sums: bytes  # see `common.tasks.looks`
    ledger_head: str = ""


@dataclass(frozen=True)
class CountFacts(Facts):
    """The training patients of each class are to be counted."""

    kind: ClassVar[str] = "count"
    study: str
    run: str
    ledger_head: str  # as in an order


@dataclass(frozen=True)
class CountedFacts(Facts):
    """How many patients a site trains on, by class; a patient of several classes is a part of each."""

    kind: ClassVar[str] = "counts"
    site: str
    study: str
    run: str
    ledger_head: str
    sums: bytes  # of each class: float64, little-endian


@dataclass(frozen=True)
class Farewell(Facts):
    """The study is over; unused reservations can be given back."""

    kind: ClassVar[str] = "farewell"
    study: str
    run: str


@dataclass(frozen=True)
class Settled(Facts):
    """What the study cost at a site, in noised steps."""

    kind: ClassVar[str] = "settlement"
    site: str
    study: str
    ledger_head: str
    steps_spent: int


def pack_with_model(facts: Facts, model: Weights | ArrayRecord) -> RecordDict:
    """Facts and one set of tensors; an `ArrayRecord` may be shared between messages."""
    arrays = model if isinstance(model, ArrayRecord) else pack(model)
    return RecordDict({"facts": facts.record(), "model": arrays})


def unpack_model(content: RecordDict, shapes: Shapes) -> Weights:
    """The tensors of a message.

    Raises:
        OrderRefused: the message holds other records than facts and one model.
        UpdateRefused: the tensors are not of these shapes (see `weights.unpack`).
    """
    # not content.array_records: that view and its message hold on to each other, and so to the tensors, until a gc
    model = content.get("model")
    if set(content.keys()) != {"facts", "model"} or not isinstance(model, ArrayRecord):
        raise OrderRefused("the message should hold facts and one model, nothing else")
    return unpack(model, shapes)
