"""The ledger's laws: reserved before opened, spent once, sent as often as needed, never given back by a crash."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from dp_accounting import dp_event, pld
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.forked import Forked
from wardround.client.ledger import Cohort, Moment, PrivacyLedger
from wardround.common.errors import BudgetExhausted, LedgerBroken, OrderRefused, RoundTaken
from wardround.common.privacy import Cost, NoisedSteps, filtered

CARDIOLOGY = Cohort("cardiology", epsilon_lifetime=8.0, delta=1e-5)
TEN_ROUNDS = NoisedSteps(0.5, 2.0, 10)  # by the filter 5.1; two such studies 7.2, three 8.7
COLUMNS = ("seq", "kind", "cohort", "study", "run", "round", "attempt", "time", "body", "prev", "hash")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


def reserve(ledger: PrivacyLedger, run: str = "run", *, cohort: Cohort = CARDIOLOGY, steps: NoisedSteps = TEN_ROUNDS) -> None:
    ledger.reserve(cohort, study=f"study of {run}", name="hearts", run=run, steps=steps, steps_per_round=1)


def moment(round: int = 1, run: str = "run", attempt: int = 1) -> Moment:
    return Moment(f"study of {run}", run, round, attempt)


def train(ledger: PrivacyLedger, round: int, run: str = "run") -> None:
    assert ledger.mark(moment(round, run), model=f"model {round}") is None
    ledger.answer(moment(round, run), reply=f"update {round}".encode())


def settle(ledger: PrivacyLedger, run: str = "run") -> int:
    return ledger.settle(study=f"study of {run}", run=run)


def a_history(file: Path) -> None:
    with PrivacyLedger(file) as ledger:
        for run in ("first", "second"):
            reserve(ledger, run)
            for round in (1, 2, 3):
                train(ledger, round, run)
        settle(ledger, "first")


def behind_its_back(file: Path, *statements: str, values: tuple[object, ...] = ()) -> None:
    """An edit by somebody who knows SQLite: triggers and constraints out of the way."""
    with sqlite3.connect(file) as db:
        db.execute("DROP TRIGGER IF EXISTS no_update")
        db.execute("DROP TRIGGER IF EXISTS no_delete")
        db.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements:
            db.execute(statement, values)
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def in_another_process(script: str, *arguments: object) -> Forked:
    prelude = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from wardround.client.ledger import *\n"
        "from wardround.common.errors import *\n"
        "cohort, steps = Cohort('cardiology', 8.0, 1e-5), NoisedSteps(0.5, 2.0, 10)\n"
        "reserve = lambda ledger, run: ledger.reserve(\n"
        "    cohort, study=f'study of {run}', name='hearts', run=run, steps=steps, steps_per_round=1)\n"
        "moment = lambda round, run='run': Moment(f'study of {run}', run, round, 1)\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
    )

    def act() -> None:
        sys.argv[1:] = map(str, arguments)
        exec(prelude + textwrap.dedent(script), {})

    return Forked(act)


def finished(process: Forked, given: str | None = None) -> str:
    out, err = process.communicate(given, timeout=120)
    assert process.returncode == 0, err
    return out


# --- what is charged ------------------------------------------------------------------------------------------------------


def test_the_whole_study_is_charged_before_its_first_round(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        (account,) = ledger.accounts()
        assert account.charged == Cost((TEN_ROUNDS,))
        assert account.spent.training[0].steps == 0


def test_reserving_again_changes_nothing(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        head = ledger.head
        reserve(ledger)
        assert ledger.head == head
        assert len(ledger.accounts()) == 1


def test_a_run_cannot_be_reserved_with_other_numbers(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        for other in (NoisedSteps(0.5, 1.9, 10), NoisedSteps(0.4, 2.0, 10), NoisedSteps(0.5, 2.0, 9)):
            with pytest.raises(OrderRefused, match="another plan"):
                reserve(ledger, steps=other)
        with pytest.raises(OrderRefused, match="another plan"):
            reserve(ledger, cohort=Cohort("oncology", 8.0, 1e-5))
        with pytest.raises(OrderRefused, match="another plan"):
            ledger.reserve(CARDIOLOGY, study="another", name="hearts", run="run", steps=TEN_ROUNDS, steps_per_round=1)
        with pytest.raises(OrderRefused, match="another plan"):
            ledger.reserve(CARDIOLOGY, study="study of run", name="hearts", run="run", steps=TEN_ROUNDS, steps_per_round=2)


def test_the_lifetime_budget_holds_over_all_studies_of_a_cohort(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger, "first")
        reserve(ledger, "second")
        before = ledger.accounts()
        with pytest.raises(BudgetExhausted, match="study hearts would pass what this site allows") as refusal:
            reserve(ledger, "third")
        assert refusal.value.detail == "epsilon 8.73 with this study, epsilon_lifetime = 8"
        assert ledger.accounts() == before
        assert filtered([account.charged for account in before], 1e-5) <= 8.0


def test_another_cohort_has_its_own_budget(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger, "first")
        reserve(ledger, "second")
        reserve(ledger, "third", cohort=Cohort("oncology", 8.0, 1e-5))
        with pytest.raises(BudgetExhausted):
            reserve(ledger, "fourth")


def test_a_refused_study_leaves_no_trace_that_could_be_marked(file: Path):
    with PrivacyLedger(file) as ledger:
        with pytest.raises(BudgetExhausted):
            reserve(ledger, steps=NoisedSteps(0.5, 0.5, 10))
        with pytest.raises(OrderRefused, match="nothing is reserved"):
            ledger.mark(moment(), model="m")
        assert ledger.verify() == 0


@pytest.mark.parametrize("noise", [1e-300, 1e-12, float("nan")])
def test_a_cost_that_cannot_be_computed_is_refused(file: Path, noise: float):
    with PrivacyLedger(file) as ledger, pytest.raises(BudgetExhausted):
        reserve(ledger, steps=NoisedSteps(0.5, noise, 10))


def test_a_limit_and_its_changes_are_journalled(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger, "first")
        reserve(ledger, "first")
        reserve(ledger, "first", cohort=Cohort("cardiology", 9.0, 1e-5))
        reserve(ledger, "first", cohort=Cohort("cardiology", 9.0, 1e-6))
    with sqlite3.connect(file) as db:
        rows = db.execute("SELECT cohort, body FROM journal WHERE kind = 'limit' ORDER BY seq").fetchall()
    db.close()
    assert {cohort for cohort, _ in rows} == {"cardiology"}
    limits = [json.loads(body) for _, body in rows]
    assert [(limit["epsilon_lifetime"], limit["delta"]) for limit in limits] == [(8.0, 1e-5), (9.0, 1e-5), (9.0, 1e-6)]


def test_a_limit_lowered_in_mid_study_stops_the_study(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        train(ledger, 1)
        with pytest.raises(BudgetExhausted):
            reserve(ledger, cohort=Cohort("cardiology", 1.0, 1e-5))


def test_epsilon_over_process_restarts_is_that_of_all_steps_together(file: Path):
    for round in range(1, 8):
        with PrivacyLedger(file) as ledger:  # a new process would do the same: nothing is kept but the file
            reserve(ledger)
            train(ledger, round)
    with PrivacyLedger(file) as ledger:
        (account,) = ledger.accounts()
        assert ledger.spent("run") == 7
    accountant = pld.PLDAccountant()
    accountant.compose(dp_event.PoissonSampledDpEvent(0.5, dp_event.GaussianDpEvent(2.0)), 7)
    assert account.spent.epsilon(1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=0.005)


def test_a_study_without_a_settlement_keeps_its_full_charge(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        train(ledger, 1)
    with PrivacyLedger(file) as ledger:
        assert ledger.accounts()[0].charged.training[0].steps == 10


def test_settling_gives_back_what_was_never_marked_and_only_once(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        train(ledger, 1)
        ledger.mark(moment(2), model="m")  # marked and never answered: spent
        assert settle(ledger) == 2
        head = ledger.head
        assert settle(ledger) == 2
        assert ledger.head == head
        assert ledger.accounts()[0].charged.training[0].steps == 2
        reserve(ledger, "second")  # the rest is free again


def test_a_round_costs_its_local_steps(file: Path):
    with PrivacyLedger(file) as ledger:
        ledger.reserve(CARDIOLOGY, study="study of run", name="hearts", run="run", steps=TEN_ROUNDS, steps_per_round=4)
        train(ledger, 1)
        train(ledger, 2)
        assert ledger.spent("run") == 8
        with pytest.raises(BudgetExhausted, match="all steps reserved for study hearts are spent"):
            ledger.mark(moment(3), model="m")
        assert settle(ledger) == 8


def test_attempts_beyond_the_reservation_are_refused(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        for attempt in range(1, 11):
            assert ledger.mark(moment(attempt=attempt), model=f"model {attempt}") is None
        with pytest.raises(BudgetExhausted):
            ledger.mark(moment(attempt=11), model="model 11")
        with pytest.raises(BudgetExhausted):
            ledger.mark(moment(2), model="model 11")
        assert ledger.spent("run") == 10


def test_a_settled_run_refuses_everything(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        train(ledger, 1)
        ledger.mark(moment(2), model="model 2")
        settle(ledger)
        with pytest.raises(OrderRefused, match="settled"):
            reserve(ledger)
        for round in (2, 3):
            with pytest.raises(OrderRefused, match="settled"):
                ledger.mark(moment(round), model=f"model {round}")
        with pytest.raises(OrderRefused, match="settled"):
            ledger.answer(moment(2), reply=b"late")
        with pytest.raises(OrderRefused, match="no longer kept"):
            ledger.mark(moment(1), model="model 1")


QUESTIONS = {"counts": NoisedSteps(1.0, 10.0, 1), "looks": NoisedSteps(1.0, 6.0, 2)}


def reserve_with_questions(ledger: PrivacyLedger, run: str = "run") -> None:
    ledger.reserve(
        CARDIOLOGY, study=f"study of {run}", name="hearts", run=run, steps=TEN_ROUNDS, steps_per_round=1, **QUESTIONS
    )


def test_a_question_is_reserved_marked_and_given_back_beside_the_rounds(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve_with_questions(ledger)
        (account,) = ledger.accounts()
        assert account.charged == Cost((TEN_ROUNDS, QUESTIONS["counts"]), (QUESTIONS["looks"],))
        assert account.spent.epsilon(1e-5) == 0
        ledger.mark(moment(0, attempt=0), model="")
        for round in (3, 6):
            ledger.mark(moment(round, attempt=0), model=f"model {round}")
        with pytest.raises(BudgetExhausted, match="are spent"):
            ledger.mark(moment(9, attempt=0), model="model 9")
        for round in range(1, 11):  # no question takes a round's place
            train(ledger, round)
        (account,) = ledger.accounts()
        assert (account.marked, account.counted, account.looked) == (10, 1, 2)
        assert account.spent == account.charged
    with PrivacyLedger(file) as ledger:
        reserve_with_questions(ledger, "another")
        ledger.mark(moment(2, "another", 0), model="model 2")
        settle(ledger, "another")
        account = ledger.accounts()[1]
        nothing = dataclasses.replace(TEN_ROUNDS, steps=0), dataclasses.replace(QUESTIONS["counts"], steps=0)
        assert account.charged == Cost(nothing, (dataclasses.replace(QUESTIONS["looks"], steps=1),))
        assert account.holds == Cost((TEN_ROUNDS, QUESTIONS["counts"]), (QUESTIONS["looks"],))  # a look may have ended it


def test_a_question_nobody_reserved_is_refused(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        for round in (0, 1):
            with pytest.raises(OrderRefused, match="reserved nothing for this question"):
                ledger.mark(moment(round, attempt=0), model="m")
        with pytest.raises(OrderRefused, match="another plan"):
            ledger.reserve(
                CARDIOLOGY, study="study of run", name="hearts", run="run", steps=TEN_ROUNDS, steps_per_round=1, **QUESTIONS
            )


def test_the_count_of_classes_is_kept_until_the_study_is_over(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve_with_questions(ledger)
        ledger.mark(moment(0, attempt=0), model="")
        ledger.answer(moment(0, attempt=0), reply=b"counts")
        for round in range(1, 8):
            train(ledger, round)
        assert ledger.mark(moment(0, attempt=0), model="") == b"counts"


@pytest.mark.parametrize("act", [
    lambda ledger: ledger.mark(moment(), model="m"),
    lambda ledger: ledger.answer(moment(), reply=b"x"),
    lambda ledger: settle(ledger),
])  # fmt: skip
def test_nothing_happens_without_a_reservation_for_this_very_study(file: Path, act: Callable[[PrivacyLedger], object]):
    with PrivacyLedger(file) as ledger:
        with pytest.raises(OrderRefused, match="nothing is reserved"):
            act(ledger)
        ledger.reserve(CARDIOLOGY, study="another", name="hearts", run="run", steps=TEN_ROUNDS, steps_per_round=1)
        with pytest.raises(OrderRefused, match="nothing is reserved"):
            act(ledger)


# --- one round, sent as often as needed -----------------------------------------------------------------------------------


def test_an_answered_round_returns_the_same_bytes_for_nothing(file: Path):
    reply = random.Random(1).randbytes(5000)
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        assert ledger.mark(moment(), model="m") is None
        ledger.answer(moment(), reply=reply)
        head = ledger.head
        assert ledger.mark(moment(), model="m") == reply
    with PrivacyLedger(file) as ledger:
        assert ledger.mark(moment(), model="m") == reply
        assert ledger.head == head
        assert ledger.spent("run") == 1


def test_a_round_that_never_answered_is_trained_again_for_nothing(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        assert ledger.mark(moment(), model="m") is None
    with PrivacyLedger(file) as ledger:
        assert ledger.mark(moment(), model="m") is None
        assert ledger.spent("run") == 1


def test_a_round_begun_from_one_model_is_refused_to_another(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        ledger.mark(moment(), model="m")
        with pytest.raises(RoundTaken, match="round 1 was already begun from another model"):
            ledger.mark(moment(), model="another")
        ledger.answer(moment(), reply=b"x")
        with pytest.raises(RoundTaken):
            ledger.mark(moment(), model="another")
        assert ledger.spent("run") == 1


def test_a_round_is_answered_once(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        with pytest.raises(OrderRefused, match="never begun"):
            ledger.answer(moment(), reply=b"x")
        train(ledger, 1)
        with pytest.raises(OrderRefused, match="already answered"):
            ledger.answer(moment(), reply=b"another noise")
        assert ledger.mark(moment(), model="model 1") == b"update 1"


def test_replies_are_kept_for_the_last_two_rounds(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        for round in range(1, 6):
            train(ledger, round)
        assert ledger.mark(moment(5), model="model 5") == b"update 5"
        assert ledger.mark(moment(4), model="model 4") == b"update 4"
        for round in (1, 2, 3):
            with pytest.raises(OrderRefused, match="no longer kept"):
                ledger.mark(moment(round), model=f"model {round}")
        assert ledger.spent("run") == 5
    with sqlite3.connect(file) as db:
        assert db.execute("SELECT round FROM reply ORDER BY round").fetchall() == [(4,), (5,)]
    db.close()


# --- kill -9 at every step ------------------------------------------------------------------------------------------------

LIFE = """
    ledger = PrivacyLedger(Path(sys.argv[1])); stop = sys.argv[2]
    if stop == 'opened': die()
    reserve(ledger, 'run')
    if stop == 'reserved': die()
    assert ledger.mark(moment(1), model='m') is None
    if stop == 'marked': die()
    if stop == 'answering':  # the answer is written and its transaction still open
        ledger._db.set_trace_callback(lambda statement: die() if statement == 'COMMIT' else None)
    ledger.answer(moment(1), reply=b'the update')
    if stop == 'answered': die()
    ledger.settle(study='study of run', run='run')
    die()
