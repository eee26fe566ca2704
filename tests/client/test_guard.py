"""Once the guard is up, nothing is imported that this hospital did not install, and no other program is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import sys
from pathlib import Path
from wardround.client.network.guard import GuardedError, raise_guard
state = Path(sys.argv[1])
sys.path.insert(0, str(state))
sys.path.insert(0, str(state.parent / "elsewhere"))
raise_guard(state)
def refused(act):
    try:
        act()
    except GuardedError as error:
        print("refused:", error)
    else:
        print("LET THROUGH")
"""
EVIL = "from pathlib import Path; Path(__file__).with_name('ran').write_text('')\n"


def guarded(tmp_path: Path, script: str, expected: int = 0) -> list[str]:
    """What a process says that raised the guard and then ran `script`."""
    state, elsewhere = tmp_path / "state", tmp_path / "elsewhere"
    for folder in (state, elsewhere, state / "bundle", elsewhere / "plain"):
        folder.mkdir(exist_ok=True)
    for file in (state / "evil.py", elsewhere / "evil2.py", state / "bundle" / "__init__.py", elsewhere / "plain" / "evil3.py"):
        file.write_text(EVIL)
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script, str(state)], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert done.returncode == expected, done.stderr
    assert not list(tmp_path.rglob("ran"))
    return done.stdout.splitlines()


def test_what_lies_elsewhere_is_not_imported(tmp_path: Path):
    script = "import importlib\nfor name in ('evil', 'evil2', 'bundle', 'bundle.x', 'plain', 'plain.evil3'):\n"
    said = guarded(tmp_path, script + "    refused(lambda: importlib.import_module(name))")
    assert len(said) == 6
    assert all(line.endswith("does not lie where this hospital's software was installed") for line in said), said


def test_a_state_folder_inside_the_software_is_still_data(tmp_path: Path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "evil4.py").write_text(EVIL)
    script = (
        "import wardround.client.network.guard as guard\n"
        "sys.meta_path.insert(0, guard.Guard([state.parent], state.parent / 'site'))\n"
        "sys.meta_path.pop(1)\nsys.path.insert(0, str(state.parent / 'site'))\n"
        "def act():\n    import evil4\nrefused(act)"
    )
    assert guarded(tmp_path, script)[0].startswith("refused: evil4")


def test_a_link_from_an_installed_place_leads_nowhere(tmp_path: Path):
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "evil5.py").symlink_to(tmp_path / "elsewhere" / "evil2.py")
    script = (
        "import wardround.client.network.guard as guard\n"
        "sys.meta_path[0] = guard.Guard([*guard.installed(), state.parent / 'installed'], state)\n"
        "sys.path.insert(0, str(state.parent / 'installed'))\ndef act():\n    import evil5\nrefused(act)"
    )
    assert guarded(tmp_path, script)[0].startswith("refused: evil5")


@pytest.mark.parametrize("act", [
    "subprocess.Popen(['true'])", "subprocess.run(['true'])", "subprocess.run('true', shell=True)", "os.system('true')",
    "os.popen('true')", "os.execv('/bin/true', ['true'])", "os.posix_spawn('/bin/true', ['true'], {})",
    "multiprocessing.get_context('spawn').Process(target=print).start()",
    "pty.spawn('/bin/true')",
])  # fmt: skip
def test_no_other_program_is_started(tmp_path: Path, act: str):
    said = guarded(tmp_path, f"import multiprocessing, os, pty, subprocess\nrefused(lambda: {act})")
    assert said == ["refused: this hospital's process starts no other program"]


def test_a_child_that_would_become_another_program_does_not(tmp_path: Path):
    target = tmp_path / "started"
    script = f"import os\nprint(os.spawnv(os.P_WAIT, '/usr/bin/touch', ['touch', {str(target)!r}]) != 0)"
    assert guarded(tmp_path, script) == ["True"]
    assert not target.exists()


@pytest.mark.slow  # imports torch
def test_what_was_installed_is_imported_when_it_is_needed_and_training_goes_on(tmp_path: Path):
    script = (
        "import colorsys, sqlite3, xml.etree.ElementTree\nimport numpy.fft, safetensors.torch, torch.nn.utils.rnn\n"
        "import wardround.client.app\nimport wardround.common.tasks\nlayer = torch.nn.Linear(3, 1)\n"
        "step = torch.optim.SGD(layer.parameters(), 0.1)\n"
        "layer(torch.ones(2, 3)).sum().backward()\nstep.step()\ntorch.svd(torch.eye(3))\n"
        "try:\n    import no_such_module_anywhere\nexcept ModuleNotFoundError:\n    print('absent')"
    )
    assert guarded(tmp_path, script) == ["absent"]
