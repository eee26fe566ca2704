"""A log says what was written into it, or it says where it does not."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wardround.common.audit_check import anchors_about, verify_log
from wardround.common.audit_log import AuditLog
from wardround.common.audit_records import digest_of, entries, line_of
from wardround.common.cli import main
from wardround.common.errors import AuditBroken
from wardround.common.trust.signing import Signed, Signer, verify

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    name: Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32) for seed, name in enumerate(("cork", "coordinator", "eve"))
}
CORK, COORDINATOR = Signer("cork", KEYS["cork"]), Signer("coordinator", KEYS["coordinator"])


def certificate(name: str, key: str = "") -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now, private = datetime.now(UTC), KEYS[key or name]
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(private.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    return builder.sign(private, None)


OF_CORK = certificate("cork")
CHILD = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from wardround.common.audit_log import AuditLog
from wardround.common.trust.signing import Signer
path, cork = Path(sys.argv[1]), Signer("cork", Ed25519PrivateKey.from_private_bytes(bytes(32)))
"""  # without pytest and hypothesis, which take a second to load


def written(path: Path, records: int = 5) -> tuple[int, str]:
    """A log of `records` after the one that says it was opened; its head."""
    with AuditLog.open(path, CORK, reserve=4096) as log:
        for number in range(records):
            log.add("round.done", study="a" * 64, round=number)
        return log.head


def events(path: Path) -> list[str]:
    with path.open("rb") as file:
        return [entry.event for entry in entries(file)]


# ---- what is written is there


def test_what_was_added_is_read_back_in_order(tmp_path: Path):
    with AuditLog.open(tmp_path / "audit.jsonl", CORK) as log:
        log.add("plan.approved", study="b" * 64, by="æøå \ud800", rounds=3, private=True, epsilon=0.5, loss=float("nan"))
        log.add("text.long", said="x" * 10_000)
        seq, digest = log.head
    lines = (tmp_path / "audit.jsonl").read_bytes().splitlines()
    body = json.loads(lines[1])["body"]
    assert body["body"] == {
        "study": "b" * 64, "by": "æøå ?", "rounds": 3, "private": True, "epsilon": 0.5, "loss": "nan",
    }  # fmt: skip
    assert (body["seq"], body["event"], body["prev"]) == (1, "plan.approved", digest_of(lines[0]))
    assert datetime.now(UTC) - datetime.fromisoformat(body["time"]) < timedelta(minutes=1)
    assert len(json.loads(lines[2])["body"]["body"]["said"]) == 500
    assert (seq, digest) == (2, digest_of(lines[2]))


def test_a_log_that_holds_says_what_it_is(tmp_path: Path):
    head = written(tmp_path / "audit.jsonl")
    head = written(tmp_path / "audit.jsonl", 2)
    found = verify_log(tmp_path / "audit.jsonl", OF_CORK, [head, head])
    assert (found.log, found.records, found.digest) == ("cork", 9, head[1])
    assert found.first <= found.last
    assert (found.signature_checked, found.anchors) == (True, 1)
    assert not verify_log(tmp_path / "audit.jsonl").signature_checked
    assert events(tmp_path / "audit.jsonl").count("log.opened") == 2


def test_every_record_is_signed_and_the_head_is_a_statement(tmp_path: Path):
    with AuditLog.open(tmp_path / "audit.jsonl", CORK) as log:
        log.add("round.done", round=1)
        head = log.sign_head()
        assert (head.body["seq"], head.body["digest"]) == log.head
        verify(head, OF_CORK)
        assert Signed.parse(head.text(), kind="audit-head") == head
        for line in (tmp_path / "audit.jsonl").read_text().splitlines():
            verify(Signed.parse(line, kind="audit"), OF_CORK)
        assert verify_log(tmp_path / "audit.jsonl", OF_CORK).records == 2  # while it is open


def test_a_renewed_key_vouches_for_what_the_old_one_wrote(tmp_path: Path):
    written(tmp_path / "audit.jsonl")
    with AuditLog.open(tmp_path / "audit.jsonl", Signer("cork", KEYS["eve"])) as log:
        log.add("key.renewed")
    assert verify_log(tmp_path / "audit.jsonl", certificate("cork", "eve")).records == 8
    with pytest.raises(AuditBroken, match="record 7, the last, is not signed with that certificate's key"):
        verify_log(tmp_path / "audit.jsonl", OF_CORK)


