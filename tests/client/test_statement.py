"""`wardround ledger`: what a data-protection officer reads is what the ledger holds."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wardround.client.cli import ledger as verb
from wardround.client.ledger import Cohort, Moment, PrivacyLedger
from wardround.client.statement import print_statement, settle_here, statement
from wardround.common import cli
from wardround.common.errors import ConfigError, LedgerBroken
from wardround.common.privacy import NoisedSteps, filtered, spent
from wardround.simulations.scenario import Scenario

STEPS = NoisedSteps(0.5, 4.0, 10)


@pytest.fixture
def site(scenario: Callable[..., Scenario]) -> Path:
    """A site with one settled and one open study."""
    file = scenario(rounds=2).sites["va"]
    with PrivacyLedger(file.parent / "state" / "ledger.sqlite") as books:
        for run, marks in (("first-run-of-many", 3), ("second", 2)):
            books.reserve(
                Cohort("cardiology", 15.0, 1e-5), study=run * 2, name="hearts", run=run, steps=STEPS, steps_per_round=1
            )
            for round in range(1, marks + 1):
                books.mark(Moment(run * 2, run, round, 1), model="m")
        books.settle(study="first-run-of-many" * 2, run="first-run-of-many")
    return file


def test_a_statement_tells_what_each_study_cost_and_what_is_charged(site: Path):
    found = statement(site)
    first, second = found["studies"]
    assert (first["state"], first["steps"], first["steps_reserved"]) == ("settled", 3, 10)
    assert (second["state"], second["steps"], second["steps_reserved"]) == ("open", 2, 10)
    assert first["epsilon"] == spent([NoisedSteps(0.5, 4.0, 3)], 1e-5)
    assert first["epsilon_replace_one"] == spent([NoisedSteps(0.5, 4.0, 3)], 1e-5, "replace-one")
    assert second["epsilon"] == spent([NoisedSteps(0.5, 4.0, 2)], 1e-5)
    charged = filtered([NoisedSteps(0.5, 4.0, 3), NoisedSteps(0.5, 4.0, 10)], 1e-5)  # the open one in full
    assert found["cohorts"] == {"cardiology": {"charged": charged, "limit": 15.0, "delta": 1e-5}}
    with PrivacyLedger(site.parent / "state" / "ledger.sqlite") as books:
        assert (found["head"], found["entries"], found["chain"]) == (books.head, books.verify(), "intact")


def test_the_printed_statement_says_the_same(site: Path, capsys: pytest.CaptureFixture[str]):
    facts = statement(site)
    print_statement(site, as_json=True)
    assert json.loads(capsys.readouterr().out) == facts
    print_statement(site, as_json=False)
    out = " ".join(capsys.readouterr().out.split())
    charged = facts["cohorts"]["cardiology"]["charged"]
    assert f"cohort cardiology: epsilon {charged:.2f} charged over all studies" in out
    assert f"{15 - charged:.2f} left of 15" in out
    assert "chain intact over 9 entries" in out
    assert f"{facts['studies'][0]['epsilon']:.3f}" in out


def test_reading_a_statement_changes_nothing(site: Path):
    assert statement(site) == statement(site)


def test_a_cohort_without_a_budget_says_so(site: Path, capsys: pytest.CaptureFixture[str]):
    site.write_text(site.read_text().replace("epsilon_lifetime = 15.0\n", ""))
    assert statement(site)["cohorts"]["cardiology"]["limit"] is None
    print_statement(site, as_json=False)
    assert "no budget set" in capsys.readouterr().out


def test_a_site_that_never_trained_has_no_ledger_and_gets_none(scenario: Callable[..., Scenario]):
    file = scenario(rounds=2).sites["va"]
    with pytest.raises(ConfigError, match="va has no ledger yet"):
        statement(file)
    assert not (file.parent / "state").exists()


@pytest.fixture
def broken(site: Path) -> Path:
    with sqlite3.connect(site.parent / "state" / "ledger.sqlite") as db:
        db.execute("DROP TRIGGER no_update")
        db.execute("UPDATE journal SET body = replace(body, '10', '2') WHERE kind = 'reserve'")
    db.close()
    return site


def test_a_broken_chain_is_an_error_and_no_statement(broken: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(LedgerBroken, match="the ledger's chain is broken at entry 2"):
        statement(broken)
    assert capsys.readouterr().out == ""


def test_the_command_ends_with_an_error_on_a_broken_chain(
    broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cli, "application", lambda: lambda: verb(broken, json=True))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "wardround: the ledger's chain is broken at entry 2\n"


def test_the_command_prints_json(site: Path, monkeypatch: pytest.MonkeyPatch):
    import typer

    app = typer.Typer()
    app.command()(verb)
    result = CliRunner().invoke(app, [str(site), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["site"] == "va"


def test_a_study_without_a_farewell_can_be_settled_at_the_site(tmp_path: Path):
    (tmp_path / "site.toml").write_text('site = "va"\n[allow]\nepsilon_lifetime = 15.0\n')
    with PrivacyLedger(tmp_path / "state" / "ledger.sqlite") as ledger:
        for run in ("abc", "abd"):
            ledger.reserve(
                Cohort("patients", 15.0, 1e-5), study=run * 2, name="hearts", run=run, steps=STEPS, steps_per_round=1
            )
    with pytest.raises(ConfigError, match="2 runs begin so"):
        settle_here(tmp_path / "site.toml", "ab")
    settle_here(tmp_path / "site.toml", "abc")
    assert [study["state"] for study in statement(tmp_path / "site.toml")["studies"]] == ["settled", "open"]
