"""The sums that a site has begun, in a small file, so that none is begun twice: not even by a process that was started anew.

Of each run and round the newest attempt is kept. It is written down before the first key of a sum is made. Whoever could have
a sum done again would choose other survivors the second time, and the difference of the two sums is one site's update.
"""

from __future__ import annotations

import json
from pathlib import Path

from wardround.common.errors import SumAborted
from wardround.common.files import replace_atomically
from wardround.common.secure_sum.occasion import Occasion
from wardround.common.trust.signing import canonical

LARGEST_FILE = 1 << 24  # bytes


class Turns:
    """A site's file of begun sums. One process at a time may use it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def take(self, occasion: Occasion) -> None:
        """Write down that this sum is begun here, now.

        Raises:
            SumAborted: it was begun before, or a later attempt at its round was, or the file cannot be read or written.
        """
        taken = self._read()
        run, number = f"{occasion.study}/{occasion.run}", str(occasion.round)
        rounds = taken.setdefault(run, {})
        if occasion.attempt <= rounds.get(number, -1):
            raise SumAborted(f"the sum of round {number}, attempt {occasion.attempt}, was begun here before; this is a replay")
        rounds[number] = occasion.attempt
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_atomically(self._path, [canonical(taken)], mode=0o600)
        except OSError as error:
            raise SumAborted("this site cannot write down that the sum is begun", detail=str(error)) from None

    def _read(self) -> dict[str, dict[str, int]]:
        try:
            if self._path.stat().st_size > LARGEST_FILE:
                raise ValueError("it is too large")
            found = json.loads(self._path.read_bytes())
            if type(found) is not dict or not all(_is_rounds(rounds) for rounds in found.values()):
                raise ValueError("it is no list of sums")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            text = "this site cannot read which sums were begun here, so it begins none"
            raise SumAborted(text, detail=f"{self._path}: {error}") from None
        return found


def _is_rounds(value: object) -> bool:
    return type(value) is dict and all(type(attempt) is int for attempt in value.values())