"""


@pytest.mark.parametrize(("stop", "marks", "reply", "charged"), [
    ("opened", 0, None, 0),
    ("reserved", 0, None, 10),
    ("marked", 1, None, 10),
    ("answering", 1, None, 10),
    ("answered", 1, b"the update", 10),
    ("settled", 1, None, 1),
])  # fmt: skip
def test_a_killed_process_never_spends_twice_and_never_gets_privacy_back(
    file: Path, stop: str, marks: int, reply: bytes | None, charged: int
):
    process = in_another_process(LIFE, file, stop)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    with PrivacyLedger(file) as ledger:
        assert sum(account.charged.training[0].steps for account in ledger.accounts()) == charged
        assert ledger.spent("run") == marks
        if stop == "settled":
            return
        reserve(ledger)
        assert ledger.mark(moment(), model="m") == reply
        assert ledger.spent("run") == 1
        if reply is None:
            ledger.answer(moment(), reply=b"the update")
        assert ledger.mark(moment(), model="m") == b"the update"


# --- several processes ----------------------------------------------------------------------------------------------------


def test_racing_processes_together_stay_within_the_budget(file: Path):
    script = """
        reserved, cohort = 0, Cohort('cardiology', 8.0, 1e-5)
        sys.stdin.readline()
        with PrivacyLedger(Path(sys.argv[1])) as ledger:
            try:
                for number in range(100):
                    ledger.reserve(cohort, study='s', name='hearts', run=f'{sys.argv[2]}-{number}',
                                   steps=NoisedSteps(0.5, 2.0, 3), steps_per_round=1)
                    reserved += 1
            except BudgetExhausted:
                print(reserved)
    """
    racers = [in_another_process(script, file, name) for name in ("a", "b")]
    reserved = [int(finished(racer, "go\n")) for racer in racers]
    with PrivacyLedger(file) as ledger:
        accounts = ledger.accounts()
    assert len(accounts) == sum(reserved) > 3
    cost = filtered([account.charged for account in accounts], 1e-5)
    assert cost <= 8.0 < filtered([NoisedSteps(0.5, 2.0, 3), *(account.charged for account in accounts)], 1e-5)


def test_of_processes_that_train_the_same_round_one_answers(file: Path):
    script = """
        ledger = PrivacyLedger(Path(sys.argv[1]))
        reserve(ledger, 'run')
        first = ledger.mark(moment(1), model='m')
        print('marked', flush=True)
        sys.stdin.readline()
        if first is None:
            try:
                ledger.answer(moment(1), reply=sys.argv[2].encode())
            except OrderRefused:
                pass
        print(ledger.mark(moment(1), model='m').decode())
    """
    racers = [in_another_process(script, file, name) for name in ("a", "b")]
    for racer in racers:
        assert racer.stdout.readline() == "marked\n", racer.communicate()  # both hold a mark before either answers
    sent = {finished(racer, "go\n") for racer in racers}
    assert len(sent) == 1
    with PrivacyLedger(file) as ledger:
        assert ledger.spent("run") == 1


def test_processes_may_open_a_new_ledger_at_the_same_time(file: Path):
    script = """
        sys.stdin.readline()
        for number in range(20):
            PrivacyLedger(Path(f'{sys.argv[1]}-{number}')).close()
    """
    for racer in [in_another_process(script, file) for _ in range(3)]:
        finished(racer, "go\n")


# --- edits, old copies, damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement", ["UPDATE journal SET body = '{}'", "DELETE FROM journal", "DELETE FROM journal WHERE seq = 3"]
)
def test_the_journal_refuses_edits(file: Path, statement: str):
    a_history(file)
    db = sqlite3.connect(file)
    with pytest.raises(sqlite3.IntegrityError, match="append only"):
        db.execute(statement)
    db.close()


OTHER_VALUES = st.one_of(st.text(max_size=5), st.binary(max_size=5), st.integers(0, 10**6), st.floats(0, 10**9), st.none())


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    a_history(file)
    return file


@settings(max_examples=80, deadline=None, derandomize=True)
@given(row=st.integers(1, 16), column=st.sampled_from(COLUMNS), value=OTHER_VALUES)
def test_any_edit_of_any_column_of_any_row_is_found(history: Path, row: int, column: str, value: object):
    copy = history.with_name("edited.sqlite")
    shutil.copy(history, copy)
    query = f"SELECT {column} FROM journal ORDER BY seq LIMIT 1 OFFSET {row - 1}"
    with sqlite3.connect(copy) as db:
        db.text_factory = bytes
        before = db.execute(query).fetchone()
        try:
            behind_its_back(copy, f"UPDATE journal SET {column} = ? WHERE seq = {row}", values=(value,))
        except sqlite3.Error:
            return  # SQLite itself does not take it
        changed = db.execute(query).fetchone() != before
    db.close()
    if changed:
        with pytest.raises(LedgerBroken):
            PrivacyLedger(copy)
    else:
        PrivacyLedger(copy).close()


@pytest.mark.parametrize("edit", [
    "DELETE FROM journal WHERE seq = 4",
    "DELETE FROM journal WHERE seq = 1",
    "INSERT INTO journal SELECT 100, 'settle', cohort, study, run, 0, 0, time, '{\"steps\": 0}', hash, 'x' "
    "FROM journal WHERE kind = 'reserve' AND run = 'second'",
    "INSERT OR REPLACE INTO journal SELECT seq, kind, cohort, study, run, round, attempt, time, '{}', prev, hash "
    "FROM journal WHERE seq = 5",
])  # fmt: skip
def test_rows_taken_out_or_put_in_are_found(history: Path, tmp_path: Path, edit: str):
    shutil.copy(history, tmp_path / "l.sqlite")
    behind_its_back(tmp_path / "l.sqlite", edit)
    with pytest.raises(LedgerBroken, match="broken at entry"):
        PrivacyLedger(tmp_path / "l.sqlite")


def test_an_edit_behind_an_open_ledger_is_found_by_verify(file: Path):
    a_history(file)
    with PrivacyLedger(file) as ledger:
        assert ledger.verify() == 16
        behind_its_back(file, "UPDATE journal SET run = 'x' WHERE seq = 7")
        with pytest.raises(LedgerBroken, match="entry 7"):
            ledger.verify()


@pytest.mark.parametrize("deleted", range(1, 6))
def test_a_deleted_tail_is_found_by_the_head_the_coordinator_saw(file: Path, deleted: int):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        train(ledger, 1)
        train(ledger, 2)
        head, count = ledger.head, ledger.verify()
    behind_its_back(file, f"DELETE FROM journal WHERE seq > {count - deleted}")
    with PrivacyLedger(file) as ledger, pytest.raises(LedgerBroken, match="newer state"):
        ledger.must_hold(head)


def test_a_restored_backup_is_found_by_the_head_the_coordinator_saw(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        train(ledger, 1)
        early = ledger.head
    backup = file.read_bytes()
    with PrivacyLedger(file) as ledger:
        train(ledger, 2)
        late = ledger.head
        ledger.must_hold(early)
        ledger.must_hold(late)
    file.write_bytes(backup)
    with PrivacyLedger(file) as ledger:
        ledger.must_hold("")  # the coordinator has seen nothing yet
        ledger.must_hold(early)
        with pytest.raises(LedgerBroken, match="an old copy would spend privacy twice"):
            ledger.must_hold(late)


def test_a_lost_ledger_is_not_taken_for_a_new_one(file: Path):
    with PrivacyLedger(file) as ledger:
        fresh = ledger.head
        ledger.must_hold(fresh)
        reserve(ledger)
        head = ledger.head
    file.unlink()
    with PrivacyLedger(file) as ledger, pytest.raises(LedgerBroken):
        ledger.must_hold(head)


def test_a_chain_rewritten_from_an_entry_on_is_found_by_the_head_the_coordinator_saw(file: Path, tmp_path: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        train(ledger, 1)
        train(ledger, 2)
        head = ledger.head
    with PrivacyLedger(tmp_path / "rewritten.sqlite") as ledger:  # a whole chain, valid in itself, one round shorter
        reserve(ledger)
        train(ledger, 1)
        with pytest.raises(LedgerBroken):
            ledger.must_hold(head)


def test_an_index_that_no_longer_knows_its_rows_is_found(file: Path):
    # a lookup would miss the answer of a round, and the round would be trained and sent a second time
    a_history(file)
    behind_its_back(
        file,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET sql = replace(sql, '''answer''', '''settle''') WHERE name = 'one_answer'",
    )
    with pytest.raises(LedgerBroken):
        PrivacyLedger(file)


@pytest.mark.parametrize("edit", ["zeroblob(3)", "'text'", "blob || x'00'", "17"])
def test_an_edited_reply_is_never_sent(file: Path, edit: str):
    a_history(file)
    behind_its_back(file, f"UPDATE reply SET blob = {edit} WHERE run = 'second' AND round = 3")
    with PrivacyLedger(file) as ledger, pytest.raises(LedgerBroken, match="stored reply of round 3"):
        ledger.mark(moment(3, "second"), model="model 3")


def everything(file: Path) -> tuple[object, ...]:
    """All that a site can learn from its ledger; raises only refusals."""
    with PrivacyLedger(file) as ledger:
        seen = (ledger.head, ledger.verify(), tuple(ledger.accounts()), ledger.mark(moment(3, "second"), model="model 3"))
        reserve(ledger, "second")
        assert ledger.head == seen[0]
        with pytest.raises(OrderRefused):
            ledger.answer(moment(3, "second"), reply=b"a second answer")
        return seen


@settings(max_examples=150, deadline=None, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
@example(place=0.078125, bits=128)  # in the schema's own text
def test_a_flipped_byte_anywhere_is_harmless_or_refused(history: Path, place: float, bits: int):
    content = bytearray(history.read_bytes())
    content[int(place * len(content))] ^= bits
    copy = history.with_name("flipped.sqlite")
    for old in history.parent.glob("flipped*"):
        old.unlink()
    copy.write_bytes(content)
    try:
        seen = everything(copy)
    except LedgerBroken:
        return
    assert seen == everything(history)


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\x00" + bytes(200)])
def test_a_file_that_is_no_ledger_is_refused(file: Path, content: bytes):
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(LedgerBroken):
        PrivacyLedger(file)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(file: Path, share: float):
    a_history(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(LedgerBroken):
        PrivacyLedger(file)


def test_damage_under_an_open_ledger_is_a_refusal(file: Path):
    with PrivacyLedger(file) as ledger:
        ledger.close()
        for act in (
            lambda: ledger.head,
            ledger.accounts,
            ledger.verify,
            lambda: ledger.must_hold("x"),
            lambda: reserve(ledger),
        ):
            with pytest.raises(LedgerBroken):
                act()


# --- the file -------------------------------------------------------------------------------------------------------------


def test_only_the_owner_may_read_the_ledger(file: Path):
    umask = os.umask(0)
    try:
        with PrivacyLedger(file) as ledger:
            reserve(ledger)
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()}
    finally:
        os.umask(umask)
    assert modes
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_commit_is_on_the_disk_and_not_in_a_cache(file: Path):
    with PrivacyLedger(file) as ledger:
        assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


FULL = """
    import resource
    ledger = PrivacyLedger(Path(sys.argv[1]))
    reserve(ledger, 'run')
    wal = Path(sys.argv[1] + '-wal')
    resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size + 100, resource.RLIM_INFINITY))
    refused = []
    for act in (lambda: ledger.mark(moment(1), model='m'), lambda: reserve(ledger, 'other')):
        try:
            act()
        except LedgerBroken as error:
            refused.append(str(error))
    print(refused, ledger.spent('run'))
