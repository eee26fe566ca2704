"""A run folder: the plan, and a file for each simulated hospital, exactly as a real one would write it.

runs/<name>/plan.toml                 what everybody agreed on
runs/<name>/settings.json             how it is simulated: seeds, processes, baselines
runs/<name>/sites/<site>/site.toml    the hospital's own file
runs/<name>/sites/<site>/state/       its ledger
"""

from __future__ import annotations

import csv
import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import tomli_w
from numpy.typing import NDArray

from wardround.client.data import open_records
from wardround.client.policy import DataSource, SiteConfig
from wardround.common.config import read_text
from wardround.common.errors import ConfigError
from wardround.common.plan import SignedText, StudyPlan, two_digits
from wardround.common.registry import look_up
from wardround.common.tasks import TASKS, TableSchema, Task
from wardround.simulations import SITES
from wardround.simulations.partition import Partition


@dataclass(frozen=True)
class Changes:
    """What the command line changes in a study before it begins."""

    epsilon: float | None = None
    rounds: int | None = None
    without_privacy: bool = False
    sites: int | None = None
    partition: str | None = None
    seed: int | None = None

    def apply(self, table: dict[str, Any]) -> dict[str, Any]:
        """A study's TOML table with these changes.

        Raises:
            ConfigError: an epsilon for a study without privacy, or both --epsilon and --no-privacy.
        """
        changed = dict(table)
        if self.without_privacy:
            if self.epsilon is not None:
                raise ConfigError("--epsilon and --no-privacy contradict each other")
            changed.pop("privacy", None)
        if self.epsilon is not None:
            if "privacy" not in table:
                raise ConfigError("--epsilon: this study has no [privacy] section to change")
            changed["privacy"] = {**table["privacy"], "epsilon": self.epsilon}
        if self.rounds is not None:
            changed["rounds"] = self.rounds
        if self.seed is not None:
            changed["seed"] = self.seed
        return changed