def test_a_log_without_a_signer_convinces_nobody(tmp_path: Path):
    with AuditLog.open(tmp_path / "audit.jsonl", None) as log:
        log.add("round.done", round=1)
        with pytest.raises(ValueError, match="no signed head"):
            log.sign_head()
    assert events(tmp_path / "audit.jsonl") == ["log.opened", "round.done"]
    with pytest.raises(AuditBroken, match="record 1, the last, is not signed"):
        verify_log(tmp_path / "audit.jsonl")


def test_threads_share_a_log(tmp_path: Path):
    with AuditLog.open(tmp_path / "audit.jsonl", CORK) as log:
        threads = [threading.Thread(target=lambda: [log.add("a") for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verify_log(tmp_path / "audit.jsonl", OF_CORK).records == 201


@pytest.mark.parametrize("event", ["", "Round", "a b", "a.", "a\n"])
def test_an_event_has_a_plain_name(tmp_path: Path, event: str):
    with AuditLog.open(tmp_path / "audit.jsonl", CORK) as log, pytest.raises(ValueError, match="no name of an event"):
        log.add(event)


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}, b"bytes"])
def test_a_record_holds_text_and_numbers(tmp_path: Path, value: object):
    with AuditLog.open(tmp_path / "audit.jsonl", CORK) as log, pytest.raises(TypeError, match="holds text and numbers"):
        log.add("event", value=value)  # type: ignore[arg-type]
    assert events(tmp_path / "audit.jsonl") == ["log.opened"]


# ---- edits are found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, tuple[int, str]]:
    path = tmp_path_factory.mktemp("log") / "audit.jsonl"
    head = written(path)
    return path, path.read_bytes(), head


def found_out(path: Path, data: bytes, anchors: list[tuple[int, str]], said: str = ".") -> None:
    path.write_bytes(data)
    with pytest.raises(AuditBroken, match=said):
        verify_log(path, OF_CORK, anchors)


@given(st.integers(0, 10**9), st.integers(1, 255))
@example(-1, 1)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_one_changed_byte_anywhere_is_found(whole, place: int, by: int):
    path, data, _ = whole
    edited = bytearray(data)
    edited[place % len(data)] = (edited[place % len(data)] + by) % 256
    found_out(path, bytes(edited), [])


@given(st.integers(0, 10**9))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_cut_at_any_byte_is_found_by_whoever_saw_the_head(whole, place: int):
    path, data, head = whole
    found_out(path, data[: place % len(data)], [head])


@given(st.integers(1, 10**9))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_a_cut_within_a_line_is_a_torn_line_to_everybody(whole, place: int):
    path, data, _ = whole
    cut = data[: place % len(data)]
    if not cut.endswith(b"\n"):
        found_out(path, cut, [], "torn" if b"\n" in cut else "no record")


EDITS: dict[str, Callable[[list[bytes], int, int], list[bytes]]] = {
    "deleted": lambda lines, i, j: lines[:i] + lines[i + 1 :],
    "twice": lambda lines, i, j: [*lines[: i + 1], *lines[i:]],
    "swapped": lambda lines, i, j: [lines[{i: j, j: i}.get(k, k)] for k in range(len(lines))],
    "moved": lambda lines, i, j: [*(rest := lines[:i] + lines[i + 1 :])[:j], lines[i], *rest[j:]],
    "replaced": lambda lines, i, j: [lines[j] if k == i else line for k, line in enumerate(lines)],
    "made up": lambda lines, i, j: [*lines[:i], b"{}\n", *lines[i:]],
    "an empty line": lambda lines, i, j: [*lines[:i], b"\n", *lines[i:]],
}


@given(st.sampled_from(sorted(EDITS)), st.integers(0, 5), st.integers(0, 5))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_lines_cannot_be_taken_out_put_in_or_moved(whole, edit: str, i: int, j: int):
    path, data, head = whole
    lines = data.splitlines(keepends=True)
    edited = b"".join(EDITS[edit](lines, i, j))
    if edited != data:
        found_out(path, edited, [head])


