"""A study may be killed at any moment: it goes on where it was, ends in the same bits, and no patient pays twice."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import repeatable_coins
from wardround.client.dp import Coins, OsCoins
from wardround.client.ledger import PrivacyLedger
from wardround.common.vault import Vault
from wardround.common.weights import digest
from wardround.server import federation
from wardround.server.checkpoint import Progress
from wardround.simulations.run import simulate
from wardround.simulations.scenario import Scenario

ROOT = Path(__file__).parent.parent.parent
ROUNDS = 30


class Killed(BaseException):
    """What no `except Exception` survives."""


def go(folder: str) -> None:
    """What the subprocess does."""
    simulate(Scenario.reopen(Path(folder)), baselines=False, coins_for=repeatable_coins)


def reached(folder: Path) -> int:
    return max((int(path.stem.split("-")[1]) for path in folder.glob("checkpoints/round-*.safetensors")), default=-1)


def killed_at_random(folder: Path, kills: int, seed: int) -> int:
    """Start, kill -9 somewhere, start again, until it ends by itself; returns how many kills hit a running study."""
    dice, hits = random.Random(seed), 0
    study = Scenario.reopen(folder).study.plan
    rounds, most_of_a_round = study.rounds, 0.03 if study.privacy else 0.004
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", f"from tests.simulations.test_resume import go; go({str(folder)!r})"], cwd=ROOT
        )
        if hits == kills:
            assert process.wait(timeout=120) == 0
            return hits
        before = reached(folder)
        target = before + dice.randint(1, max(1, (rounds - before) // (kills - hits + 1)))
        while reached(folder) < target and process.poll() is None:
            time.sleep(0.001)
        time.sleep(dice.uniform(0, most_of_a_round))
        process.kill()
        if process.wait() == 0:  # it was quicker
            return hits
        hits += 1


def marks(scenario: Scenario) -> dict[str, list[tuple[int, bool]]]:
    """(noised steps, settled) of every run in every site's ledger."""
    found = {}
    for site, path in scenario.sites.items():
        with PrivacyLedger(path.parent / "state" / "ledger.sqlite") as ledger:
            ledger.verify()
            found[site] = [(account.marked, account.settled) for account in ledger.accounts()]
    return found


def model(scenario: Scenario) -> bytes:
    return (scenario.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("kills", "without_privacy"),
    [
        pytest.param(3, False, marks=pytest.mark.slow),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(20, False, marks=pytest.mark.slow),
        pytest.param(20, True, marks=pytest.mark.slow),
    ],
)
def test_kill_dash_nine_changes_no_bit_and_spends_nothing_twice(
    scenario: Callable[..., Scenario], kills: int, without_privacy: bool
):
    rounds = 10 * ROUNDS if without_privacy else ROUNDS  # without noise and ledgers a round is over in milliseconds
    whole = scenario("whole", rounds=rounds, without_privacy=without_privacy)
    simulate(whole, baselines=False, coins_for=repeatable_coins)
    torn = scenario("torn", rounds=rounds, without_privacy=without_privacy)
    assert killed_at_random(torn.folder, kills, seed=kills) >= (kills + 1) // 2
    assert model(torn) == model(whole)
    assert reached(torn.folder) == rounds
    if not without_privacy:
        assert set(map(tuple, marks(torn).values())) == {((ROUNDS, True),)}


@pytest.mark.parametrize("round", [0, 1, 4, 6])
def test_a_kill_between_a_sites_answer_and_the_checkpoint_sends_the_same_answer_again(
    scenario: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch, round: int
):
    study, tossed = scenario(rounds=6), Counter[tuple[str, int]]()
    answers: dict[int, set[str]] = {}
    one_round = federation.one_round

    def watched(*given: object) -> Progress:
        found = one_round(*given)  # type: ignore[arg-type]
        answers.setdefault(found.round, set()).add(digest(found.weights))
        return found

    def counted(site: str, at: int) -> Coins:
        tossed[site, at] += 1
        return OsCoins()  # secret ones: only a stored answer can be the same twice

    def killed(self: Progress, folder: Path, vault: Vault) -> None:
        if self.round == round:
            raise Killed
        save(self, folder, vault)

    monkeypatch.setattr(federation, "one_round", watched)
    save = Progress.save
    with monkeypatch.context() as deadly:
        deadly.setattr(Progress, "save", killed)
        with pytest.raises(Killed):
            simulate(study, baselines=False, coins_for=counted)
    report = simulate(Scenario.reopen(study.folder), baselines=False, coins_for=counted)
    assert report.outcome.status == "completed"
    assert set(map(tuple, marks(study).values())) == {((6, True),)}
    assert set(tossed.values()) == {1}
    assert len(tossed) == 6 * 4
    assert {at: len(seen) for at, seen in answers.items()} == dict.fromkeys(range(1, 7), 1)


def test_a_site_that_dies_between_mark_and_answer_trains_the_round_again_for_nothing(
    scenario: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch
):
    study, answer = scenario(rounds=4), PrivacyLedger.answer

    def killed(self: PrivacyLedger, at: object, **given: object) -> None:
        if at.round == 2 and "va" in str(self.path):  # type: ignore[attr-defined]
            raise Killed
        answer(self, at, **given)  # type: ignore[arg-type]

    with monkeypatch.context() as deadly:
        deadly.setattr(PrivacyLedger, "answer", killed)
        with pytest.raises(Killed):
            simulate(study, baselines=False, coins_for=repeatable_coins)
    report = simulate(Scenario.reopen(study.folder), baselines=False, coins_for=repeatable_coins)
    assert report.outcome.rounds_done == 4
    assert set(map(tuple, marks(study).values())) == {((4, True),)}
    whole = scenario("whole", rounds=4)
    simulate(whole, baselines=False, coins_for=repeatable_coins)
    assert model(study) == model(whole)


def test_a_damaged_checkpoint_costs_a_round_of_work_and_no_privacy(
    scenario: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch
):
    study, save = scenario(rounds=6), Progress.save

    def killed(self: Progress, folder: Path, vault: Vault) -> None:
        save(self, folder, vault)
        if self.round == 4:
            raise Killed

    with monkeypatch.context() as deadly:
        deadly.setattr(Progress, "save", killed)
        with pytest.raises(Killed):
            simulate(study, baselines=False, coins_for=repeatable_coins)
    newest = study.folder / "checkpoints" / "round-000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    simulate(Scenario.reopen(study.folder), baselines=False, coins_for=repeatable_coins)
    whole = scenario("whole", rounds=6)
    simulate(whole, baselines=False, coins_for=repeatable_coins)
    assert model(study) == model(whole)
    assert set(map(tuple, marks(study).values())) == {((6, True),)}


def test_resuming_a_finished_run_changes_nothing(scenario: Callable[..., Scenario]):
    study = scenario(rounds=3)
    first = simulate(study, baselines=False)
    ledgers, before = marks(study), model(study)
    again = simulate(Scenario.reopen(study.folder), baselines=False)
    assert model(study) == before
    assert marks(study) == ledgers
    assert again.model_dump(exclude={"seconds"}) == first.model_dump(exclude={"seconds"})


def test_the_files_a_run_leaves_are_bounded(scenario: Callable[..., Scenario]):
    study = scenario(rounds=12)
    simulate(study, baselines=False)
    assert len(list((study.folder / "checkpoints").iterdir())) == 2
