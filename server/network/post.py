"""The coordinator's side of the seals: orders go out under its signature, replies count under the site's."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict

from wardround.common.audit_log import AuditLog
from wardround.common.errors import AuditBroken, TrustRefused, UpdateRefused, WardroundError
from wardround.common.files import write_atomically
from wardround.common.parcels import packed, unpacked
from wardround.common.plan import SignedText
from wardround.common.seals import model_manifest, open_reply, seal_order
from wardround.common.trust.certificates import COORDINATOR
from wardround.common.trust.roster import Roster
from wardround.common.trust.signing import Signed, Signer
from wardround.server.network.config import CoordinatorConfig

_LOG_SECONDS = 5.0


def coordinator_signer(config: CoordinatorConfig) -> Signer:
    """Who signs for this coordinator; raises `ConfigError` where the key is not as it must be."""
    return Signer.load(COORDINATOR, config.keys / "sign.key")


def opened_post(config: CoordinatorConfig, study: SignedText, folder: Path) -> tuple[SealedPost, Mapping[bytes, str]]:
    """The post of one study, and which of Flower's keys belongs to which of its sites."""
    roster, signer = Roster(config.trust), coordinator_signer(config)
    audit = _opened_log(folder / "audit.jsonl", signer, study.digest)
    return SealedPost(signer, roster, study.digest, folder, audit), Seats(roster, tuple(study.plan.sites))


def _opened_log(path: Path, signer: Signer, study: str) -> AuditLog:
    """The study's log, once an earlier process of this study, which may be about to end, has given it back."""
    deadline = time.monotonic() + _LOG_SECONDS
    while True:
        try:
            return AuditLog.open(path, signer, about=study)
        except AuditBroken:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


class Seats(Mapping[bytes, str]):
    """Flower's key -> site, of the plan's sites. One that is enrolled anew while its study runs is here from then on."""

    def __init__(self, roster: Roster, sites: tuple[str, ...]) -> None:
        self._roster, self._sites = roster, sites
        self._known: dict[bytes, str] = {}

    def __getitem__(self, key: bytes) -> str:
        if key not in self._known:
            for site in self._sites:
                with contextlib.suppress(TrustRefused):  # it is told when it would connect
                    self._known[self._roster.node_key(site)] = site
        return self._known[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


class SealedPost:
    """Seals orders, opens replies, and writes both down.

    Args:
        signer: the coordinator.
        roster: whose signature counts.
        study: SHA-256 of the plan's text.
        folder: of the study; the chain of manifests is kept there.
        audit: the study's log.
    """

    def __init__(self, signer: Signer, roster: Roster, study: str, folder: Path, audit: AuditLog) -> None:
        self._signer, self._roster, self._study, self._audit = signer, roster, study, audit
        self._chain = _Chain(folder / "manifests.json")
        self._manifests: dict[tuple[str, str, int], Signed] = {}  # of the round at hand

    def seal(self, site: str, action: str, content: RecordDict) -> tuple[RecordDict, str]:
        """See `grid.Post`."""
        manifest = self._manifest(action, content)
        sealed, digest = seal_order(
            content,
            self._signer,
            study=self._study,
            to=site,
            action=action,
            manifest=manifest,
            audit=self._audit.head,
        )
        self._audit.add("order", to=site, action=action, order=digest, round=_round(content))
        return packed(sealed), digest

    def open(self, site: str, order: str, reply: Message) -> RecordDict | Error:
        """See `grid.Post`."""
        try:
            if reply.has_error():
                raise UpdateRefused("the reply is not sealed")
            found = open_reply(unpacked(reply.content), roster=self._roster, site=site, study=self._study, order=order)
        except WardroundError as error:
            self._audit.add("reply.refused", site=site, order=order, why=str(error))
            raise
        self._audit.anchor(site, *found.audit)
        self._audit.add("reply", site=site, order=order, reply=found.signed.digest, refused=found.refusal is not None)
        return Error(*found.refusal) if found.refusal else found.content

    def close(self) -> None:
        """Sign the log and give it back."""
        self._audit.close()

    def _manifest(self, action: str, content: RecordDict) -> Signed | None:
        model, facts = content.get("model"), content["facts"]
        if not isinstance(model, ArrayRecord) or not isinstance(facts, ConfigRecord):
            return None
        run, round = str(facts["run"]), _round(content)
        if (run, action, round) not in self._manifests:
            previous = self._chain.digest(run, round - 1 if action == "train" else round)
            body = model_manifest(model, study=self._study, run=run, round=round, previous=previous, action=action)
            signed = self._signer.sign("model", body)
            if action == "train":
                self._chain.add(run, round, signed.digest)
            self._manifests = {(run, action, round): signed}
        return self._manifests[run, action, round]


class _Chain:
    """Digests of the manifests of a run, on disk before a manifest leaves."""

    _KEPT = 3  # rounds

    def __init__(self, path: Path) -> None:
        self._path = path
        self._of: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError):
            self._of = dict(json.loads(path.read_text()))

    def digest(self, run: str, round: int) -> str:
        return self._of.get(f"{run}/{round}", "")

    def add(self, run: str, round: int, digest: str) -> None:
        kept = {key: value for key, value in self._of.items() if key.startswith(f"{run}/")}
        newest = dict(list(kept.items())[-self._KEPT :]) | {f"{run}/{round}": digest}
        write_atomically(self._path, json.dumps(newest).encode())
        self._of = newest


def _round(content: RecordDict) -> int:
    facts = content.get("facts")
    found = facts.get("round", 0) if isinstance(facts, ConfigRecord) else 0
    return found if isinstance(found, int) else 0