def test_the_first_bad_record_is_named(whole):
    path, data, head = whole
    lines = data.splitlines(keepends=True)
    found_out(path, b"".join([*lines[:3], *lines[4:]]), [], "record 3 is missing or out of order: record 4 stands there")
    found_out(path, data.replace(b'"round":1', b'"round":7'), [], "record 3 does not follow record 2: one of them was changed")
    found_out(path, data.replace(b'"round":1', b'"round":'), [], "record 2 is damaged")
    found_out(path, data.replace(b'"round":4', b'"round":9'), [], "record 5, the last, is not signed")
    found_out(path, b"".join(lines[:4]), [head], "the log ends with record 3, but others have seen record 5")
    found_out(path, b"", [], "the log holds no record")
    with pytest.raises(AuditBroken, match="No such file"):
        verify_log(path.with_name("none"))


def forged(records: int, signer: Signer | None) -> bytes:
    """A whole log that hangs together, written by somebody else."""
    lines, prev = [], "0" * 64
    for seq in range(records):
        facts = {"seq": seq, "time": "2026-01-01T00:00:00.000Z", "event": "log.opened", "body": {}, "prev": prev}
        lines.append(line_of(signer, facts))
        prev = digest_of(lines[-1])
    return b"".join(line + b"\n" for line in lines)


def test_a_log_written_anew_without_the_key_is_found(whole):
    path, data, _ = whole
    found_out(path, forged(9, None), [], "record 8, the last, is not signed: whoever wrote it could have written all of them")
    path.write_bytes(forged(9, None))
    with pytest.raises(AuditBroken, match="not signed"):
        verify_log(path)  # without a certificate, too
    found_out(path, forged(9, Signer("cork", KEYS["eve"])), [], "not signed with that certificate's key")
    found_out(path, data + forged(9, None), [])


def test_a_log_written_anew_with_the_key_is_found_by_whoever_saw_the_head(whole):
    path, _, head = whole
    found_out(path, forged(9, CORK), [head], "record 5 is not the one that others have seen: the log was rewritten")
    path.write_bytes(forged(9, CORK))
    assert verify_log(path, OF_CORK).records == 9  # nobody else was asked


def test_signers_do_not_mix(tmp_path: Path, whole):
    path, _, _ = whole
    facts = {"seq": 1, "time": "t", "event": "e", "body": {}, "prev": digest_of(forged(1, CORK)[:-1])}
    for other, said in ((COORDINATOR, "coordinator"), (None, "nobody")):
        found_out(
            path, forged(1, CORK) + line_of(other, facts) + b"\n", [], f"record 1 is signed by {said}, those before by cork"
        )
    (tmp_path / "audit.jsonl").write_bytes(forged(1, CORK))
    (tmp_path / "audit.jsonl").chmod(0o600)
    with pytest.raises(AuditBroken, match="belongs to another signer"):
        AuditLog.open(tmp_path / "audit.jsonl", COORDINATOR)


@given(st.binary(max_size=200))
@example(b'{"body":{},"kind":"audit","signature":"","signer":""}\n')
@example(b'[[["signature":"","signer":""}\n')
@example(b"[" * 100_000 + b'"signature":"","signer":""}\n')
@example(b'[1,"signature":"","signer":""}\n')
@settings(derandomize=True, deadline=None, max_examples=150)
def test_anything_else_is_no_log(whole, data: bytes):
    found_out(whole[0], data, [])
    found_out(whole[0], whole[1] + data + b"\n", [])


def test_a_line_without_end_takes_no_memory(whole):
    found_out(whole[0], whole[1] + b"x" * (2 << 20) + b"\n", [], "record 6 is longer than any record")


# ---- the other side's word


def test_each_side_holds_the_other_to_what_it_has_seen(tmp_path: Path):
    site, coordinator = tmp_path / "site.jsonl", tmp_path / "coordinator.jsonl"
    with AuditLog.open(coordinator, COORDINATOR) as log:
        for _ in range(3):
            log.anchor("cork", *written(site, 2))
            log.anchor("va", 7, "0" * 64)
    anchors = anchors_about("cork", coordinator)
    assert [seq for seq, _ in anchors] == [2, 5, 8]
    assert verify_log(site, OF_CORK, anchors).anchors == 3
    site.write_bytes(forged(20, CORK))
    with pytest.raises(AuditBroken, match="record 2 is not the one that others have seen"):
        verify_log(site, OF_CORK, anchors)


