"""The privacy ledger: the one place at a hospital that may say "go on".

An append-only, hash-chained SQLite journal. The whole cost of a study is reserved before its first record is opened; a
reservation that was never settled counts in full, so a crash can only cost privacy, never give it back.

    reserve   the study's noised steps, refused if the cohort's lifetime budget would be passed
    mark      a round is about to be trained; each mark spends `local.steps` of the reservation
    answer    the reply of a marked round, stored before it is sent: sending it again is free
    settle    the study is over: what was never marked is given back, once

Rounds and attempts count from 1. Attempt 0 is no training but a question of its own, reserved and marked like a round: of round
0 the count of classes, of any other the look at patients set aside after it.

A mark without an answer means that nothing left the site (an answer is on disk before it is sent), so training the same
round from the same model once more spends nothing new. Another model, or another attempt, is a new mark.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wardround.client.owned_sqlite import owned_by_us_alone, whole_change
from wardround.common.errors import BudgetExhausted, LedgerBroken, OrderRefused, RoundTaken
from wardround.common.privacy import Cost, NoisedSteps, filtered

_SCHEMA = """
CREATE TABLE IF NOT EXISTS journal(
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  kind TEXT NOT NULL CHECK(kind IN ('limit', 'reserve', 'mark', 'answer', 'settle')),
  cohort TEXT NOT NULL, study TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
  time REAL NOT NULL, body TEXT NOT NULL, prev TEXT NOT NULL, hash TEXT NOT NULL UNIQUE);
CREATE UNIQUE INDEX IF NOT EXISTS one_reserve ON journal(run) WHERE kind = 'reserve';
CREATE UNIQUE INDEX IF NOT EXISTS one_settle ON journal(run) WHERE kind = 'settle';
CREATE UNIQUE INDEX IF NOT EXISTS one_mark ON journal(run, round, attempt) WHERE kind = 'mark';
CREATE UNIQUE INDEX IF NOT EXISTS one_answer ON journal(run, round, attempt) WHERE kind = 'answer';
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON journal BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON journal BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TABLE IF NOT EXISTS reply(
  run TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, blob BLOB NOT NULL,
  PRIMARY KEY(run, round, attempt));
"""
_COUNT = "SELECT COUNT(*) FROM journal m WHERE m.kind = 'mark' AND"
_OF = {  # what a mark is of
    "training": "m.attempt > 0",
    "counts": "m.attempt = 0 AND m.round = 0",
    "looks": "m.attempt = 0 AND m.round > 0",
}
_GENESIS = "0" * 64
_PATIENCE = 30.0  # seconds another process may hold the file
_KEPT_REPLIES = 2  # rounds back for which a lost reply can be sent again


@dataclass(frozen=True)
class Cohort:
    """Patients who share one budget over all studies and data sets.

    Attributes:
        epsilon_lifetime: what all studies together may cost, at `delta`, by the Renyi filter.
    """

    name: str
    epsilon_lifetime: float
    delta: float


@dataclass(frozen=True)
class StudyAccount:
    """What one run of a study reserved and spent at this site."""

    cohort: str
    name: str
    study: str
    run: str
    reserved: NoisedSteps
    marked: int  # noised steps of marked rounds
    settled: bool
    counts: NoisedSteps | None = None  # reserved for the count of classes
    counted: int = 0  # times that classes were counted: 0 or 1
    looks: NoisedSteps | None = None  # reserved for looks at patients set aside
    looked: int = 0  # looks that were marked

    @property
    def charged(self) -> Cost:
        """What counts against the budget: the marks once settled, the whole reservation before."""
        if self.settled:
            return self.spent
        return Cost((self.reserved, *_of(self.counts)), _of(self.looks))

    @property
    def spent(self) -> Cost:
        """What was really released so far."""
        return Cost((replace(self.reserved, steps=self.marked), *_of(self.counts, self.counted)), _of(self.looks, self.looked))

    @property
    def holds(self) -> Cost:
        """What may be claimed at a fixed delta: looks may have decided when a study was over, and then it is the whole.

        The budget needs no such care: a filter allows for any ending.
        """
        return Cost((self.reserved, *_of(self.counts)), _of(self.looks)) if self.looked else self.spent


def _steps(terms: dict[str, Any]) -> NoisedSteps:
    return NoisedSteps(terms["sampling_rate"], terms["noise_multiplier"], terms["steps"])


def _of(question: NoisedSteps | None, times: int | None = None) -> tuple[NoisedSteps, ...]:
    if question is None:
        return ()
    return (question if times is None else replace(question, steps=times),)


@dataclass(frozen=True)
class Moment:
    """One attempt at one round of one run of a study; attempt 0 is a question beside training."""

    study: str
    run: str
    round: int
    attempt: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What makes it unique at a site."""
        return self.run, self.round, self.attempt