"""


def test_a_full_disk_refuses_before_training(file: Path):
    said = "the ledger cannot be read or written"
    assert finished(in_another_process(FULL, file)) == f"{[said, said]} 0\n"
    with PrivacyLedger(file) as ledger:  # and nothing was half written
        assert ledger.spent("run") == 0
        assert ledger.mark(moment(), model="m") is None


def test_an_answer_that_does_not_fit_on_the_disk_does_not_exist(file: Path):
    with PrivacyLedger(file) as ledger:
        reserve(ledger)
        ledger.mark(moment(), model="m")
        (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
        ledger._db.execute(f"PRAGMA max_page_count = {pages}")
        head = ledger.head
        with pytest.raises(LedgerBroken):
            ledger.answer(moment(), reply=bytes(100_000))
        assert ledger.head == head
        assert ledger.mark(moment(), model="m") is None


READ_ONLY = """
    from wardround.common.privacy import filtered
    filtered([steps], 1e-5)
    if os.getuid() == 0:
        os.chown(sys.argv[2], 65534, 65534); os.chown(sys.argv[1], 65534, 65534)
        os.setgid(65534); os.setuid(65534)  # for root no file is read-only
    os.chmod(sys.argv[1], int(sys.argv[3], 8)); os.chmod(sys.argv[2], int(sys.argv[4], 8))
    try:
        ledger = PrivacyLedger(Path(sys.argv[1]))
        reserve(ledger, 'run')
    except LedgerBroken as error:
        print(error)
    os.chmod(sys.argv[2], 0o700)
