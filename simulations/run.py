"""Simulating a study: the real apps over a LocalGrid, then the comparison with no federation, then the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, RecordDict

from wardround.client.app import client_app
from wardround.client.data import open_parted, open_records
from wardround.client.hospital import CoinsFor, os_coins
from wardround.client.ledger import PrivacyLedger
from wardround.client.policy import SiteConfig
from wardround.common.devices import keep_memory
from wardround.common.errors import StudyStopped
from wardround.common.privacy import Cost, filtered
from wardround.common.service import logging_to
from wardround.common.tasks import Records
from wardround.common.weights import Weights
from wardround.server.account import epsilons, study_facts
from wardround.server.app import server_app
from wardround.server.checkpoint import Progress, RoundRecord
from wardround.server.federation import Observer
from wardround.server.report import Report, write_report
from wardround.server.validation import handed_out
from wardround.simulations.baselines import train_alone
from wardround.simulations.grid import LocalGrid
from wardround.simulations.held_out import HeldOut
from wardround.simulations.scenario import Scenario


@dataclass(frozen=True)
class Watch:
    """What a simulation tells while it runs."""

    began: Callable[[Scenario, list[str], dict[str, str]], None] = lambda scenario, present, refused: None
    round_done: Callable[[RoundRecord], None] = lambda record: None
    baseline: Callable[[str, int, int], None] = lambda name, done, total: None


def simulate(
    scenario: Scenario,
    *,
    processes: int = 1,
    baselines: bool = True,
    every: int = 1,
    watch: Watch | None = None,
    coins_for: CoinsFor = os_coins,
) -> Report:
    """Run or resume a prepared study and write its report.

    Args:
        scenario: the run folder.
        processes: how many processes compute for the sites.
        baselines: train each hospital alone and all records pooled, for comparison.
        every: rounds between checkpoints; a private study keeps every round.
        watch: who is told.
        coins_for: tests inject repeatable coins here; no configuration can.

    Raises:
        StudyStopped: after the report of what was done was written.
    """
    keep_memory()
    torch.set_num_threads(1)
    watch = watch or Watch()
    began = time.perf_counter()
    tests = HeldOut.open(scenario)
    with logging_to(scenario.folder / "log.txt"):
        stopped = _train(scenario, tests, processes, every, watch, coins_for)
    trained = time.perf_counter()
    checkpoint = Progress.latest(scenario.folder / "checkpoints", study=scenario.study.digest)
    if checkpoint is None:
        raise stopped or StudyStopped("no round was finished")
    alone = _baselines(scenario, watch) if baselines and not stopped else {}
    done = time.perf_counter()
    facts = study_facts(scenario.study, checkpoint, stopped=str(stopped or ""))
    model = handed_out(scenario.study.plan, checkpoint)
    facts |= {
        "privacy": _with_ledgers(scenario, checkpoint.run, facts["privacy"]),
        "results": tests.results(model, alone),
        "sites": tests.sites(),
        "seeds": None,
        "seconds": {
            "total": done - began,
            "training": math.fsum(record.seconds for record in checkpoint.history),  # also what came before a resume
            "baselines": done - trained,
        },
        "notes": [
            _NOTE_SIMULATION,
            *checkpoint.start,
            *([_NOTE_BASELINES, *tests.compared(model)] if alone else []),
            *([_NOTE_VALIDATION] if alone and scenario.study.plan.validation else []),
        ],
    }
    report = Report.model_validate(facts)
    write_report(scenario.folder, report)
    if stopped:
        raise stopped
    return report


_NOTE_SIMULATION = (
    "This was a simulation: all hospitals were run on one machine, so their test patients could be looked at together."
)
_NOTE_VALIDATION = (
    "The hospitals alone and the pooled model leave out the patients set aside for validation too; they train for all planned "
    "rounds, and their last model is judged."
)
_NOTE_BASELINES = (
    "The hospitals alone and the pooled model were trained without noise: alone, nothing leaves a hospital, and pooled is "
    "the ceiling a federation is measured against."
)


def _train(
    scenario: Scenario, tests: HeldOut, processes: int, every: int, watch: Watch, coins_for: CoinsFor
) -> StudyStopped | None:
    plan = scenario.study.plan
    run_config = {"plan": scenario.study.text, "folder": str(scenario.folder), "weights": str(scenario.weights or "")}
    often = scenario.task.makes.measured_every if scenario.task.makes else 1
    observer = Observer(
        began=lambda present, refused: watch.began(scenario, present, refused),
        measure=lambda round, weights: (
            tests.figures(tests.pooled(weights)) if round % often == 0 or round == plan.rounds else {}
        ),
        round_done=watch.round_done,
    )
    app = server_app(observer, every=1 if plan.privacy else every)
    with LocalGrid(lambda: client_app(coins_for), list(scenario.sites.values()), run_config, processes) as grid:
        context = Context(grid.run.run_id, 1, {}, RecordDict(), dict(run_config))
        try:
            app(grid, context)
        except StudyStopped as stopped:
            return stopped
    return None


def _baselines(scenario: Scenario, watch: Watch) -> dict[str, Weights]:
    """Models by name: each site's, and "" for the pooled one."""
    parts = {site: _trained_on(scenario, site) for site in scenario.sites}
    parts = {site: records for site, records in parts.items() if len(records)}
    models: dict[str, Weights] = {}
    for number, (site, records) in enumerate(parts.items()):
        watch.baseline(site, number, len(parts) + 1)
        models[site] = train_alone(scenario.study.plan, records, name=site, weights=scenario.weights)
    watch.baseline("pooled", len(parts), len(parts) + 1)
    models[""] = train_alone(scenario.study.plan, reduce(add, parts.values()), name="pooled", weights=scenario.weights)
    watch.baseline("", len(parts) + 1, len(parts) + 1)
    return models


