"""What is sent to support: results, versions and the newest lines of our own log, with everything else taken out."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from wardround.client.doctor.findings import Case, Finding
from wardround.common.errors import ConfigError
from wardround.common.trust.addresses import written
from wardround.common.trust.private_files import replace_private

_PACKAGES = ("wardround", "flwr", "torch", "opacus", "cryptography", "httpx", "numpy", "pydantic")
_LINES = 50
_TAIL = 1 << 16  # bytes of the log that are looked at
_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (?P<logger>wardround[.\w]*) (?P<level>[A-Z]+) (?P<text>.*)")
_OUT = (  # what is taken out, in this order
    (re.compile(r"https?://\S+"), "[address]"),
    (re.compile(r"\b[\w.+-]+@[\w-]+(\.[\w-]+)*"), "[address]"),
    (re.compile(r"\S*/\S*"), "[path]"),
    (re.compile(r"\b[A-Za-z]:\\\S*"), "[path]"),
    (re.compile(r"\btoken-[0-9a-f]+"), "[secret]"),
    (re.compile(r"(?<![\w.])(\d{1,3}\.){3}\d{1,3}(:\d+)?"), "[address]"),
    (re.compile(r"(?i)\[?(?<![\w:])([0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}\]?(?![\w:])"), "[address]"),
    (re.compile(r"\b[\w-]*[A-Za-z_][\w-]*(\.[\w-]+)+(:\d+)?"), "[name]"),  # of a machine, a file or a key
    (re.compile(r"\b\w{24,}\b"), "[long]"),
)


def write_bundle(path: Path, case: Case, found: Mapping[str, Finding]) -> None:
    """Write the bundle, readable by this user alone; `Finding.local` is not in it."""
    coordinator = _coordinator(case)
    body = {
        "format": "wardround support bundle 1",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "site": case.config.site,
        "coordinator": coordinator,
        "system": {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()},
        "versions": dict(_versions()),
        "checks": [
            {"check": name, "level": one.level, "text": redacted(one.text, coordinator), "do": one.do}
            for name, one in found.items()
        ],
        "log": _log(case.config.state / "site.log", coordinator),
    }
    replace_private(path, (json.dumps(body, indent=1) + "\n").encode())


def redacted(text: str, keep: str = "") -> str:
    """`text` without paths, addresses, names of machines and files, and secrets; `keep`, and its host, stay.

    >>> redacted("fl.example.org:443 and ris.example.org read /data/a.csv", "fl.example.org:443")
    'fl.example.org:443 and [name] read [path]'
    """
    kept = [one for one in (keep, keep.rpartition(":")[0]) if one]
    parts = re.split(f"((?<![\\w.-])(?:{'|'.join(map(re.escape, kept))})(?![\\w.-]))", text) if kept else [text]
    return "".join(part if position % 2 else _without(part) for position, part in enumerate(parts))


def _without(text: str) -> str:
    for pattern, instead in _OUT:
        text = pattern.sub(instead, text)
    return text


def _log(path: Path, keep: str) -> list[str]:
    """The newest lines of our own loggers, without what follows in brackets or quotes, and without numbers.

    What is in brackets is the detail that never leaves a site; a line that goes on below is the trace of an error, and may hold
    anything.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [found for found in map(_LINE.fullmatch, text.splitlines()) if found]
    return [f"{line['time']} {line['level']} {_plain(line['text'], keep)}" for line in lines[-_LINES:]]


def _plain(text: str, keep: str) -> str:
    text = re.sub(r"""(['"]).*""", "[quoted]", text.split(" (")[0])
    return re.sub(r"(?<![\w.:\[-])\d[\d.,]*(?![\w.:-])", "#", redacted(text, keep))


def _versions() -> list[tuple[str, str]]:
    found = []
    for package in _PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            found.append((package, "not installed"))
    return found


def _coordinator(case: Case) -> str:
    try:
        return written(*case.coordinator)
    except ConfigError:
        return ""