"""


@pytest.mark.parametrize(("of_file", "of_folder"), [("400", "700"), ("600", "500"), ("000", "700")])
def test_a_read_only_ledger_refuses(tmp_path_factory: pytest.TempPathFactory, of_file: str, of_folder: str):
    folder = Path(tempfile.mkdtemp())
    try:
        PrivacyLedger(folder / "ledger.sqlite").close()
        said = finished(in_another_process(READ_ONLY, folder / "ledger.sqlite", folder, of_file, of_folder))
    finally:
        shutil.rmtree(folder)
    assert said == "the ledger cannot be read or written\n"


# --- all of it together ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["reserve", "mark", "answer", "settle", "reopen"]), st.sampled_from("ab"),
                          st.integers(1, 3), st.integers(1, 2), st.sampled_from("mn")), max_size=40))  # fmt: skip
def test_whatever_is_asked_in_whatever_order_the_laws_hold(
    tmp_path_factory: pytest.TempPathFactory, orders: list[tuple[str, str, int, int, str]]
):
    file = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    released: dict[tuple[str, int, int], bytes] = {}
    ledger = PrivacyLedger(file)
    for number, (kind, run, round, attempt, model) in enumerate(orders):
        at, reply = moment(round, run, attempt), f"reply {number}".encode()
        with contextlib.suppress(BudgetExhausted, OrderRefused):  # never LedgerBroken
            if kind == "reserve":
                reserve(ledger, run, steps=NoisedSteps(0.5, 2.0, 4))
            elif kind == "mark":
                sent = ledger.mark(at, model=model)
                assert sent is None or sent == released[at.key]
            elif kind == "answer":
                ledger.answer(at, reply=reply)
                assert at.key not in released  # one release for each mark, ever
                released[at.key] = reply
            elif kind == "settle":
                settle(ledger, run)
            else:
                ledger.close()
                ledger = PrivacyLedger(file)
        accounts = ledger.accounts()
        charged = sum(account.charged.training[0].steps for account in accounts)
        assert sum(1 for key in released for account in accounts if key[0] == account.run) <= charged
        assert all(account.marked <= account.charged.training[0].steps <= 4 for account in accounts)
        assert filtered([account.charged for account in accounts], 1e-5) <= 8.0
    ledger.verify()
    ledger.close()
