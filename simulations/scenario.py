"""A run folder: the plan, and a file for each simulated hospital, exactly as a real one would write it.

runs/<name>/plan.toml                 what everybody agreed on
runs/<name>/settings.json             how it is simulated: seeds, processes, baselines
runs/<name>/public-weights            the file that the plan starts from, if it does
runs/<name>/sites/<site>/site.toml    the hospital's own file
runs/<name>/sites/<site>/records.safetensors  its records, where they were dealt out
runs/<name>/sites/<site>/state/       its ledger
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import tomli_w

from wardround.client.data.prepared import save_prepared
from wardround.client.policy import DataSource, SiteConfig
from wardround.common.config import read_text
from wardround.common.errors import ConfigError
from wardround.common.plan import SignedText, StudyPlan
from wardround.common.start import named, start
from wardround.common.tasks import Task, task_of
from wardround.simulations.hospitals import dealt, of_plan

_PUBLIC = "public-weights"


@dataclass(frozen=True)
class Changes:
    """What the command line changes in a study before it begins."""

    epsilon: float | None = None
    rounds: int | None = None
    without_privacy: bool = False
    sites: int | None = None
    partition: str | None = None
    seed: int | None = None
    weights: Path | None = None  # a file of public weights, which is named in a plan that names none

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
            if "validation" in changed:  # its cap is read with privacy alone
                changed["validation"] = {key: value for key, value in changed["validation"].items() if key != "cap"}
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
    def prepare(cls, source: Path, folder: Path, changes: Changes, data: Path | None = None) -> Self:
        """Write a run folder for the study in `source`; `data` holds the data sets that are not embedded.

        Raises:
            ConfigError: the study, a site file or a change does not hold; nothing is left behind.
        """
        text = read_text(source)
        original = SignedText(StudyPlan.parse(text, source=str(source)), text)
        table = changes.apply(tomllib.loads(text))
        hospitals = of_plan(source, original.plan, data)
        if changes.sites is not None or changes.partition is not None:
            seed = int(table.get("seed", 0))
            hospitals = dealt(hospitals, original.plan, sites=changes.sites, partition=changes.partition, seed=seed)
            task = original.plan.task
            table["sites"] = {site: hospital.config.data[task].declared_patients for site, hospital in hospitals.items()}
            table["min_sites"] = min(original.plan.min_sites, len(hospitals))
        if changes.weights is not None and "weights" not in table.get("model", {}):
            table["model"] = {**table.get("model", {}), **named(original.plan, changes.weights)}
        untouched = table == tomllib.loads(text)
        study_text = text if untouched else tomli_w.dumps(table)
        study = SignedText(StudyPlan.parse(study_text, source=str(source)), study_text)
        start(study.plan, changes.weights)

        folder.mkdir(parents=True)
        (folder / "plan.toml").write_bytes(study.text.encode())  # byte for byte: the digest is over them
        if changes.weights is not None:
            (folder / _PUBLIC).write_bytes(changes.weights.read_bytes())  # a resumed run needs no other file
        sites = {}
        for site, hospital in hospitals.items():
            home = folder / "sites" / site
            home.mkdir(parents=True)
            config = _moved_in(hospital.config, changes.seed)
            if hospital.records is not None:
                save_prepared(home / "records.safetensors", hospital.records)
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
    def weights(self) -> Path | None:
        """The file of public weights that the study starts from, if it does."""
        return self.folder / _PUBLIC if "weights" in self.study.plan.model else None

    @property
    def task(self) -> Task:
        """The study's task."""
        return task_of(self.study.plan)

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


def _moved_in(config: SiteConfig, seed: int | None) -> SiteConfig:
    """The file of a hospital in a run folder: its own, but for another split where another seed is wanted."""
    data = {
        task: source if seed is None or not source.holdout else source.model_copy(update={"holdout_seed": seed})
        for task, source in config.data.items()
    }
    return config.model_copy(update={"data": data, "state": Path("state")})


def _table(config: SiteConfig) -> dict[str, Any]:
    table: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return table
