"""A hospital runs the code it installed. This guard backs that up, should anything else ever go wrong.

Once raised it cannot be lowered: nothing is imported that does not lie where Python and its packages were installed, and no
other program is started.
"""

from __future__ import annotations

import _posixsubprocess
import importlib.machinery
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_PROGRAMS = frozenset({"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"})


class GuardedError(ImportError):
    """Something was to be imported or started that this hospital did not install."""


class Guard(MetaPathFinder):
    """Stands before Python's own finders and looks at where a module would come from."""

    def __init__(self, roots: Sequence[Path], without: Path) -> None:
        self._roots = tuple(str(root) + "/" for root in roots)
        self._without = str(without) + "/"

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None, for the next finder to go on; raises `GuardedError` where the module lies elsewhere."""
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        for place in places:
            if place is None or place in ("built-in", "frozen", "namespace"):
                continue
            real = str(Path(place).resolve())
            if not (real + "/").startswith(self._roots) or real.startswith(self._without):
                raise GuardedError(f"{name} does not lie where this hospital's software was installed")
        return None


def installed() -> list[Path]:
    """Where Python and its packages lie, and wardround itself (which may be a checkout)."""
    found = {Path(path).resolve() for path in (*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix)}
    found.add(Path(__file__).resolve().parents[2])  # wardround itself, also where it is a checkout
    return sorted(found)


def raise_guard(state: Path) -> None:
    """Raise it for the rest of this process's life.

    Args:
        state: the site's state folder; what lies there is data, wherever it is.
    """
    sys.meta_path.insert(0, Guard(installed(), state.resolve()))
    sys.addaudithook(_no_programs)
    _posixsubprocess.fork_exec = _no_spawning  # what multiprocessing starts programs with, and no audit event tells


def _no_programs(event: str, arguments: tuple[object, ...]) -> None:
    if event in _PROGRAMS:
        raise GuardedError("this hospital's process starts no other program")


def _no_spawning(*given: object) -> int:
    raise GuardedError("this hospital's process starts no other program")