def test_two_logs_of_one_signer_are_not_taken_for_one_another(tmp_path: Path):
    heads = {}
    for study in ("a", "b"):
        with AuditLog.open(tmp_path / study, COORDINATOR, about=study) as log:
            log.add("round.done")
            heads[study] = log.head
    with AuditLog.open(tmp_path / "site", CORK) as log:
        for study, head in heads.items():
            log.anchor("coordinator", *head, about=study)
    assert anchors_about("coordinator", tmp_path / "site", about="b") == [heads["b"]]
    found = verify_log(tmp_path / "b", certificate("coordinator"), [heads["b"]])
    assert (found.log, found.about) == ("coordinator", "b")
    with pytest.raises(AuditBroken, match="record 1 is not the one that others have seen"):
        verify_log(tmp_path / "b", certificate("coordinator"), [heads["a"]])
    with pytest.raises(AuditBroken, match="the log is about something else"):
        AuditLog.open(tmp_path / "b", COORDINATOR, about="a")
    with pytest.raises(AuditBroken, match="holds no head of this log"):
        anchors_about("coordinator", tmp_path / "site")


def test_a_log_that_knows_nothing_of_the_other_is_no_witness(tmp_path: Path):
    written(tmp_path / "audit.jsonl")
    with pytest.raises(AuditBroken, match=r"audit\.jsonl holds no head of this log of va"):
        anchors_about("va", tmp_path / "audit.jsonl")
    with AuditLog.open(tmp_path / "audit.jsonl", CORK) as log:
        log.add("log.anchor", of="va", seq="1", digest="x")
    with pytest.raises(AuditBroken, match="without its number or digest"):
        anchors_about("va", tmp_path / "audit.jsonl")


# ---- crashes, kills, full disks


@given(st.integers(1, 10**9))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_a_torn_line_is_cut_off_and_written_down(whole, place: int):
    path, data, _ = whole
    last = len(data.splitlines(keepends=True)[-1])
    path.write_bytes(data[: len(data) - 1 - place % (last - 1)])
    path.chmod(0o600)
    with AuditLog.open(path, CORK, reserve=4096) as log:
        head = log.head
    assert events(path)[5:] == ["log.torn-line", "log.opened"]
    assert verify_log(path, OF_CORK, [head]).records == 7


def test_a_log_that_was_changed_is_not_written_on(whole):
    path, data, _ = whole
    path.write_bytes(data.replace(b'"round":1', b'"round":7'))
    path.chmod(0o600)
    with pytest.raises(AuditBroken, match="record 3 does not follow record 2"):
        AuditLog.open(path, CORK)


def test_a_log_has_one_writer(tmp_path: Path):
    with AuditLog.open(tmp_path / "audit.jsonl", CORK):
        command = [sys.executable, "-c", CHILD + "AuditLog.open(path, cork)", str(tmp_path / "audit.jsonl")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stderr.strip().endswith("AuditBroken: the log is open in another process")
    with AuditLog.open(tmp_path / "audit.jsonl", CORK):
        pass


@pytest.mark.parametrize("kind", ["link", "open to others", "folder", "pipe"])
def test_what_is_not_a_file_of_this_user_alone_is_refused(tmp_path: Path, kind: str):
    path = tmp_path / "audit.jsonl"
    written(tmp_path / "real")
    make = {
        "link": lambda: path.symlink_to(tmp_path / "real"),
        "open to others": lambda: (path.touch(), path.chmod(0o644)),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path, 0o600),
    }
    make[kind]()
    with pytest.raises(AuditBroken, match=r"symbolic|directory|this user alone"):
        AuditLog.open(path, CORK)


def test_a_new_log_is_its_owners_alone_whatever_the_umask(tmp_path: Path):
    before = os.umask(0)
    try:
        written(tmp_path / "audit.jsonl")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


KILLED = """
log = AuditLog.open(path, cork, reserve=4096)
while True:
    log.add("round.done", round=1)
    print(*log.head, flush=True)
"""