def _trained_on(scenario: Scenario, site: str) -> Records:
    validation = scenario.study.plan.validation
    if validation is None:
        return open_records(scenario.source(site), scenario.task)[0]
    return open_parted(scenario.source(site), scenario.task, validation.share)[0]


def _with_ledgers(scenario: Scenario, run: str, privacy: dict[str, Any]) -> dict[str, Any]:
    """What the hospitals' own ledgers say of this run. A coordinator cannot read them; a simulation can, so they decide."""
    known = {}
    for site, facts in privacy.items():
        allow = SiteConfig.load(scenario.sites[site]).allow
        path = scenario.sites[site].parent / "state" / "ledger.sqlite"
        charged = None
        if path.exists():
            with PrivacyLedger(path) as ledger:
                accounts, head = ledger.accounts(), ledger.head
            charged = filtered([account.charged for account in accounts], allow.delta)
            mine = next((account for account in accounts if account.run == run), None)
            facts = facts | epsilons(scenario.study.plan, mine.spent if mine else Cost(()))
            facts = facts | {"steps": mine.marked if mine else 0, "looks": mine.looked if mine else 0, "ledger_head": head}
        known[site] = facts | {"lifetime_charged": charged, "lifetime_limit": allow.epsilon_lifetime}
    return known


def over_seeds(reports: list[Report], seeds: list[int]) -> Report:
    """The first report, with mean and spread over all of them."""
    tables = [report.model_dump(mode="json", by_alias=True) for report in reports]
    first = tables[0]["results"]
    summary = {
        "values": seeds,
        "federated": {m: _spread([t["results"]["federated"][m]["value"] for t in tables]) for m in first["federated"]},
        "pooled": {m: _spread([t["results"]["pooled"][m]["value"] for t in tables]) for m in first["pooled"]},
        "local": {
            site: {m: _spread([t["results"]["local"][site][m]["value"] for t in tables]) for m in figures}
            for site, figures in first["local"].items()
        },
    }
    return Report.model_validate({**tables[0], "seeds": summary})


def _spread(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "values": values,
    }


def seed_folders(folder: Path, seeds: list[int]) -> dict[int, Path]:
    """Where each seed's run lives: the first in the run folder itself, the others below it."""
    return {seed: folder if number == 0 else folder / "seeds" / str(seed) for number, seed in enumerate(seeds)}
