"""What a process that goes on for long does first: be the only one, log to a file of its own, keep Flower to itself."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path

from wardround.common.errors import ConfigError

LOG_BYTES = 10 << 20  # of a service's log, which nobody clears away
_LOGS = 5


def quiet_flower(home: Path) -> None:
    """Keep Flower to itself; to be called before anything of it is imported: no telemetry, no updates, nothing in $HOME."""
    os.environ |= {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    for name in ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API"):  # older ways in
        os.environ.pop(name, None)


@contextlib.contextmanager
def alone(state: Path, verb: str, taken: str) -> Iterator[None]:
    """Hold a state folder, made where there is none; raises `ConfigError` with `taken` where another process of `verb` does."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state / f"{verb}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{state} is in use: {taken}") from None
        yield


@contextlib.contextmanager
def logging_to(path: Path, *, largest: int = 0) -> Iterator[None]:
    """What wardround logs goes into a file, not between the lines of a terminal.

    Args:
        path: the file; what is there stays.
        largest: bytes, beyond which a new one is begun and five old ones are kept; 0: never.
    """
    handler = RotatingFileHandler(path, maxBytes=largest, backupCount=_LOGS, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logger = logging.getLogger("wardround")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]
