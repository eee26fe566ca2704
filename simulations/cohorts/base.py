"""What a data set must say to be shared out among simulated hospitals."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wardround.client.data.loaded import Loaded
from wardround.common.errors import ConfigError
from wardround.common.tasks import Task

EMBEDDED = Path(__file__).parent.parent / "data"
VARIABLE = "WARDROUND_DATA"


@dataclass(frozen=True)
class Gathered:
    """All records of a data set.

    Attributes:
        loaded: what the site's own loader found in the files.
        home: the hospital of each record.
    """

    loaded: Loaded
    home: list[str]


@dataclass(frozen=True)
class Cohort:
    """A data set that several hospitals hold.

    Attributes:
        name: the task its records are for.
        origin: what it is, by whom, under which licence, and where to get it.
        files: what must lie below the data folder; nothing where the records are embedded.
        read: the folder and the task -> all records.
        brought: the folder where an installed package brought the same files; None where there is none.
        holdout: share of each hospital's patients that is never trained on; 0 where the files bring their own split.
    """

    name: str
    origin: str
    files: tuple[str, ...]
    read: Callable[[Path, Task], Gathered]
    holdout: float = 0.25
    brought: Callable[[], Path | None] = lambda: None


def gather(cohort: Cohort, task: Task, data: Path | None) -> Gathered:
    """Read `cohort` below `data`, below the folder that WARDROUND_DATA names, or out of the package.

    Raises:
        ConfigError: its files are nowhere; says what is missing and how to get it.
        DataRefused: they do not fit the task.
    """
    if not cohort.files:
        return cohort.read(EMBEDDED, task)
    given = os.environ.get(VARIABLE)
    folder = data or (Path(given) if given else None)
    if folder is None and (package := cohort.brought()) is not None:
        return cohort.read(package, task)
    if folder is None:
        raise ConfigError(
            f"task {cohort.name} needs records that are not embedded: give --data DIR, or set {VARIABLE}, to a folder with "
            f"{', '.join(cohort.files)} in it. {cohort.origin}"
        )
    if missing := [name for name in cohort.files if not (folder / name).exists()]:
        raise ConfigError(f"{folder} has no {missing[0]}, which task {cohort.name} needs. {cohort.origin}")
    return cohort.read(folder, task)
