"""The studies of a coordinator, as folders: what was asked for, where each stands, and what it has made.

    state/studies/NAME/
      study.signed     the plan and its signatures
      start.weights    the public weights that the plan names, where it names any
      wish             "run" or "stop", as the operator last said
      status.json      where it stands, written by whoever works on it
      checkpoints/  model.safetensors  report.html ...

Files are the whole interface between `wardround start`, `stop` and `status` and the process that serves: who may write
into the folder is the operator, and a restart finds everything where it was.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wardround.common.errors import ConfigError
from wardround.common.files import write_atomically

WAITING, RUNNING, FINISHED, STOPPED = "waiting", "running", "finished", "stopped"


@dataclass(frozen=True)
class Status:
    """Where a study stands.

    Attributes:
        state: waiting (its turn, or its sites), running, finished or stopped.
        why: of a state that needs a reason.
        rounds: all that are planned.
        round: the last one that is on disk.
        connected: the plan's sites that are there.
        last: the newest round in the words of its record.
    """

    study: str
    digest: str
    state: str = WAITING
    why: str = ""
    rounds: int = 0
    round: int = 0
    sites: list[str] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    updated: float = 0.0


class StudyFolder:
    """One study on the shelf."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name

    @property
    def signed(self) -> Path:
        """The plan and its signatures."""
        return self.path / "study.signed"

    @property
    def weights(self) -> Path:
        """The file of public weights that the plan names, where it names one."""
        return self.path / "start.weights"

    @property
    def wish(self) -> str:
        """What the operator wants: "run", "stop", or "" where nobody has said."""
        with contextlib.suppress(OSError):
            return (self.path / "wish").read_text().strip()
        return ""

    def want(self, wish: str) -> None:
        """Say what is to happen; whoever serves notices within a second."""
        write_atomically(self.path / "wish", wish.encode())

    @property
    def asked_at(self) -> float:
        """When the wish was said: the queue's order."""
        with contextlib.suppress(OSError):
            return (self.path / "wish").stat().st_mtime
        return 0.0

    @property
    def status(self) -> Status | None:
        """Where it stands; None before anybody has written it down."""
        try:
            return Status(**json.loads((self.path / "status.json").read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{self.path / 'status.json'} cannot be read ({type(error).__name__})") from None

    def write(self, status: Status) -> None:
        """Write down where it stands."""
        text = json.dumps(asdict(replace(status, updated=time.time())))
        write_atomically(self.path / "status.json", text.encode())


class Shelf:
    """All studies of a coordinator."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "studies"

    def __iter__(self) -> Iterator[StudyFolder]:
        """Every study that was put here, the one asked for first, first."""
        found = [StudyFolder(path) for path in self.folder.glob("*") if (path / "study.signed").is_file()]
        return iter(sorted(found, key=lambda study: (study.asked_at, study.name)))

    def study(self, name: str) -> StudyFolder:
        """The study of that name; raises `ConfigError` where there is none."""
        found = StudyFolder(self.folder / name)
        if not found.signed.is_file():
            known = ", ".join(study.name for study in self) or "none"
            raise ConfigError(f"there is no study {name!r} in {self.folder}; there are: {known}")
        return found

    def put(self, name: str, digest: str, signed: str) -> StudyFolder:
        """Put a signed study on the shelf; the same one again only renews its signatures.

        Raises:
            ConfigError: another plan has this name.
        """
        found = StudyFolder(self.folder / name)
        found.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = found.status
        if status is not None and status.digest != digest:
            raise ConfigError(
                f"{found.path} holds another plan of this name (digest {status.digest[:12]}); give this study a new name"
            )
        write_atomically(found.signed, signed.encode())
        if status is None:
            found.write(Status(name, digest))
        return found
