"""Peak memory of a process and all it forked, shared pages counted once (PSS), read from /proc. Linux only."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

_PAUSE = 0.02  # seconds between two looks


def peak(process: subprocess.Popen[bytes]) -> int:
    """Bytes at the highest moment; returns when `process` has ended."""
    highest = 0
    while process.poll() is None:
        highest = max(highest, sum(_pss(pid) for pid in _family(process.pid)))
        time.sleep(_PAUSE)
    return highest


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in _family(int(child)))]


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
