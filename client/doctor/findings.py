"""What a check is, what it finds, and how checks are gone through: where one fails, those that need it are left out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from wardround.client.policy import SiteConfig
from wardround.common.agreement import SignedStudy
from wardround.common.config import read_text
from wardround.common.errors import ConfigError, DataRefused, WardroundError
from wardround.common.plan import SignedText
from wardround.common.trust.addresses import address
from wardround.common.trust.site_folder import SiteFolder

Level = Literal["ok", "note", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        level: "fail" where something will not work, "warn" where it soon may not.
        text: why; it may be sent to support, so it holds no path, no name of a machine but the coordinator's, no number of
            patients.
        do: what to do about it; may be sent as well.
        local: for this console only.
    """

    level: Level
    text: str
    do: str = ""
    local: str = ""


class Unwell(Exception):
    """Raised by a check that ends early, with what it found."""

    def __init__(self, text: str, do: str = "", local: str = "", level: Level = "fail") -> None:
        super().__init__(text)
        self.finding = Finding(level, text, do, local)


@dataclass(frozen=True)
class Case:
    """The site that is looked at."""

    path: Path
    config: SiteConfig
    plan: Path | None = None

    @property
    def folder(self) -> SiteFolder:
        """Its keys and whom it trusts."""
        return SiteFolder(self.config.site, self.config.state)

    @property
    def coordinator(self) -> tuple[str, int]:
        """Host and port; raises `ConfigError` where the site is not enrolled and its file names none."""
        return address(self.config.network.coordinator or self.folder.enrolment().coordinator)

    @cached_property
    def study(self) -> SignedText:
        """The plan to look at, from a plan's TOML or a signed study; raises `ConfigError`."""
        assert self.plan is not None
        if read_text(self.plan, 8 << 20).lstrip().startswith("{"):
            return SignedStudy.load(self.plan).study
        return SignedText.load(self.plan)


@dataclass(frozen=True)
class Check:
    """One line of the list.

    Attributes:
        needs: names of checks without which this one means nothing.
        seconds: it may take; then it is given up.
        late: what it means when it does not come to an end.
    """

    name: str
    look: Callable[[Case], Finding]
    needs: tuple[str, ...] = ()
    seconds: float = 10.0
    late: Level = "fail"


def examine(
    checks: Sequence[Check],
    case: Case,
    *,
    begun: Callable[[str], None] = lambda name: None,
    done: Callable[[str, Finding], None] = lambda name, finding: None,
) -> dict[str, Finding]:
    """All findings by the names of their checks; `begun` and `done` are told as it goes on."""
    found: dict[str, Finding] = {}
    for check in checks:
        begun(check.name)
        missing = [name for name in check.needs if name in found and found[name].level in ("fail", "skip")]
        if missing:
            found[check.name] = Finding("skip", f"not looked at, because of: {', '.join(missing)}")
        else:
            found[check.name] = _within(check, case)
        done(check.name, found[check.name])
    return found


def _within(check: Check, case: Case) -> Finding:
    """The finding, or that there is none in time; what hangs in a system call is left behind."""
    found: list[Finding] = []
    thread = threading.Thread(target=lambda: found.append(_looked(check, case)), daemon=True)
    thread.start()
    thread.join(check.seconds)
    return found[0] if found else Finding(check.late, f"not over after {check.seconds:g} s")


def _looked(check: Check, case: Case) -> Finding:
    try:
        return check.look(case)
    except Unwell as unwell:
        return unwell.finding
    except ConfigError as error:  # quotes a file
        return Finding("fail", "a file or a setting is not as it must be", local=str(error))
    except DataRefused as error:  # says something about records
        return Finding("fail", "the records do not fit", local=f"{error}{f' ({error.detail})' if error.detail else ''}")
    except WardroundError as error:
        return Finding("fail", str(error), local=error.detail or "")
    except OSError as error:
        return Finding("fail", f"the system says: {error.strerror or type(error).__name__}", local=str(error))
    except Exception as error:
        return Finding("fail", f"the check itself failed ({type(error).__name__})", "send the bundle to support", str(error))