def test_what_others_were_told_survives_a_kill(tmp_path: Path):
    path, told = tmp_path / "audit.jsonl", []
    for pause in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD + KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(0.01 * pause)
        process.send_signal(signal.SIGKILL)
        lines += process.communicate()[0].splitlines(keepends=True)
        told += [(int(line.split()[0]), line.split()[1]) for line in lines if line.endswith("\n")]
    with AuditLog.open(path, CORK, reserve=4096):
        pass
    assert verify_log(path, OF_CORK, told).anchors == len(set(told))


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`small_disk(room)`: `room` bytes more fit into tmp_path; what is written after that is cut short, then refused."""
    real, allocate = os.write, os.posix_fallocate
    limit = [1 << 40]

    def left() -> int:
        return limit[0] - sum(path.stat().st_size for path in tmp_path.iterdir())

    def write(file: int, data: bytes) -> int:
        if left() <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data[: left()])

    def fallocate(file: int, start: int, length: int) -> None:
        if left() < length:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(file, start, length)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    return lambda room: limit.__setitem__(0, limit[0] - left() + room)


@pytest.mark.parametrize("room", [0, 1, 100, 300])
def test_on_a_full_disk_the_reserve_lets_the_refusal_be_written_down(tmp_path: Path, small_disk, room: int):
    path = tmp_path / "audit.jsonl"
    with AuditLog.open(path, CORK, reserve=4096) as log:
        assert log.has_room()
        small_disk(room)
        log.add("training.refused", why="no room on the disk")
        assert not log.has_room()
        assert events(path) == ["log.opened", "log.disk-full", "training.refused"]
        with pytest.raises(AuditBroken, match="No space left on device"):
            any(log.add("and.on") for _ in range(20))
        count = verify_log(path, OF_CORK, [log.head]).records
        small_disk(1 << 20)
        assert log.has_room()
        log.add("training.resumed")
    assert verify_log(path, OF_CORK).records == count + 1


def test_a_log_opens_on_a_full_disk_if_its_reserve_is_there(tmp_path: Path, small_disk):
    written(tmp_path / "audit.jsonl")
    small_disk(0)
    with AuditLog.open(tmp_path / "audit.jsonl", CORK, reserve=4096) as log:
        assert not log.has_room()
    assert events(tmp_path / "audit.jsonl")[-2:] == ["log.disk-full", "log.opened"]
    small_disk(0)
    with pytest.raises(AuditBroken, match="No space left on device"):
        AuditLog.open(tmp_path / "audit.jsonl", CORK, reserve=4096)
    assert verify_log(tmp_path / "audit.jsonl", OF_CORK).records == 8


REALLY_FULL = """
log = AuditLog.open(path, cork, reserve=16384)
try:
    with open(path.with_name("ballast"), "wb", buffering=0) as ballast:
        while ballast.write(bytes(512)):
            pass
except OSError:
    for _ in range(12):
        log.add("training.refused", why="x" * 300)
    print(log.has_room(), *[line.count(b"log.disk-full") for line in path.read_bytes().splitlines()])
