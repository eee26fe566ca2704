"""The hospitals of a simulation: from their own files, from a data set they share, or dealt out anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wardround.client.data import load
from wardround.client.data.loaded import Loaded
from wardround.client.policy import DataSource, SiteConfig, SitePolicy
from wardround.common.errors import ConfigError
from wardround.common.plan import StudyPlan, two_digits
from wardround.common.tasks import Records, task_of
from wardround.common.tasks.base import numbered
from wardround.simulations import SITES
from wardround.simulations.cohorts import COHORTS, gather
from wardround.simulations.partition import Partition


@dataclass(frozen=True)
class SimulatedHospital:
    """One of them.

    Attributes:
        config: what would stand in its own file.
        records: what it holds; None where `config` says where its files are.
    """

    config: SiteConfig
    records: Loaded | None = None


def of_plan(source: Path, plan: StudyPlan, data: Path | None) -> dict[str, SimulatedHospital]:
    """The hospitals that `plan` names, by their files beside `source`, or by the homes of the task's data set.

    Raises:
        ConfigError: a hospital has neither.
    """
    files = {site: _site_file(source, site) for site in plan.sites}
    if all(files.values()) or plan.task not in COHORTS:
        return {site: SimulatedHospital(_read(file, site, source, plan)) for site, file in files.items()}
    cohort, task = COHORTS[plan.task], task_of(plan)
    gathered = gather(cohort, task, data)
    home = np.array(gathered.home)
    if unknown := [site for site in plan.sites if site not in gathered.home]:
        raise ConfigError(
            f"sites.{unknown[0]}: no record of task {plan.task} is at home there; there are: "
            f"{', '.join(sorted(set(gathered.home)))}"
        )
    found = {}
    for site, declared in plan.sites.items():
        source_of = _dealt_source(cohort.holdout, plan.seed, declared)
        found[site] = SimulatedHospital(_config(site, plan.task, source_of), gathered.loaded.take(_where(home == site)))
    return found


def dealt(
    hospitals: dict[str, SimulatedHospital], plan: StudyPlan, *, sites: int | None, partition: str | None, seed: int
) -> dict[str, SimulatedHospital]:
    """All patients of `hospitals` shared out anew, over `sites` hospitals or as many as there are.

    Raises:
        ConfigError: fewer than one site, more sites than patients, or no such partition.
    """
    count = len(hospitals) if sites is None else sites
    if count < 1:
        raise ConfigError(f"--sites {count}: wanted at least 1")
    task = task_of(plan)
    whole = _one_again([h.records for h in hospitals.values() if h.records is not None])
    if whole is None:
        whole = reduce(add, (load(h.config.data[plan.task], task) for h in hospitals.values()))
    rule = Partition.parse(partition or "iid")
    parts = rule.deal(_class_of_patient(whole.records).numpy(), count, seed=seed)
    first = next(iter(hospitals.values())).config
    policy = first.allow.model_copy(update={"min_patients": 1, "min_sites": 1})
    holdout, holdout_seed = first.data[plan.task].holdout, first.data[plan.task].holdout_seed
    found = {}
    for number, patients in enumerate(parts, start=1):
        site = f"site-{number:0{len(str(count))}d}"
        chosen = torch.zeros(whole.records.patients, dtype=torch.bool)
        chosen[torch.from_numpy(patients)] = True
        mine = whole.take(_where(chosen[whole.records.patient].numpy()))
        declared = two_digits(max(1, _training_patients(mine, holdout)))
        config = _config(site, plan.task, _dealt_source(holdout, holdout_seed, declared))
        found[site] = SimulatedHospital(config.model_copy(update={"allow": policy, "compute": first.compute}), mine)
    return found


def _one_again(parts: list[Loaded]) -> Loaded | None:
    """The records of one data set that had been shared out; an owner in several parts is one patient. None of no parts."""
    if not parts:
        return None
    whole = reduce(add, parts)
    if whole.owner is None:
        return whole
    owner = [name for part in parts for name in part.owner or ()]
    return replace(whole, records=replace(whole.records, patient=numbered(owner)), owner=owner)


def _site_file(source: Path, site: str) -> Path | None:
    folders = (source.parent / "sites", source.parent.parent / "sites", SITES)
    return next((folder / f"{site}.toml" for folder in folders if (folder / f"{site}.toml").is_file()), None)


def _read(file: Path | None, site: str, source: Path, plan: StudyPlan) -> SiteConfig:
    if file is None:
        raise ConfigError(f"no file {site}.toml for site {site} beside {source} (looked in sites/ and ../sites/)")
    config = SiteConfig.load(file)
    if config.site != site:
        raise ConfigError(f"{file}: site is {config.site!r}, wanted {site!r}")
    if plan.task not in config.data:
        raise ConfigError(f"{file}: has no [data.{plan.task}]")
    return config


def _config(site: str, task: str, source: DataSource) -> SiteConfig:
    allow = SitePolicy(
        tasks=(task,), epsilon_per_study=20.0, epsilon_lifetime=40.0, delta=1e-3, without_privacy=True, min_sites=1,
        min_patients=1,
    )  # fmt: skip
    return SiteConfig(site=site, allow=allow, data={task: source})


def _dealt_source(holdout: float, holdout_seed: int, declared: int) -> DataSource:
    return DataSource(
        loader="prepared", path=Path("records.safetensors"), declared_patients=declared, holdout=holdout,
        holdout_seed=holdout_seed,
    )  # fmt: skip


def _where(flags: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.flatnonzero(flags))


def _class_of_patient(records: Records) -> Tensor:
    """(patients,) what each patient is dealt out by: the class of one record, or whether a mask or box has anything in it."""
    label = records.label if records.label.dim() == 1 else records.label.flatten(1).any(1).long()
    found = torch.zeros(records.patients, dtype=torch.int64)
    found[records.patient.flip(0)] = label.flip(0)  # of the first
    return found


def _training_patients(loaded: Loaded, holdout: float) -> int:
    patients = loaded.records.patients
    if loaded.held_out is None:
        return patients - round(holdout * patients)
    return int(torch.unique(loaded.records.patient[~loaded.held_out]).numel())
