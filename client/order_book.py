"""What a hospital remembers of orders, on disk: none is carried out twice, none out of turn, and no round has two models.

For each run of a study, training and looks go forward only:

    a later round            accepted; rounds may be skipped, the site may have been away
    an earlier round         refused, and so is an earlier attempt of the same round
    the same round again     accepted from the very same model: a line broke, or the coordinator was restarted, and the answer
                             is the one that was given before
    from another model       refused; a new attempt may bring one, as far as the plan allows attempts
    after the farewell       refused
    another run              refused: an approval is for one; what each patient pays for a study would be paid again

Where the round before was seen here, the model's manifest must name that round's manifest as the one before it, so the
coordinator cannot tell this hospital one history and another hospital a different one without both holding signed proof.

A sealed order has a nonce. One that was seen before is a replay and refused, with one exception: the newest order of its run,
byte for byte. Flower may deliver it again after this process was killed in the middle of it, and it can do nothing that it did
not do then. Whoever recorded older orders can do nothing with them. An honest coordinator that asks again seals anew.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wardround.client.owned_sqlite import owned_by_us_alone, whole_change
from wardround.common.errors import OrderRefused, RoundTaken

if TYPE_CHECKING:
    from wardround.common.seals import Order

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run(run TEXT PRIMARY KEY, study TEXT NOT NULL, newest TEXT NOT NULL, closed INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS nonce(nonce TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS turn(
  run TEXT NOT NULL, action TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, manifest TEXT NOT NULL,
  PRIMARY KEY(run, action));
"""
_IN_TURN = {"train": "round", "evaluate": "look after round"}
_CLOSE = "query.close"
_PATIENCE = 30.0  # seconds another process may hold the file


@dataclass(frozen=True)
class _Turn:
    """The newest order of its kind in a run."""

    round: int
    attempt: int
    manifest: str


class OrderBook:
    """A hospital's memory of orders: `state/orders.sqlite`, which only its owner can read.

    Raises:
        OrderRefused: when opened or used, if the file cannot be read or written.
    """

    def __init__(self, state: Path) -> None:
        path = state / "orders.sqlite"
        with _speaking_plainly():
            owned_by_us_alone(path, "order book")
            self._db = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            try:
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.executescript(_SCHEMA)
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        """Give the file back."""
        self._db.close()

    def accept(self, order: Order, *, runs: int | None = None) -> None:
        """Write down an order whose seal holds, before it is carried out.

        Args:
            order: the order.
            runs: so many runs of its study may be begun here; None: any number.

        Raises:
            RoundTaken: the same round and attempt was begun from another model.
            OrderRefused: a replay, out of turn, of a run that is over, belongs to another study or is one too many, or with a
                manifest that does not follow the one before; nothing was written down.
        """
        with self._writing():
            self._check_run(order, runs)
            if self._is_newest(order):
                return
            if order.action in _IN_TURN:
                self._check_turn(order)
                self._check_chain(order)
                assert order.manifest is not None  # `open_order` refuses otherwise
                self._db.execute(
                    "INSERT OR REPLACE INTO turn VALUES(?, ?, ?, ?, ?)",
                    (order.run, order.action, order.round, order.attempt, order.manifest.digest),
                )
            self._db.execute("INSERT INTO nonce VALUES(?)", (order.signed.body["nonce"],))
            self._db.execute(
                "INSERT INTO run VALUES(?, ?, ?, ?) ON CONFLICT(run) DO UPDATE"
                " SET newest = excluded.newest, closed = max(closed, excluded.closed)",
                (order.run, order.study, order.digest, order.action == _CLOSE),
            )

    def _check_run(self, order: Order, runs: int | None) -> None:
        row = self._one("SELECT study, closed FROM run WHERE run = ?", order.run)
        if row is None:
            begun = self._one("SELECT COUNT(*) FROM run WHERE study = ?", order.study)
            if runs is not None and begun is not None and int(str(begun[0])) >= runs:
                raise OrderRefused("this study was begun here before under another run; to run it again wants another approval")
            return
        if row[0] != order.study:
            raise OrderRefused("this run belongs to another study")
        if row[1] and order.action in _IN_TURN:
            raise OrderRefused("this run is over; the coordinator has said farewell")

    def _is_newest(self, order: Order) -> bool:
        """Whether the newest order of its run came again; False where it is a new one."""
        if self._one("SELECT 1 FROM nonce WHERE nonce = ?", order.signed.body["nonce"]) is None:
            return False
        newest = self._one("SELECT newest FROM run WHERE run = ?", order.run)
        if newest is None or newest[0] != order.digest:
            raise OrderRefused("the order was given before; this is a replay of it")
        return True

    def _check_turn(self, order: Order) -> None:
        last, what = self._turn(order.run, order.action), _IN_TURN[order.action]
        if last is None or order.round > last.round:
            return
        if order.round < last.round:
            raise OrderRefused(f"{what} {order.round} is over; this site has had an order for {what} {last.round}")
        if order.attempt < last.attempt:
            raise OrderRefused(f"attempt {order.attempt} at {what} {order.round} is over; attempt {last.attempt} was begun")
        if order.attempt == last.attempt and _manifest(order) != last.manifest:
            raise RoundTaken(f"{what} {order.round} was already begun from another model")

    def _check_chain(self, order: Order) -> None:
        """The manifest before: of the round before for training, of the same round's training for a look."""
        assert order.manifest is not None
        before, previous = self._turn(order.run, "train"), order.manifest.body["previous"]
        if order.action == "train" and order.round <= 1 and previous:
            raise OrderRefused("the first model's manifest names one before it")
        wanted = order.round - 1 if order.action == "train" else order.round
        if before is not None and before.round == wanted and before.manifest != previous:
            raise OrderRefused(f"the model's manifest does not follow the one this site was sent in round {before.round}")

    def _turn(self, run: str, action: str) -> _Turn | None:
        row = self._one("SELECT round, attempt, manifest FROM turn WHERE run = ? AND action = ?", run, action)
        return None if row is None else _Turn(int(str(row[0])), int(str(row[1])), str(row[2]))

    def _one(self, query: str, *values: object) -> tuple[object, ...] | None:
        row: tuple[object, ...] | None = self._db.execute(query, values).fetchone()
        return row

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Everything or nothing, one at a time over all processes."""
        with _speaking_plainly(), whole_change(self._db):
            yield


def _manifest(order: Order) -> str:
    return order.manifest.digest if order.manifest else ""


@contextlib.contextmanager
def _speaking_plainly() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, OverflowError) as error:
        raise OrderRefused("this site's order book cannot be read or written", detail=str(error)) from None
