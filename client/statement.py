"""The privacy ledger for a person: one line a study, one line a cohort."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wardround.client.ledger import PrivacyLedger, StudyAccount
from wardround.client.policy import SiteConfig
from wardround.common.errors import ConfigError
from wardround.common.privacy import filtered


def statement(path: Path) -> dict[str, Any]:
    """Everything in a site's ledger that a data-protection officer asks for.

    Raises:
        ConfigError: the site file is wrong, or there is no ledger yet.
        LedgerBroken: the chain does not hold.
    """
    config = SiteConfig.load(path)
    with PrivacyLedger(_file(config)) as ledger:
        accounts, entries, head = ledger.accounts(), ledger.verify(), ledger.head
    delta = config.allow.delta
    cohorts = {source.cohort for source in config.data.values()} | {account.cohort for account in accounts}
    return {
        "site": config.site,
        "entries": entries,
        "chain": "intact",
        "head": head,
        "studies": [_study(account, delta) for account in accounts],
        "cohorts": {cohort: _cohort(cohort, accounts, config) for cohort in sorted(cohorts)},
    }


def settle_here(path: Path, run: str) -> None:
    """End the run that begins with these characters, from the hospital's side.

    Raises:
        ConfigError: no run, or more than one, begins so.
    """
    with PrivacyLedger(_file(SiteConfig.load(path))) as ledger:
        found = [account for account in ledger.accounts() if account.run.startswith(run)]
        if len(found) != 1:
            raise ConfigError(f"--settle {run}: {len(found)} runs begin so; see `wardround ledger {path}`")
        ledger.settle(study=found[0].study, run=found[0].run)


def _file(config: SiteConfig) -> Path:
    file = config.state / "ledger.sqlite"
    if not file.exists():
        raise ConfigError(f"{config.site} has no ledger yet: {file} does not exist; no private study ever trained here")
    return file


def print_statement(path: Path, *, as_json: bool) -> None:
    """Print it."""
    found = statement(path)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console()
    studies = Table(title=f"studies at {found['site']}", title_justify="left")
    for column in ("study", "run", "cohort", "state", "steps", "reserved", "epsilon", "delta"):
        studies.add_column(column, justify="right" if column in ("steps", "reserved", "epsilon") else "left")
    for study in found["studies"]:
        studies.add_row(
            study["name"], study["run"][:8], study["cohort"], study["state"], str(study["steps"]),
            str(study["steps_reserved"]), f"{study['epsilon']:.3f}", f"{study['delta']:g}",
        )  # fmt: skip
    console.print(studies)
    for cohort, facts in found["cohorts"].items():
        limit, charged = facts["limit"], facts["charged"]
        left = "no budget set" if limit is None else f"{max(0.0, limit - charged):.2f} left of {limit:g}"
        console.print(
            f"cohort {cohort}: epsilon {charged:.2f} charged over all studies (Renyi filter), {left}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"chain intact over {found['entries']} entries, head {found['head'][:16]}", highlight=False, soft_wrap=True)


def _study(account: StudyAccount, delta: float) -> dict[str, Any]:
    return {
        "name": account.name,
        "study": account.study,
        "run": account.run,
        "cohort": account.cohort,
        "state": "settled" if account.settled else "open",
        "steps": account.marked,
        "steps_reserved": account.reserved.steps,
        "noise_multiplier": account.reserved.noise_multiplier,
        "sampling_rate": account.reserved.sampling_rate,
        "counted_classes": bool(account.counted),
        "looks": account.looked,
        "looks_reserved": account.looks.steps if account.looks else 0,
        "epsilon": account.holds.epsilon(delta),
        "epsilon_replace_one": account.holds.epsilon(delta, "replace-one"),
        "delta": delta,
    }


def _cohort(cohort: str, accounts: list[StudyAccount], config: SiteConfig) -> dict[str, Any]:
    charged = filtered([account.charged for account in accounts if account.cohort == cohort], config.allow.delta)
    return {"charged": charged, "limit": config.allow.epsilon_lifetime, "delta": config.allow.delta}
