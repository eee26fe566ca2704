"""What is sealed is read by whoever has the key, whole and as it was written, or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common import key_sources
from wardround.common.cli import main
from wardround.common.errors import ConfigError, VaultBroken
from wardround.common.key_sources import new_key_file
from wardround.common.sealed_file import CHUNK
from wardround.common.vault import Vault

ROOT = Path(__file__).resolve().parents[2]
PHRASE = b"seven hospitals and a bell\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vault")


@pytest.fixture(scope="module")
def vault(folder: Path) -> Vault:
    new_key_file(folder / "vault.key")
    return Vault.open(str(folder / "vault.key"))


def private(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(key_sources._SCRYPT, "n", 1 << 10)


# ---- there and back


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 17])
def test_any_size_comes_back(folder: Path, vault: Vault, size: int):
    data = os.urandom(size)
    vault.write(folder / "a.sealed", data, label="a")
    assert vault.read(folder / "a.sealed", label="a") == data
    assert b"".join(vault.stream(folder / "a.sealed")) == data
    assert vault.holds(folder / "a.sealed")


@given(st.lists(st.sampled_from([0, 1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK]), max_size=5))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_parts_come_back_as_one(folder: Path, vault: Vault, sizes: list[int]):
    parts = [os.urandom(size) for size in sizes]
    vault.write(folder / "b.sealed", *parts, label="b")
    assert vault.read(folder / "b.sealed") == b"".join(parts)


def test_nothing_of_the_plain_text_is_in_the_file_and_no_two_files_are_alike(folder: Path, vault: Vault):
    for name in ("c", "d"):
        vault.write(folder / name, b"weights" * 100, label="model")
    assert b"weights" not in (folder / "c").read_bytes()
    assert (folder / "c").read_bytes()[-716:] != (folder / "d").read_bytes()[-716:]
    assert (folder / "c").stat().st_mode & 0o777 == 0o600


def test_without_a_key_a_file_is_what_was_written(tmp_path: Path):
    Vault.none().write(tmp_path / "plain", b"ab", b"c", label="")
    assert (tmp_path / "plain").read_bytes() == b"abc" == Vault.none().read(tmp_path / "plain")
    assert not Vault.none().seals
    with pytest.raises(VaultBroken, match="none cannot be read: No such file"):
        Vault.none().read(tmp_path / "none")


# ---- what is refused


@given(st.integers(0, 10**9), st.integers(1, 255))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_one_changed_byte_anywhere_is_refused(folder: Path, vault: Vault, place: int, by: int):
    vault.write(folder / "e", b"", b"little", label="e")
    data = bytearray((folder / "e").read_bytes())
    data[place % len(data)] = (data[place % len(data)] + by) % 256
    (folder / "e").write_bytes(data)
    with pytest.raises(VaultBroken):
        vault.read(folder / "e")


def test_every_byte_of_the_header_is_vouched_for(folder: Path, vault: Vault):
    vault.write(folder / "h", b"little", label="label")
    whole = (folder / "h").read_bytes()
    for place in range(len(whole) - len(b"little") - 16):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        (folder / "h").write_bytes(data)
        with pytest.raises(VaultBroken):
            vault.read(folder / "h")


def chunks_of(path: Path, size: int) -> tuple[bytes, list[bytes]]:
    whole = path.read_bytes()
    body = size + 16 * max(1, -(-size // CHUNK))
    header, rest = whole[: len(whole) - body], whole[len(whole) - body :]
    return header, [rest[at : at + CHUNK + 16] for at in range(0, len(rest), CHUNK + 16)]


REARRANGED = {
    "two chunks swapped": lambda c: [c[1], c[0], c[2]],
    "a chunk twice": lambda c: [c[0], c[0], c[2]],
    "the last chunk cut off": lambda c: c[:2],
    "the first chunk cut off": lambda c: c[1:],
    "a chunk after the last": lambda c: [*c, c[0]],
    "the last chunk twice": lambda c: [*c, c[2]],
    "a byte after the last": lambda c: [*c, b"\0"],
    "half a chunk missing": lambda c: [*c[:2], c[2][:5]],
    "nothing but the header": lambda c: [],
}


@pytest.mark.parametrize("moved", REARRANGED.values(), ids=REARRANGED)
def test_chunks_cannot_be_moved_cut_or_added(folder: Path, vault: Vault, moved):
    size = 2 * CHUNK + 100
    vault.write(folder / "f", os.urandom(size), label="f")
    header, chunks = chunks_of(folder / "f", size)
    (folder / "f").write_bytes(header + b"".join(moved(chunks)))
    with pytest.raises(VaultBroken, match="f is damaged"):
        vault.read(folder / "f")


@pytest.mark.parametrize("size", [0, 5, CHUNK])
def test_nothing_may_follow_the_last_chunk(folder: Path, vault: Vault, size: int):
    vault.write(folder / "t", bytes(size), label="t")
    with (folder / "t").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(VaultBroken, match="t is damaged: its length"):
        vault.read(folder / "t")


def test_a_chunk_of_another_file_is_refused(folder: Path, vault: Vault):
    for name in ("i", "j"):
        vault.write(folder / name, b"the same words", label=name)
    (header, _), (_, other) = chunks_of(folder / "i", 14), chunks_of(folder / "j", 14)
    (folder / "i").write_bytes(header + other[0])
    with pytest.raises(VaultBroken, match="chunk 1 of 1 was changed"):
        vault.read(folder / "i")


@pytest.mark.parametrize("cut", [*range(0, 151, 10), 151])
def test_a_file_cut_short_is_refused(folder: Path, vault: Vault, cut: int):
    vault.write(folder / "k", b"words", label="k")
    (folder / "k").write_bytes((folder / "k").read_bytes()[:cut])
    with pytest.raises(VaultBroken):
        vault.read(folder / "k")


def test_a_header_that_claims_the_world_takes_no_memory(folder: Path, vault: Vault):
    vault.write(folder / "l", b"words", label="")
    data = bytearray((folder / "l").read_bytes())
    data[120:128] = b"\xff" * 8  # the size
    (folder / "l").write_bytes(data)
    with pytest.raises(VaultBroken, match="length is not what its header says"):
        vault.read(folder / "l")


def test_a_file_is_only_what_it_was_sealed_as(folder: Path, vault: Vault):
    vault.write(folder / "m", b"words", label="model")
    with pytest.raises(VaultBroken, match="m is sealed as 'model', not as 'checkpoint'"):
        vault.read(folder / "m", label="checkpoint")


@given(st.binary(max_size=300))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_anything_else_is_no_sealed_file(folder: Path, vault: Vault, data: bytes):
    for content in (data, b"WRSEAL1\n" + data):
        (folder / "n").write_bytes(content)
        with pytest.raises(VaultBroken):
            vault.read(folder / "n")


def test_what_makes_no_sense_is_an_error_of_the_caller(tmp_path: Path, vault: Vault):
    with pytest.raises(ValueError, match="a label of 256 bytes"):
        vault.write(tmp_path / "a", b"", label="x" * 256)
    vault.write(tmp_path / "a", b"", label="x" * 255)
    with pytest.raises(ValueError, match="a plain file needs no vault"):
        next(Vault.none().stream(tmp_path / "a"))
    with pytest.raises(ValueError, match="a vault with a key"):
        vault.hand_over(tmp_path / "a", Vault.none())
    assert not Vault.none().holds(tmp_path / "a")


def test_another_key_is_named_as_such(folder: Path, vault: Vault, tmp_path: Path):
    new_key_file(tmp_path / "other.key")
    vault.write(folder / "o", b"words", label="o")
    other = Vault.open(f"file:{tmp_path / 'other.key'}")
    assert not other.holds(folder / "o")
    with pytest.raises(VaultBroken, match="o is sealed with another key"):
        other.read(folder / "o")


# ---- where keys come from


def test_a_passphrase_opens_what_an_earlier_process_sealed(tmp_path: Path):
    source = f"passphrase:{private(tmp_path / 'phrase', PHRASE)}"
    Vault.open(source).write(tmp_path / "a", b"words", label="a")
    assert Vault.open(source).read(tmp_path / "a") == b"words"
    private(tmp_path / "phrase", b"seven hospitals and a drum\n")
    with pytest.raises(VaultBroken, match="another key"):
        Vault.open(source).read(tmp_path / "a")


def test_a_credential_of_systemd_is_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "wardround").write_bytes(bytes(range(32)))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    Vault.open("credential:wardround").write(tmp_path / "a", b"words", label="a")
    private(tmp_path / "same.key", bytes(range(32)))
    assert Vault.open(str(tmp_path / "same.key")).read(tmp_path / "a") == b"words"


def test_a_passphrase_goes_through_scrypt_at_full_strength(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert key_sources._SCRYPT == {"n": 1 << 17, "r": 8, "p": 1, "maxmem": 1 << 28}


BAD_KEYS = {
    "no such file": (None, 0, "cannot be read"),
    "empty": (b"", 0o600, ""),
    "too short": (b"x" * 31, 0o600, "wanted 32 random bytes"),
    "too long": (b"x" * 33, 0o600, "wanted 32 random bytes"),
    "open to the group": (b"x" * 32, 0o640, "mode"),
    "open to everybody": (b"x" * 32, 0o604, "mode"),
}


@pytest.mark.parametrize(("data", "mode", "said"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_key_that_is_none_is_refused(tmp_path: Path, data: bytes | None, mode: int, said: str):
    if data is not None:
        private(tmp_path / "vault.key", data, mode)
    with pytest.raises(ConfigError, match=rf"vault\.key.*{said}"):
        Vault.open(str(tmp_path / "vault.key"))


def test_a_link_or_a_folder_is_no_key(tmp_path: Path):
    private(tmp_path / "real", b"x" * 32)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("link", "."):
        with pytest.raises(ConfigError):
            Vault.open(str(tmp_path / name))


@pytest.mark.parametrize(("phrase", "said"), [(b"too short\n", "wanted at least 16"), (b"\xff" * 40, "not UTF-8")])
def test_a_weak_passphrase_is_refused(tmp_path: Path, phrase: bytes, said: str):
    with pytest.raises(ConfigError, match=said):
        Vault.open(f"passphrase:{private(tmp_path / 'phrase', phrase)}")


@pytest.mark.parametrize("name", ["../secret", "", "a/b", ".hidden", "none", "short"])
def test_a_credential_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "short").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x" * 32)
    with pytest.raises(ConfigError, match="CREDENTIALS_DIRECTORY is not set"):
        Vault.open(f"credential:{name}")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    with pytest.raises(ConfigError, match="credential:"):
        Vault.open(f"credential:{name}")


def test_a_vault_does_not_print_its_key(tmp_path: Path):
    private(tmp_path / "k", b"SECRETsecretSECRETsecretSECRETse")
    assert "SECRET" not in repr(Vault.open(str(tmp_path / "k")))


# ---- a full disk, a kill


def test_a_disk_that_fills_up_leaves_the_earlier_file(tmp_path: Path):
    code = """