@dataclass(frozen=True)
class Scenario:
    """A prepared run folder."""

    folder: Path
    study: SignedText
    sites: dict[str, Path]  # site -> its file, in the plan's order

    @classmethod
    def prepare(cls, source: Path, folder: Path, changes: Changes) -> Self:
        """Write a run folder for the study in `source`.

        Raises:
            ConfigError: the study, a site file or a change does not hold; nothing is left behind.
        """
        text = read_text(source)
        original = SignedText(StudyPlan.parse(text, source=str(source)), text)
        table = changes.apply(tomllib.loads(text))
        configs = {site: _site_file(source, site, original.plan) for site in original.plan.sites}
        seed = int(table.get("seed", 0))
        rows: dict[str, list[list[str]]] = {}
        if changes.sites is not None or changes.partition is not None:
            configs, rows = _shared_out(configs, original.plan, changes, seed)
            task = original.plan.task
            table["sites"] = {site: config.data[task].declared_patients for site, config in configs.items()}
            table["min_sites"] = min(original.plan.min_sites, len(configs))
        untouched = table == tomllib.loads(text)
        study_text = text if untouched else tomli_w.dumps(table)
        study = SignedText(StudyPlan.parse(study_text, source=str(source)), study_text)
        configs = {site: _moved_in(config, changes.seed) for site, config in configs.items()}

        folder.mkdir(parents=True)
        (folder / "plan.toml").write_bytes(study.text.encode())  # byte for byte: the digest is over them
        sites = {}
        for site, config in configs.items():
            home = folder / "sites" / site
            home.mkdir(parents=True)
            if site in rows:
                with (home / "records.csv").open("w", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows(rows[site])
                config = _at(config, study.plan.task, (home / "records.csv").resolve())
            sites[site] = home / "site.toml"
            sites[site].write_bytes(tomli_w.dumps(_table(config)).encode())
        return cls(folder, study, sites)

    @classmethod
    def reopen(cls, folder: Path) -> Self:
        """A run folder written earlier.

        Raises:
            ConfigError: it is none.
        """
        if not (folder / "plan.toml").is_file():
            raise ConfigError(f"{folder} is no run folder: it has no plan.toml")
        study = SignedText.load(folder / "plan.toml")
        sites = {site: folder / "sites" / site / "site.toml" for site in study.plan.sites}
        return cls(folder, study, sites)

    @property
    def task(self) -> Task:
        """The study's task."""
        return look_up("task", self.study.plan.task, TASKS)

    def source(self, site: str) -> DataSource:
        """Where a simulated hospital has its records."""
        return SiteConfig.load(self.sites[site]).data[self.study.plan.task]


@dataclass(frozen=True)
class Settings:
    """How a run is simulated; kept beside the plan so that `--resume` needs no other option."""

    seeds: list[int]
    processes: int = 1
    baselines: bool = True

    def save(self, folder: Path) -> None:
        """Write settings.json."""
        (folder / "settings.json").write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read settings.json; raises `ConfigError` where it is missing or damaged."""
        try:
            return cls(**json.loads((folder / "settings.json").read_text()))
        except (OSError, ValueError, TypeError):
            raise ConfigError(f"{folder} cannot be resumed: its settings.json is missing or damaged") from None


def fresh_folder(out: Path, name: str) -> Path:
    """`out/name`, or `out/name-2`, ... where that is taken: an earlier run is never overwritten."""
    candidates = (out / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(folder for folder in candidates if not folder.exists())


def _site_file(source: Path, site: str, plan: StudyPlan) -> SiteConfig:
    for folder in (source.parent / "sites", source.parent.parent / "sites", SITES):
        if (folder / f"{site}.toml").is_file():
            config = SiteConfig.load(folder / f"{site}.toml")
            if config.site != site:
                raise ConfigError(f"{folder / f'{site}.toml'}: site is {config.site!r}, wanted {site!r}")
            if plan.task not in config.data:
                raise ConfigError(f"{folder / f'{site}.toml'}: has no [data.{plan.task}]")
            return config
    raise ConfigError(f"no file {site}.toml for site {site} beside {source} (looked in sites/ and ../sites/)")


def _shared_out(
    configs: dict[str, SiteConfig], plan: StudyPlan, changes: Changes, seed: int
) -> tuple[dict[str, SiteConfig], dict[str, list[list[str]]]]:
    """New simulated hospitals out of the records of the given ones."""
    task = look_up("task", plan.task, TASKS)
    if not isinstance(task.schema, TableSchema):
        raise ConfigError(f"--sites and --partition share out tables; task {task.name} has none")
    rows, label = [], []
    for config in configs.values():
        source = config.data[plan.task]
        if source.loader != "table" or source.patient_column:
            raise ConfigError("--sites and --partition need tables with one record a patient")
        found, _ = open_records(replace_holdout(source, 0.0), task)
        with source.path.open(newline="", encoding="utf-8-sig") as file:
            lines = [row for row in csv.reader(file) if row]
        rows += _in_schema_order(lines, source, task.schema)
        label += found.label.tolist()
    count = len(configs) if changes.sites is None else changes.sites
    if count < 1:
        raise ConfigError(f"--sites {count}: wanted at least 1")
    dealt = Partition.parse(changes.partition or "iid").deal(np.asarray(label), count, seed=seed)
    model = next(iter(configs.values()))
    names = [f"site-{number:0{len(str(count))}d}" for number in range(1, count + 1)]
    shared = {name: _simulated(model, plan.task, name, mine) for name, mine in zip(names, dealt, strict=True)}
    return shared, {name: [rows[i] for i in mine] for name, mine in zip(names, dealt, strict=True)}


def _in_schema_order(lines: list[list[str]], source: DataSource, schema: TableSchema) -> list[list[str]]:
    names = [name.strip() for name in lines.pop(0)] if source.header else schema.names
    return [[row[names.index(name)] for name in schema.names] for row in lines]


def _simulated(model: SiteConfig, task: str, name: str, patients: NDArray[np.int64]) -> SiteConfig:
    """A hospital with its share of patients and the policy of a real one, but for its size."""
    source = model.data[task]
    training = len(patients) - round(source.holdout * len(patients))
    source = source.model_copy(update={"declared_patients": two_digits(max(1, training)), "header": False})
    allow = model.allow.model_copy(update={"min_patients": 1, "min_sites": 1})
    return model.model_copy(update={"site": name, "data": {task: source}, "allow": allow})


def _moved_in(config: SiteConfig, seed: int | None) -> SiteConfig:
    """The file of a hospital in a run folder: its own, but for another split where another seed is wanted."""
    other = {} if seed is None else {"holdout_seed": seed}
    data = {task: source.model_copy(update=other) for task, source in config.data.items()}
    return config.model_copy(update={"data": data, "state": Path("state")})


def _at(config: SiteConfig, task: str, path: Path) -> SiteConfig:
    return config.model_copy(update={"data": {task: config.data[task].model_copy(update={"path": path})}})


def replace_holdout(source: DataSource, holdout: float) -> DataSource:
    """The same data source, holding back another share of its patients."""
    return source.model_copy(update={"holdout": holdout})


def _table(config: SiteConfig) -> dict[str, Any]:
    table: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return table
