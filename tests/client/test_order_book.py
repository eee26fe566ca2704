"""An order is carried out once, in its turn, and a round has one model; a restart forgets nothing."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from rosters import a_stranger
from wardround.client.order_book import OrderBook
from wardround.common.errors import OrderRefused, RoundTaken
from wardround.common.seals import Order
from wardround.common.trust.signing import Signed, Signer

STUDY, RUN = "a" * 64, "b" * 16
COORDINATOR: Signer = a_stranger("coordinator")
_nonces = iter(range(1_000_000))


def manifest(round: int, model: str = "x", *, previous: str = "", run: str = RUN, action: str = "train") -> Signed:
    body = {"study": STUDY, "run": run, "action": action, "round": round, "tensors": [[model]], "previous": previous}
    return COORDINATOR.sign("model", body)


def order(
    round: int = 0, attempt: int = 1, model: Signed | None = None, *, action: str = "train", run: str = RUN, study: str = STUDY
) -> Order:
    body = {"study": study, "to": "va", "action": action, "nonce": f"{next(_nonces):032x}", "time": 0, "content": "",
            "model": model.digest if model else "", "audit": [0, ""]}  # fmt: skip
    return Order(COORDINATOR.sign("order", body), RecordDict(), model, run, round, attempt)


@pytest.fixture
def book(tmp_path: Path) -> Iterator[OrderBook]:
    found = OrderBook(tmp_path)
    yield found
    found.close()


def reopened(book: OrderBook, state: Path) -> OrderBook:
    book.close()
    return OrderBook(state)


CHAIN = [manifest(1)]
for number in range(2, 9):
    CHAIN.append(manifest(number, f"{number}", previous=CHAIN[-1].digest))


def test_rounds_go_forward_and_may_be_skipped(book: OrderBook):
    book.accept(order(action="query", attempt=0))
    for round in (1, 2, 5, 6):
        book.accept(order(round, model=CHAIN[round - 1]))
    with pytest.raises(OrderRefused, match="round 5 is over; this site has had an order for round 6"):
        book.accept(order(5, model=CHAIN[4]))
    with pytest.raises(OrderRefused, match="round 1 is over"):
        book.accept(order(1, attempt=9, model=CHAIN[0]))


def test_a_round_is_ordered_again_from_the_same_model_only(book: OrderBook, tmp_path: Path):
    book.accept(order(1, model=CHAIN[0]))
    book.accept(order(1, model=CHAIN[0]))
    book = reopened(book, tmp_path)
    book.accept(order(1, model=CHAIN[0]))
    with pytest.raises(RoundTaken, match="round 1 was already begun from another model"):
        book.accept(order(1, model=manifest(1, "another")))
    book.accept(order(1, 2, manifest(1, "another")))
    with pytest.raises(OrderRefused, match="attempt 1 at round 1 is over"):
        book.accept(order(1, 1, CHAIN[0]))
    book.close()


def test_a_replay_is_refused_also_after_a_restart(book: OrderBook, tmp_path: Path):
    call, first, second = order(action="query", attempt=0), order(1, model=CHAIN[0]), order(2, model=CHAIN[1])
    for one in (call, first, second):
        book.accept(one)
    book = reopened(book, tmp_path)
    for one in (call, first):
        with pytest.raises(OrderRefused, match="replay"):
            book.accept(one)
    again = order(1, model=CHAIN[0])
    book.close()
    book = OrderBook(tmp_path / "elsewhere")
    book.accept(first)
    book.accept(again)
    with pytest.raises(OrderRefused, match="replay"):
        book.accept(first)
    book.close()


def test_the_newest_order_may_be_delivered_again_byte_for_byte(book: OrderBook, tmp_path: Path):
    first = order(1, model=CHAIN[0])
    book.accept(first)
    book.accept(first)
    book = reopened(book, tmp_path)
    book.accept(first)
    stolen = COORDINATOR.sign("order", {**first.signed.body, "content": "other"})
    with pytest.raises(OrderRefused, match="replay"):
        book.accept(Order(stolen, RecordDict(), CHAIN[0], RUN, 1, 1))
    book.close()


def test_a_model_must_follow_the_one_that_was_sent_before(book: OrderBook):
    with pytest.raises(OrderRefused, match="first model's manifest names one before it"):
        book.accept(order(1, model=manifest(1, previous="f" * 64)))
    book.accept(order(1, model=CHAIN[0]))
    for previous in ("", "f" * 64):
        with pytest.raises(OrderRefused, match="does not follow the one this site was sent in round 1"):
            book.accept(order(2, model=manifest(2, previous=previous)))
    book.accept(order(2, model=CHAIN[1]))
    book.accept(order(4, model=manifest(4, previous="f" * 64)))  # round 3 was not seen here


def test_looks_have_their_own_turn_and_follow_their_round(book: OrderBook):
    book.accept(order(1, model=CHAIN[0]))
    look = manifest(1, "stepped", previous=CHAIN[0].digest, action="evaluate")
    book.accept(order(1, 0, look, action="evaluate"))
    book.accept(order(1, model=CHAIN[0]))  # the coordinator was restarted before its checkpoint
    book.accept(order(1, 0, look, action="evaluate"))
    other = manifest(1, "probe", previous=CHAIN[0].digest, action="evaluate")
    with pytest.raises(RoundTaken, match="look after round 1 was already begun from another model"):
        book.accept(order(1, 0, other, action="evaluate"))
    book.accept(order(2, model=CHAIN[1]))
    with pytest.raises(OrderRefused, match="does not follow the one this site was sent in round 2"):
        book.accept(order(2, 0, manifest(2, "p", previous="f" * 64, action="evaluate"), action="evaluate"))
    book.accept(order(2, 0, manifest(2, "p", previous=CHAIN[1].digest, action="evaluate"), action="evaluate"))
    with pytest.raises(OrderRefused, match="look after round 1 is over"):
        book.accept(order(1, 0, look, action="evaluate"))


def test_after_the_farewell_nothing_is_trained(book: OrderBook, tmp_path: Path):
    book.accept(order(1, model=CHAIN[0]))
    book.accept(order(action="query.close", attempt=0))
    book = reopened(book, tmp_path)
    for action in ("train", "evaluate"):
        with pytest.raises(OrderRefused, match="this run is over"):
            book.accept(order(2, model=CHAIN[1], action=action))
    book.accept(order(action="query", attempt=0))
    with pytest.raises(OrderRefused, match="this run is over"):
        book.accept(order(2, model=CHAIN[1]))
    book.accept(order(action="query.close", attempt=0))
    with pytest.raises(OrderRefused, match="this run is over"):
        book.accept(order(2, model=CHAIN[1]))
    book.accept(order(1, model=manifest(1, run="c" * 16), run="c" * 16))
    book.close()


def test_a_run_belongs_to_one_study(book: OrderBook):
    book.accept(order(action="query", attempt=0))
    with pytest.raises(OrderRefused, match="belongs to another study"):
        book.accept(order(action="query", attempt=0, study="c" * 64))


def test_what_was_refused_leaves_no_trace(book: OrderBook):
    book.accept(order(2, model=CHAIN[1]))
    with pytest.raises(OrderRefused):
        book.accept(order(3, model=manifest(3, previous="f" * 64)))
    book.accept(order(2, model=CHAIN[1]))
    book.accept(order(3, model=CHAIN[2]))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from("xy")), max_size=12))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_whatever_is_ordered_a_round_and_attempt_has_one_model_and_none_goes_back(
    tmp_path_factory: pytest.TempPathFactory, orders: list[tuple[int, int, str]]
):
    book, carried_out = OrderBook(tmp_path_factory.mktemp("state")), []
    for round, attempt, model in orders:
        try:
            book.accept(order(round, attempt, manifest(round, model)))
        except OrderRefused:
            continue
        carried_out.append((round, attempt, model))
    book.close()
    assert [turn[:2] for turn in carried_out] == sorted(turn[:2] for turn in carried_out)
    assert len({turn[:2] for turn in carried_out}) == len(set(carried_out))


# ---- the file


def test_only_the_owner_can_read_it(book: OrderBook, tmp_path: Path):
    book.accept(order(1, model=CHAIN[0]))
    assert stat.S_IMODE((tmp_path / "orders.sqlite").stat().st_mode) == 0o600


def test_a_link_or_a_damaged_file_is_refused(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "orders.sqlite").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OrderRefused, match="cannot be read or written"):
        OrderBook(tmp_path / "real")
    (tmp_path / "orders.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(OrderRefused, match="cannot be read or written"):
        OrderBook(tmp_path)


def test_a_book_that_cannot_be_written_accepts_nothing(book: OrderBook, tmp_path: Path):
    book.accept(order(1, model=CHAIN[0]))
    db = sqlite3.connect(tmp_path / "orders.sqlite")
    db.execute("CREATE TRIGGER full BEFORE INSERT ON nonce BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    db.commit()
    db.close()
    with pytest.raises(OrderRefused, match="cannot be read or written"):
        book.accept(order(2, model=CHAIN[1]))


def test_two_processes_share_one_memory(book: OrderBook, tmp_path: Path):
    other, first = OrderBook(tmp_path), order(1, model=CHAIN[0])
    book.accept(first)
    other.accept(order(2, model=CHAIN[1]))
    with pytest.raises(OrderRefused, match="replay"):
        book.accept(first)
    other.close()


def test_a_study_is_run_as_often_as_it_was_approved(book: OrderBook, tmp_path: Path):
    book.accept(order(action="query", attempt=0), runs=1)
    book.accept(order(1, model=CHAIN[0]), runs=1)
    book = reopened(book, tmp_path)
    again = order(action="query", attempt=0, run="c" * 16)
    with pytest.raises(OrderRefused, match="another approval"):
        book.accept(again, runs=1)
    book.accept(order(action="query.close", attempt=0), runs=1)
    with pytest.raises(OrderRefused, match="another approval"):
        book.accept(again, runs=1)
    book.accept(order(action="query", attempt=0, run="c" * 16, study="d" * 64), runs=1)  # another study has its own
    book.accept(order(action="query", attempt=0, run="e" * 16), runs=2)
    book.accept(order(action="query", attempt=0, run="f" * 16))  # named in the site file
