"""What must not work at a hospital, tried behind the import guard, in a process of its own; its arguments: STATE FOLDER MODULE.

Prints what was refused: "import", "program".
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

from wardround.client.network.guard import GuardedError, raise_guard


def main() -> None:
    """Raise the guard and try."""
    state, folder, module = sys.argv[1:]
    sys.path.insert(0, folder)
    raise_guard(Path(state))
    try:
        importlib.import_module(module)
    except GuardedError:
        print("import")
    try:
        subprocess.run([sys.executable, "--version"], capture_output=True, check=False)
    except GuardedError:
        print("program")


if __name__ == "__main__":
    main()
