"""The command line: quick to help, plain about mistakes, honest exit codes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wardround.common import __version__
from wardround.common.cli import main
from wardround.common.errors import ConfigError
from wardround.common.studies import find_study
from wardround.simulations import SITES, STUDIES

VERBS = ("approve-plan", "check", "deidentify", "explain", "ledger", "sign", "simulate")


@pytest.fixture
def wardround(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["wardround", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main()
        code = done.value.code
        return code if isinstance(code, int) else 0, *capsys.readouterr()

    return run


def refused(outcome: tuple[int, str, str], *said: str) -> None:
    code, out, err = outcome
    assert code == 2, err
    assert out == ""
    assert err.startswith("wardround: ")
    assert "Traceback" not in err
    for text in said:
        assert text in err


def test_the_version_is_the_packages(wardround):
    assert wardround("--version") == (0, f"{__version__}\n", "")


def test_a_study_is_found_by_name_or_path(wardround):
    code, out, err = wardround("check", "heart-disease")
    assert (code, err) == (0, "")
    assert out.startswith("Study heart-disease: ")
    assert wardround("check", STUDIES / "heart-disease.toml") == (code, out, err)


@pytest.mark.parametrize("verb", ["check", "simulate"])
def test_an_unknown_study_is_refused_with_a_suggestion(wardround, verb: str):
    refused(wardround(verb, "heart-diseas"), "no study is called 'heart-diseas' (did you mean heart-disease?)")
    with pytest.raises(ConfigError, match=r"there are: .*heart-disease"):
        find_study("xyz")


@pytest.mark.parametrize("verb", ["check", "simulate", "ledger"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff\xfe", "is not UTF-8 text"), (b"a = [", "is not valid TOML"), (b"nme = 1", "nme: no such key")],
)
def test_a_bad_file_is_one_clear_message_and_exit_code_2(wardround, tmp_path: Path, verb: str, content: bytes, said: str):
    (tmp_path / "bad.toml").write_bytes(content)
    refused(wardround(verb, "bad.toml"), "bad.toml", said)
    assert not (tmp_path / "runs").exists()


def test_a_missing_file_is_named(wardround):
    refused(wardround("check", "none.toml"), "none.toml cannot be read: No such file")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--epsilon", 1, "--no-privacy"), "--epsilon and --no-privacy contradict each other"),
        (("--epsilon", "nan"), "privacy.epsilon: input should be a finite number"),
        (("--epsilon", -1), "privacy.epsilon: input should be greater than 0"),
        (("--epsilon", 0), "privacy.epsilon"),
        (("--rounds", 0), "rounds: input should be greater than or equal to 1"),
        (("--rounds", 10**9), "rounds"),
        (("--sites", 0), "--sites 0: wanted at least 1"),
        (("--sites", -3), "--sites -3: wanted at least 1"),
        (("--sites", 10_000), "there are only"),
        (("--partition", "zipf"), "--partition zipf: wanted iid, dirichlet:ALPHA or size:ALPHA"),
        (("--partition", "dirichlet:nan"), "is not a positive number"),
        (("--partition", "dirichlet:-1"), "is not a positive number"),
        (("--seed", -1), "--seed -1: wanted 0 or more"),
        (("--resume", "nowhere"), "is no run folder"),
    ],
    ids=str,
)
def test_an_option_that_makes_no_sense_starts_nothing(wardround, tmp_path: Path, options: tuple[object, ...], said: str):
    refused(wardround("simulate", "heart-disease", *options), said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [("--seeds", 0), ("--processes", 0), ("--rounds", "ten"), ("--colour",)], ids=str)
def test_what_typer_refuses_is_exit_code_2_too(wardround, options: tuple[object, ...]):
    code, _, err = wardround("simulate", "heart-disease", *options)
    assert code == 2
    assert "Traceback" not in err


def test_a_run_is_resumed_as_it_was_begun_or_not_at_all(wardround, tmp_path: Path):
    short = ("--rounds", 2, "--no-privacy", "--no-baselines", "-q")
    assert wardround("simulate", "heart-disease", *short)[:2] == (0, "runs/heart-disease/report.html\n")
    resume = ("simulate", "heart-disease", "--resume", "runs/heart-disease")
    for options in (("--epsilon", 1), ("--rounds", 3), ("--sites", 2), ("--partition", "iid"), ("--seed", 1), ("--no-privacy",),
                    ("--seeds", 3)):  # fmt: skip
        refused(wardround(*resume, *options), f"{options[0]}: ")
    (tmp_path / "other.toml").write_text(
        (STUDIES / "heart-disease.toml").read_text().replace('"heart-disease"\n', '"other"\n', 1)
    )
    refused(
        wardround("simulate", "other.toml", "--resume", "runs/heart-disease"), "this run is of study heart-disease, not other"
    )
    assert wardround(*resume, "-q")[0] == 0
    (tmp_path / "runs/heart-disease/settings.json").write_text("{")
    refused(wardround(*resume), "settings.json is missing or damaged")


def test_a_second_run_never_overwrites_the_first(wardround, tmp_path: Path):
    for _ in range(2):
        wardround("simulate", "heart-disease", "--rounds", 1, "--no-privacy", "--no-baselines", "-q")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["heart-disease", "heart-disease-2"]


def test_a_folder_that_cannot_be_written_is_named(wardround, tmp_path: Path):
    (tmp_path / "taken").write_text("a file")
    refused(wardround("simulate", "heart-disease", "--out", "taken"), "taken", "Not a directory")


def test_the_ledger_of_a_site_that_trained_nothing_is_empty(wardround):
    refused(wardround("ledger", SITES / "none.toml"), "cannot be read")


# ---- as a process


def started(*words: str, cwd: Path, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "wardround", *words],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=listening_to_ctrl_c,
        **options,
    )


def listening_to_ctrl_c() -> None:
    """A suite that runs in the background hands its children an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("words", [("--help",), *((verb, "--help") for verb in VERBS)], ids=" ".join)
def test_help_is_quick_and_imports_no_torch(words: tuple[str, ...], tmp_path: Path):
    code = (
        "import sys\nfrom wardround.common.cli import main\n"
        f"sys.argv = ['wardround', *{words!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'flwr', 'numpy', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Usage: " in done.stdout
    assert done.stderr == "heavy: []\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # of the processor, whoever else is busy


def test_python_dash_m_is_the_command(tmp_path: Path):
    process = started("--version", cwd=tmp_path)
    assert process.communicate()[0] == f"{__version__}\n"
    assert process.returncode == 0


def test_an_interrupted_run_says_so_and_can_be_resumed(tmp_path: Path):
    words = ("simulate", "heart-disease", "--no-baselines", "--no-privacy", "--rounds", "1000")
    process = started(*words, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    checkpoints = tmp_path / "runs" / "heart-disease" / "checkpoints"
    deadline = time.monotonic() + 60
    while not any(path.stem > "round-000002" for path in checkpoints.glob("round-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "wardround: interrupted; what was done is kept, see --resume" in err
    assert "Traceback" not in err
    assert list(checkpoints.glob("round-*.safetensors"))
