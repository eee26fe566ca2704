"""A process of one's own without the seconds that its imports would take: a fork of this one."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable


class Forked:
    """`act` in another process, to be used as a `subprocess.Popen` of text. What it says has to fit into a pipe."""

    def __init__(self, act: Callable[[], object]) -> None:
        (stdin, our_stdin), (our_stdout, stdout), (our_stderr, stderr) = os.pipe(), os.pipe(), os.pipe()

        def act_there() -> None:
            for number, end in enumerate((stdin, stdout, stderr)):
                os.dup2(end, number)
            os.closerange(3, 4096)  # or this process would keep its own standard input open, and other processes' too
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            act()

        self._process = multiprocessing.get_context("fork").Process(target=act_there)
        self._process.start()
        for end in (stdin, stdout, stderr):
            os.close(end)
        self.stdin, self.stdout, self.stderr = os.fdopen(our_stdin, "w"), os.fdopen(our_stdout), os.fdopen(our_stderr)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, given: str | None = None, timeout: float = 120) -> tuple[str, str]:
        """(stdout, stderr), once it has ended."""
        with self.stdout, self.stderr:
            with self.stdin:
                self.stdin.write(given or "")
            self._process.join(timeout)
            if self._process.exitcode is None:
                self._process.kill()
                self._process.join()
                raise TimeoutError(f"the process was still at work after {timeout:g} seconds")
            return self.stdout.read(), self.stderr.read()
