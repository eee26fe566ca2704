"""One file a round: weights, what the step remembers, and the history. Atomic, digested, without pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch

from wardround.common.errors import CheckpointBroken, VaultBroken
from wardround.common.vault import Vault
from wardround.common.weights import Weights
from wardround.server.step import State

_KEPT = 2  # newest files; the second is for the day the first is damaged
_NAME = re.compile(r"round-\d{6}\.(safetensors|sealed)")
_ENDING = {False: ".safetensors", True: ".sealed"}  # the same bytes, plain or in a vault

log = logging.getLogger("wardround.coordinator")


@dataclass(frozen=True)
class RoundRecord:
    """What is remembered of one round."""

    round: int
    attempt: int
    seconds: float
    sites: list[str]
    dropped: dict[str, str]
    lost: bool
    update_norm: float | None
    metrics: dict[str, float]
    steps_spent: dict[str, int]
    validation: float | None = None  # how the model did on the patients set aside; None where nobody looked
    not_validated: dict[str, str] = field(default_factory=dict)  # site -> why it is left out of that look
    looked_at: list[str] = field(default_factory=list)  # sites that were asked to look


@dataclass(frozen=True)
class Counted:
    """How many training patients of each class sites answered before the first round.

    Attributes:
        sites: that answered, in the plan's order.
        counts: of each class, all sites together, noised where the plan has [privacy].
        missing: site -> why it is left out.
    """

    sites: list[str]
    counts: list[float]
    missing: dict[str, str]


@dataclass(frozen=True)
class Progress:
    """A study between two rounds: everything needed to go on."""

    study: str  # SHA-256 of the plan's text
    run: str
    round: int  # rounds finished, lost ones included
    weights: Weights
    state: State = field(default_factory=dict)
    ledger_heads: dict[str, str] = field(default_factory=dict)
    lost_in_a_row: int = 0
    history: list[RoundRecord] = field(default_factory=list)
    best: Weights = field(default_factory=dict)  # the model to release so far, where validation keeps one
    counted: Counted | None = None  # classes, where the plan has them counted
    frozen: Weights = field(default_factory=dict)  # of a file of public weights, what does not learn
    start: list[str] = field(default_factory=list)  # for the report: what came out of that file

    def save(self, folder: Path, vault: Vault = Vault.none()) -> None:
        """Write it into `folder`; a crash at any moment leaves the earlier file or this one, whole.

        With the key of a `vault` it is sealed, and called round-NNNNNN.sealed.

        Raises:
            OSError: the disk is full or read-only; the earlier file is intact.
        """
        folder.mkdir(parents=True, exist_ok=True)
        body = self._bytes()
        path = folder / f"round-{self.round:06d}{_ENDING[vault.seals]}"
        vault.write(path, body, hashlib.sha256(body).digest(), label=path.name)
        for old in _files(folder, vault)[:-_KEPT]:
            old.unlink()

    @classmethod
    def latest(cls, folder: Path, *, study: str, vault: Vault = Vault.none()) -> Self | None:
        """The newest whole checkpoint; None where there is none yet.

        Raises:
            CheckpointBroken: it belongs to another study, none of the files is whole, or they are sealed and the vault has
                no key, or the other way round.
        """
        files, why = _files(folder, vault), ""
        for path in reversed(files):
            try:
                found = cls._read(path, vault)
            except CheckpointBroken as error:
                why = str(error)
                log.warning("%s; the one before is used", why)
                continue
            if found.study != study:
                raise CheckpointBroken(f"{path.name} belongs to another study plan")
            return found
        if files:
            raise CheckpointBroken(f"none of the {len(files)} checkpoints is whole ({why})")
        return None

    def _bytes(self) -> bytes:
        tensors = {f"weights/{name}": tensor.contiguous() for name, tensor in self.weights.items()}
        tensors |= {f"state/{name}": tensor.contiguous() for name, tensor in self.state.items()}
        tensors |= {f"best/{name}": tensor.contiguous() for name, tensor in self.best.items()}
        tensors |= {f"frozen/{name}": tensor.contiguous() for name, tensor in self.frozen.items()}
        facts: dict[str, Any] = {
            "study": self.study,
            "run": self.run,
            "round": self.round,
            "ledger_heads": self.ledger_heads,
            "lost_in_a_row": self.lost_in_a_row,
            "counted": None if self.counted is None else asdict(self.counted),
            "start": self.start,
            "history": [asdict(record) for record in self.history],
        }
        body: bytes = safetensors.torch.save(tensors, metadata={"progress": json.dumps(facts)})
        return body

    @classmethod
    def _read(cls, path: Path, vault: Vault) -> Self:
        try:
            whole = vault.read(path, label=path.name)
        except VaultBroken as error:
            raise CheckpointBroken(str(error)) from None
        body, seal = bytes(memoryview(whole)[:-32]), whole[-32:]
        if hashlib.sha256(body).digest() != seal:
            raise CheckpointBroken(f"{path.name} is damaged")
        try:
            length = int.from_bytes(body[:8], "little")
            facts = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["progress"])
            tensors = safetensors.torch.load(body)
            history = [RoundRecord(**record) for record in facts.pop("history")]
            counted = facts.pop("counted", None)
            return cls(
                weights={n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")},
                state={n.removeprefix("state/"): t for n, t in tensors.items() if n.startswith("state/")},
                best={n.removeprefix("best/"): t for n, t in tensors.items() if n.startswith("best/")},
                frozen={n.removeprefix("frozen/"): t for n, t in tensors.items() if n.startswith("frozen/")},
                history=history,
                counted=None if counted is None else Counted(**counted),
                **facts,
            )
        except (ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError):
            raise CheckpointBroken(f"{path.name} was written by another version of wardround") from None


def _files(folder: Path, vault: Vault) -> list[Path]:
    found = sorted(path for path in folder.glob("round-*") if _NAME.fullmatch(path.name))
    if other := [path.name for path in found if path.suffix != _ENDING[vault.seals]]:  # to begin anew would spend privacy twice
        raise CheckpointBroken(f"{other[-1]} is not sealed" if vault.seals else f"{other[-1]} is sealed, and no key was given")
    return found