import resource, signal, sys
from pathlib import Path
from wardround.common.vault import Vault
folder = Path(sys.argv[1])
vault = Vault.open(str(folder / "k"))
vault.write(folder / "a", b"before", label="a")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    vault.write(folder / "a", bytes(3 << 20), label="a")
except OSError as error:
    print(error.strerror)
"""
    new_key_file(tmp_path / "k")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "File too large"
    assert Vault.open(str(tmp_path / "k")).read(tmp_path / "a") == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "k"]


KILLED = """
import sys
from pathlib import Path
from wardround.common.vault import Vault
folder = Path(sys.argv[1])
one, two = Vault.open(str(folder / "one.key")), Vault.open(str(folder / "two.key"))
print("ready", flush=True)
number = 0
while True:
    number += 1
    one.write(folder / "a", number.to_bytes(8, "big") * (1 << 17), b"end", label="a")
    one.hand_over(folder / "a", two)
"""


def test_a_killed_writer_or_rotation_leaves_a_whole_file(tmp_path: Path):
    for name in ("one.key", "two.key"):
        new_key_file(tmp_path / name)
    vaults = [Vault.open(str(tmp_path / name)) for name in ("one.key", "two.key")]
    vaults[0].write(tmp_path / "a", bytes(1 << 20), b"end", label="a")
    for pause in range(6):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.01 + 0.007 * pause)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        (holder,) = (vault for vault in vaults if vault.holds(tmp_path / "a"))
        found = holder.read(tmp_path / "a", label="a")
        assert len(found) == (1 << 20) + 3
        assert found[:-3] == bytes(found[:8]) * (1 << 17)


# ---- rotation, and the command


@pytest.fixture
def wardround(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs `wardround vault ...` in this process: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["wardround", "vault", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            main()
        return int(done.value.code or 0), *capsys.readouterr()

    return run


def test_a_new_key_takes_over_and_the_old_one_opens_nothing(wardround, tmp_path: Path):
    assert wardround("new-key", "old.key") == (0, "old.key\n", "")
    private(tmp_path / "phrase", PHRASE)
    old = Vault.open(str(tmp_path / "old.key"))
    (tmp_path / "runs" / "deep").mkdir(parents=True)
    files = {tmp_path / "runs" / "a.sealed": b"", tmp_path / "runs" / "deep" / "b.sealed": os.urandom(CHUNK + 1)}
    for path, data in files.items():
        old.write(path, data, label=path.name)
    before = {path: chunks_of(path, len(data))[1] for path, data in files.items()}
    rotate = ("rotate", "runs", "--old", "old.key", "--new", "passphrase:phrase")
    assert wardround(*rotate)[:2] == (0, "2 of 2 sealed files now need the new key; the others already did.\n")
    new = Vault.open(f"passphrase:{tmp_path / 'phrase'}")
    for path, data in files.items():
        assert new.read(path, label=path.name) == data
        assert chunks_of(path, len(data))[1] == before[path]
        with pytest.raises(VaultBroken, match="another key"):
            old.read(path)
    old.write(tmp_path / "runs" / "a.sealed", b"as if interrupted", label="a.sealed")
    assert wardround(*rotate)[1].startswith("1 of 2")


def test_a_rotation_that_cannot_be_finished_is_not_begun(wardround, tmp_path: Path):
    for name in ("old.key", "new.key", "lost.key"):
        wardround("new-key", name)
    (tmp_path / "runs").mkdir()
    for key in ("lost", "old"):
        Vault.open(str(tmp_path / f"{key}.key")).write(tmp_path / "runs" / f"{key}.sealed", b"words", label="")
    code, _, err = wardround("rotate", "runs", "--old", "old.key", "--new", "new.key")
    assert code == 2
    assert "lost.sealed is sealed with neither key; nothing was changed" in err
    assert Vault.open(str(tmp_path / "old.key")).holds(tmp_path / "runs" / "old.sealed")
    (tmp_path / "empty").mkdir()
    assert wardround("rotate", "empty", "--old", "old.key", "--new", "new.key")[2] == "wardround: empty holds no sealed file\n"


def test_a_file_is_sealed_and_opened_by_hand(wardround, tmp_path: Path):
    wardround("new-key", "k")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert wardround("seal", "model.safetensors", "model.sealed", "--key", "k")[0] == 0
    assert Vault.open(str(tmp_path / "k")).read(tmp_path / "model.sealed", label="model.sealed") == b"weights"
    assert wardround("open", "model.sealed", "m", "--key", "k") == (0, "", "")
    assert (tmp_path / "m").read_bytes() == b"weights"
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o600


def test_nothing_is_written_over_and_nothing_of_a_damaged_file_comes_out(wardround, tmp_path: Path):
    wardround("new-key", "k")
    assert wardround("new-key", "k")[2] == "wardround: k exists and is not written over\n"
    Vault.open(str(tmp_path / "k")).write(tmp_path / "a", bytes(CHUNK), b"last", label="a")
    (tmp_path / "taken").touch()
    assert wardround("open", "a", "taken", "--key", "k")[2] == "wardround: taken exists and is not written over\n"
    data = bytearray((tmp_path / "a").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a").write_bytes(data)
    assert wardround("open", "a", "out", "--key", "k")[2] == "wardround: a is damaged: chunk 2 of 2 was changed\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "k", "taken"]
