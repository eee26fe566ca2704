"""A study's report by the coordinator that ran it: what it knows itself, which is nothing about how good the model is."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from wardround.common.agreement import SignedStudy
from wardround.common.errors import ConfigError
from wardround.common.vault import Vault
from wardround.server.account import study_facts
from wardround.server.checkpoint import Progress
from wardround.server.federation import finished
from wardround.server.network.config import CoordinatorConfig
from wardround.server.network.shelf import STOPPED, Shelf, StudyFolder
from wardround.server.report import Report, write_report

_NOTES = (
    "The coordinator wrote this report. It has no patients to test the model on, so the report does not say how good the model "
    "is: each hospital can test the released model on patients of its own.",
    "Beside what is listed under what leaves a hospital, every reply over the network carries what makes it genuine: the "
    "hospital's signature, the digest of the order that it answers, and the number and hash of its newest audit record.",
)

log = logging.getLogger("wardround.coordinator")


def report_run(config: Path, wanted: str, out: Path | None = None) -> Path:
    """Write the report of a study, by its name, or by the beginning of its run's number. Returns the folder it is in.

    Raises:
        ConfigError: there is no such study, or it has no checkpoint yet.
        CheckpointBroken: none of its checkpoints can be read.
    """
    found = CoordinatorConfig.load(config)
    vault = found.opened_vault()
    folder = _wanted(Shelf(found.state), wanted, vault)
    target = out or folder.path
    write_report(target, study_report(folder, vault))
    return target


def leave_report(folder: StudyFolder, *, stopped: str = "", vault: Vault = Vault.none()) -> None:
    """Write the report of a study that is over into its folder; a study is not lost over a report that cannot be written."""
    try:
        write_report(folder.path, study_report(folder, vault, stopped=stopped))
    except Exception:
        log.exception("the report of %s could not be written", folder.name)


def study_report(folder: StudyFolder, vault: Vault = Vault.none(), *, stopped: str = "") -> Report:
    """The report from the newest checkpoint.

    Args:
        folder: of the study.
        vault: that sealed its checkpoints.
        stopped: why it ended, where the study's status does not say so yet.

    Raises:
        ConfigError: nothing was trained yet.
    """
    study = SignedStudy.load(folder.signed).study
    progress = _progress(folder, study.digest, vault)
    if progress is None:
        raise ConfigError(f"study {folder.name} has no checkpoint yet, so there is nothing to report")
    status = folder.status
    if not stopped and status is not None and status.state == STOPPED:
        stopped = status.why or "the operator stopped it"
    if not stopped and not finished(study.plan, progress):
        stopped = "it was still under way when this report was written"
    seconds = math.fsum(record.seconds for record in progress.history)
    facts: dict[str, Any] = study_facts(study, progress, stopped=stopped)
    facts |= {
        "results": {"federated": {}, "pooled": {}, "local": {}, "by_site": {}},
        "sites": {site: {"declared_patients": count, "test_patients": None} for site, count in study.plan.sites.items()},
        "seeds": None,
        "seconds": {"total": seconds, "training": seconds, "baselines": 0.0},
        "notes": [*_NOTES, *progress.start],
    }
    return Report.model_validate(facts)


def _wanted(shelf: Shelf, wanted: str, vault: Vault) -> StudyFolder:
    by_name = {study.name: study for study in shelf}
    if wanted in by_name:
        return by_name[wanted]
    runs = {}
    for study in by_name.values():
        progress = _progress(study, SignedStudy.load(study.signed).digest, vault)
        if progress is not None and progress.run.startswith(wanted):
            runs[progress.run] = study
    if len(runs) != 1:
        known = ", ".join(by_name) or "none"
        raise ConfigError(f"{wanted!r} is no study here, and {len(runs)} runs begin so; studies: {known}")
    return next(iter(runs.values()))


def _progress(folder: StudyFolder, digest: str, vault: Vault) -> Progress | None:
    return Progress.latest(folder.path / "checkpoints", study=digest, vault=vault)