"""


def test_a_disk_that_is_really_full(tmp_path: Path):
    inside = 'mount -t tmpfs -o size=64k none "$0" || exit 77; exec "$1" -c "$2" "$0/audit.jsonl"'
    command = ["unshare", "-rm", "sh", "-c", inside, str(tmp_path), sys.executable, CHILD + REALLY_FULL]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no disk of our own to fill: {done.stderr.strip()}")
    room, *full = done.stdout.split()
    assert (room, len(full), full.count("1")) == ("False", 14, 1), done.stderr


@pytest.mark.parametrize("sync", [False, True])
def test_a_disk_that_forgets_is_not_believed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool):
    log = AuditLog.open(tmp_path / "audit.jsonl", CORK, sync=sync)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(AuditBroken, match="Input/output error"):
            any((log.add("round.done"), log.head))
    if not sync:  # the record stands in the file, and whether it is on disk nobody knows
        for again in (lambda: log.head, lambda: log.add("round.done"), log.close):
            with pytest.raises(AuditBroken, match="open it anew"):
                again()
    else:
        assert events(tmp_path / "audit.jsonl") == ["log.opened"]
        log.close()
    with AuditLog.open(tmp_path / "audit.jsonl", CORK):
        pass
    verify_log(tmp_path / "audit.jsonl", OF_CORK)


def test_an_exception_between_writing_and_remembering_leaves_no_stray_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with AuditLog.open(tmp_path / "audit.jsonl", CORK) as log:
        with monkeypatch.context() as interrupted:
            real = os.write
            interrupted.setattr(os, "write", lambda *a: (real(*a), next(_ for _ in ()))[0])  # any exception will do
            with pytest.raises(StopIteration):
                log.add("round.done")
        log.add("round.done")
    assert verify_log(tmp_path / "audit.jsonl", OF_CORK).records == 2


def test_a_head_is_on_disk_before_anybody_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (synced.append(file), real(file))[1])
    with AuditLog.open(tmp_path / "audit.jsonl", CORK) as log:
        before = len(synced)
        log.add("a")
        assert len(synced) == before
        _ = log.head, log.head
        assert len(synced) == before + 1
    with AuditLog.open(tmp_path / "audit.jsonl", CORK, sync=True) as log:
        before = len(synced)
        log.add("a")
        assert len(synced) == before + 1


# ---- the command


@pytest.fixture
def wardround(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs `wardround audit-log ...` in this process: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["wardround", "audit-log", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            main()
        return int(done.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def two_sides(tmp_path: Path) -> tuple[int, str]:
    from cryptography.hazmat.primitives.serialization import Encoding

    head = written(tmp_path / "audit.jsonl")
    with AuditLog.open(tmp_path / "coordinator.jsonl", COORDINATOR) as log:
        log.anchor("cork", *head)
    (tmp_path / "cork.crt").write_bytes(OF_CORK.public_bytes(Encoding.PEM))
    return head


def test_the_command_says_what_it_checked(wardround, two_sides):
    code, out, err = wardround("verify", "audit.jsonl", "--certificate", "cork.crt", "--anchors", "coordinator.jsonl")
    assert (code, err) == (0, "")
    assert out.startswith("6 records of cork, ")
    assert f"The newest is number 5, digest {two_sides[1]}." in out
    assert "Its signature is genuine." in out
    assert "All 1 heads that the other side has written down are in it." in out
    code, out, _ = wardround("verify", "audit.jsonl")
    assert code == 0
    assert "Signatures were not checked: see --certificate." in out
    assert "Nobody else's word was asked: see --anchors." in out
    facts = json.loads(wardround("verify", "audit.jsonl", "--json")[1])
    assert (facts["records"], facts["signature_checked"]) == (6, False)


def test_the_command_refuses_with_exit_code_2(wardround, two_sides, tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    (tmp_path / "no.crt").write_text("no certificate")
    assert wardround("verify", "none.jsonl")[0] == 2
    assert "is no certificate in PEM" in wardround("verify", "audit.jsonl", "--certificate", "no.crt")[2]
    assert "none.crt cannot be read" in wardround("verify", "audit.jsonl", "--certificate", "none.crt")[2]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]))
    assert wardround("verify", "audit.jsonl", "--certificate", "cork.crt")[0] == 0  # nobody was asked
    code, out, err = wardround("verify", "audit.jsonl", "--anchors", "coordinator.jsonl", "--json")
    assert (code, out) == (2, "")
    assert err == "wardround: the log ends with record 3, but others have seen record 5: it was cut or restored\n"
    assert "holds no head of this log of cork" in wardround("verify", "audit.jsonl", "--anchors", "audit.jsonl")[2]


def test_the_newest_records_are_shown_up_to_the_first_broken_one(wardround, two_sides, tmp_path: Path):
    code, out, _ = wardround("show", "audit.jsonl", "--last", 2)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["4", "5"]
    assert out.splitlines()[1].endswith(f'round.done  round=4  study="{"a" * 64}"')
    path = tmp_path / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"round":2', b'"round":7'))
    code, out, err = wardround("show", "audit.jsonl")
    assert code == 2
    assert [line.split()[0] for line in out.splitlines()] == ["0", "1", "2", "3"]
    assert "record 4 does not follow record 3" in err
    assert wardround("show", "audit.jsonl", "--last", 0)[0] == 2


def test_what_a_stranger_wrote_cannot_move_the_cursor(wardround, tmp_path: Path):
    with AuditLog.open(tmp_path / "audit.jsonl", CORK) as log:
        log.add("reply.refused", why="\x1b[2J\nfake")
    out = wardround("show", "audit.jsonl")[1]
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2