class PrivacyLedger:
    """A hospital's ledger file; safe to open from several processes at once.

    Raises:
        LedgerBroken: when opened, if the file is no ledger or its chain does not hold; later, if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _speaking_plainly():
            owned_by_us_alone(path, "ledger")
            self._db = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
        try:
            with _speaking_plainly():
                _patiently(lambda: self._db.execute("PRAGMA journal_mode = WAL"))
                self._db.execute("PRAGMA synchronous = FULL")
                _patiently(lambda: self._db.executescript(_SCHEMA))
            self.verify()
        except LedgerBroken:
            self._db.close()
            raise

    def close(self) -> None:
        """Give the file back."""
        self._db.close()

    def __enter__(self) -> PrivacyLedger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reserve(
        self,
        cohort: Cohort,
        *,
        study: str,
        name: str,
        run: str,
        steps: NoisedSteps,
        steps_per_round: int,
        counts: NoisedSteps | None = None,
        looks: NoisedSteps | None = None,
    ) -> None:
        """Set aside the whole cost of a study's run; asking again for the same run changes nothing.

        Args:
            cohort: whose budget pays.
            study: SHA-256 of the plan's text.
            name: the study's.
            run: which run of it.
            steps: all noised steps of training.
            steps_per_round: that one marked round spends.
            counts: the count of classes, which the patients trained on pay beside their steps.
            looks: all looks, which the patients set aside pay and nobody else.

        Raises:
            BudgetExhausted: with it, the cohort's lifetime budget would be passed, or the budget was lowered since.
            OrderRefused: the run was reserved with other numbers, or is already settled.
        """
        body = {**asdict(steps), "name": name, "steps_per_round": steps_per_round}
        body |= {key: asdict(asked) for key, asked in (("counts", counts), ("looks", looks)) if asked is not None}
        cost = Cost((steps, *_of(counts)), _of(looks))
        with self._writing():
            self._note_limit(cohort)
            known = self._one("SELECT study, cohort, body FROM journal WHERE kind = 'reserve' AND run = ?", run)
            if known is not None:
                if known[:2] != (study, cohort.name) or json.loads(known[2]) != body:
                    raise OrderRefused("this run was begun with another plan")
                self._refuse_settled(run)
            charged = [a.charged for a in self.accounts() if a.cohort == cohort.name]
            after = filtered(charged if known else [*charged, cost], cohort.delta)
            if not after <= cohort.epsilon_lifetime:  # so that NaN is refused too
                raise BudgetExhausted(  # what other studies spent here is nobody else's business
                    f"study {name} would pass what this site allows its patients over all studies",
                    detail=f"epsilon {after:.2f} with this study, epsilon_lifetime = {cohort.epsilon_lifetime:g}",
                )
            if known is None:
                self._append("reserve", cohort.name, Moment(study, run, 0, 0), body)

    def mark(self, at: Moment, *, model: str) -> bytes | None:
        """Write down that a round is about to be trained from the model with this digest.

        Returns:
            The stored reply if this very round was answered before; None if it is to be trained.

        Raises:
            RoundTaken: the same round and attempt was begun from another model.
            OrderRefused: no such reservation, or a reply no longer kept.
            BudgetExhausted: the reservation is used up.
        """
        with self._writing():
            cohort, terms = self._reservation(at.study, at.run)
            marked = self._entry("mark", at)
            if marked is not None:
                if marked["model"] != model:
                    raise RoundTaken(f"round {at.round} was already begun from another model")
                return self._stored_reply(at)
            self._refuse_settled(at.run)
            what = "training" if at.attempt else "looks" if at.round else "counts"
            each, whole = (terms["steps_per_round"], terms["steps"]) if at.attempt else (1, terms.get(what, {}).get("steps"))
            if whole is None:
                raise OrderRefused("the plan reserved nothing for this question")
            if (self._marks(at.run, what) + 1) * each > whole:
                raise BudgetExhausted(f"all steps reserved for study {terms['name']} are spent")
            self._append("mark", cohort, at, {"model": model})
            return None

    def answer(self, at: Moment, *, reply: bytes) -> None:
        """Store the reply of a marked round; from here on it may leave the site, any number of times.

        Raises:
            OrderRefused: the round was never marked, or another process answered it first.
        """
        with self._writing():
            cohort, _ = self._reservation(at.study, at.run)
            self._refuse_settled(at.run)
            if self._entry("mark", at) is None:
                raise OrderRefused(f"round {at.round} was never begun")
            if self._entry("answer", at) is not None:
                raise OrderRefused(f"round {at.round} was already answered")
            self._append("answer", cohort, at, {"sha256": hashlib.sha256(reply).hexdigest(), "bytes": len(reply)})
            self._db.execute("INSERT INTO reply VALUES(?, ?, ?, ?)", (*at.key, reply))
            self._db.execute("DELETE FROM reply WHERE run = ? AND round BETWEEN 1 AND ?", (at.run, at.round - _KEPT_REPLIES))

    def settle(self, *, study: str, run: str) -> int:
        """End a run: what was not marked is given back. Returns the noised steps it cost; settling twice is harmless."""
        with self._writing():
            cohort, terms = self._reservation(study, run)
            cost: int = self._marks(run) * terms["steps_per_round"]
            if not self._settled(run):
                self._append("settle", cohort, Moment(study, run, 0, 0), {"steps": cost})
                self._db.execute("DELETE FROM reply WHERE run = ?", (run,))
            return cost

    def accounts(self) -> list[StudyAccount]:
        """Every run ever reserved here, oldest first."""
        marks = ", ".join(f"({_COUNT} m.run = r.run AND {of})" for of in _OF.values())
        rows = self._all(
            f"""SELECT r.cohort, r.study, r.run, r.body, {marks},
                 EXISTS(SELECT 1 FROM journal s WHERE s.kind = 'settle' AND s.run = r.run)
               FROM journal r WHERE r.kind = 'reserve' ORDER BY r.seq"""
        )
        found = []
        for cohort, study, run, body, marks, counted, looked, settled in rows:
            terms = json.loads(body)
            counts, looks = (_steps(terms[key]) if key in terms else None for key in ("counts", "looks"))
            found.append(StudyAccount(
                cohort, terms["name"], study, run, _steps(terms), marks * terms["steps_per_round"], bool(settled),
                counts=counts, counted=counted, looks=looks, looked=looked,
            ))  # fmt: skip
        return found

    def spent(self, run: str) -> int:
        """Noised steps marked for `run` so far."""
        return sum(account.marked for account in self.accounts() if account.run == run)

    @property
    def head(self) -> str:
        """Hash of the newest entry."""
        row = self._one("SELECT hash FROM journal ORDER BY seq DESC LIMIT 1")
        return str(row[0]) if row else _GENESIS

    def must_hold(self, head: str) -> None:
        """Refuse to go on if `head`, which the coordinator once saw here, is unknown: an old backup was restored.

        Raises:
            LedgerBroken: the entry is not in this ledger.
        """
        if head and self._one("SELECT 1 FROM journal WHERE hash = ?", head) is None and head != _GENESIS:
            raise LedgerBroken(
                "the coordinator has seen a newer state of this site's ledger than the file holds; "
                "an old copy would spend privacy twice"
            )

    def verify(self) -> int:
        """Recompute the chain. Returns how many entries hold.

        Raises:
            LedgerBroken: naming the first entry that does not fit.
        """
        previous, count = _GENESIS, 0
        rows = self._all(
            "SELECT seq, kind, cohort, study, run, round, attempt, time, body, prev, hash FROM journal ORDER BY seq"
        )
        damaged = self._one("PRAGMA integrity_check") != ("ok",)  # the quick one would not look into the indices
        for seq, *entry, prev, digest in rows:
            count += 1
            if seq != count or prev != previous or digest != _hash(previous, entry):
                raise LedgerBroken(f"the ledger's chain is broken at entry {count}")
            previous = digest
        if damaged:
            raise LedgerBroken("the ledger's file is damaged")
        return count

    def _append(self, kind: str, cohort: str, at: Moment, body: dict[str, Any]) -> None:
        entry = [kind, cohort, at.study, *at.key, time.time(), json.dumps(body, sort_keys=True)]
        previous = self.head
        self._db.execute(
            "INSERT INTO journal(kind, cohort, study, run, round, attempt, time, body, prev, hash)"
            " VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*entry, previous, _hash(previous, entry)),
        )

    def _note_limit(self, cohort: Cohort) -> None:
        limit = {"epsilon_lifetime": cohort.epsilon_lifetime, "delta": cohort.delta}
        row = self._one("SELECT body FROM journal WHERE kind = 'limit' AND cohort = ? ORDER BY seq DESC", cohort.name)
        if row is None or json.loads(row[0]) != limit:
            self._append("limit", cohort.name, Moment("", "", 0, 0), limit)

    def _stored_reply(self, at: Moment) -> bytes | None:
        answered = self._entry("answer", at)
        if answered is None:
            self._refuse_settled(at.run)
            return None
        row = self._one("SELECT blob FROM reply WHERE run = ? AND round = ? AND attempt = ?", *at.key)
        if row is None:
            raise OrderRefused(f"round {at.round} was answered long ago; its reply is no longer kept")
        if not isinstance(row[0], bytes) or hashlib.sha256(row[0]).hexdigest() != answered["sha256"]:
            raise LedgerBroken(f"the stored reply of round {at.round} is not the one that was written")
        return row[0]

    def _reservation(self, study: str, run: str) -> tuple[str, dict[str, Any]]:
        """Cohort and terms of a run's reservation."""
        row = self._one("SELECT cohort, study, body FROM journal WHERE kind = 'reserve' AND run = ?", run)
        if row is None or row[1] != study:
            raise OrderRefused("nothing is reserved for this run")
        return row[0], json.loads(row[2])

    def _entry(self, kind: str, at: Moment) -> dict[str, Any] | None:
        query = "SELECT body FROM journal WHERE kind = ? AND run = ? AND round = ? AND attempt = ?"
        row = self._one(query, kind, *at.key)
        return json.loads(row[0]) if row else None

    def _settled(self, run: str) -> bool:
        return self._one("SELECT 1 FROM journal WHERE kind = 'settle' AND run = ?", run) is not None

    def _refuse_settled(self, run: str) -> None:
        if self._settled(run):
            raise OrderRefused("this run is settled")

    def _marks(self, run: str, what: str = "training") -> int:
        row = self._one(f"{_COUNT} m.run = ? AND {_OF[what]}", run)
        return int(row[0]) if row else 0

    def _one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        rows = self._all(query, *values)
        return rows[0] if rows else None

    def _all(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with _speaking_plainly():
            rows: list[tuple[Any, ...]] = self._db.execute(query, values).fetchall()
            return rows

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, over all processes; everything or nothing."""
        with _speaking_plainly(), whole_change(self._db):
            yield


def _patiently(act: Callable[[], object]) -> None:
    """Do it once nobody else is in the way: SQLite's own patience does not cover a change of the journal's mode."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            act()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def _speaking_plainly() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # SQLite's complaint may quote what it could not read
        raise LedgerBroken("the ledger cannot be read or written", detail=str(error)) from None


def _hash(previous: str, entry: list[Any]) -> str:
    return hashlib.sha256((previous + json.dumps(entry, default=repr)).encode()).hexdigest()
