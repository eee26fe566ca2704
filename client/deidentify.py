"""`wardround deidentify`: copies of DICOM pictures without the people in their headers."""

from __future__ import annotations

import contextlib
import csv
import os
import posixpath
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.common.errors import ConfigError, DataRefused

if TYPE_CHECKING:
    from pydicom import Dataset

PATIENCE = 2.0  # seconds without a progress bar


def deidentify(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A folder of DICOM files, or a DICOMDIR.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Where the copies go; must not exist, or be empty.")],
    key: Annotated[
        Path, typer.Option(help="The secret that pseudonyms follow from; made if it is not there. Never leaves the site.")
    ],
    labels: Annotated[Path | None, typer.Option(help="A CSV file about IN, rewritten to OUT/labels.csv.")] = None,
    file_column: Annotated[str, typer.Option(help="Its column that names files.")] = "file",
    column: Annotated[list[str] | None, typer.Option(help="A column of it to keep; may be given again. [label]")] = None,
    unreadable: Annotated[int, typer.Option(min=0, help="So many files that cannot be read are left out.")] = 0,
    pixels_seen: Annotated[
        bool, typer.Option("--pixels-seen", help="Somebody looked: no picture shows a name, a number or a face.")
    ] = False,
) -> None:
    """Write copies of DICOM pictures under pseudonyms, with nothing in their headers that points at a person.

    OUT appears when every copy is written and checked, or not at all. The same key gives a patient the same pseudonym.

    wardround deidentify raw clean --key hospital.key
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; nothing is written over")
    folder = source.parent if source.is_file() else source
    for one, other in ((source, target), (target, source), (key, target), (key, folder)):
        if one.resolve().is_relative_to(other.resolve()):
            raise ConfigError(f"{one} lies in {other}; IN, OUT and the key must lie apart")
    if not target.resolve().parent.is_dir():
        raise ConfigError(f"{target.parent} is not a folder")
    secret = read_key(key)
    with _terminable():
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.resolve().parent))
        try:
            summary = _copies(source, draft, secret, unreadable=unreadable, pixels_seen=pixels_seen)
            if not summary.names:
                raise DataRefused("there are no pictures to clean", detail=str(source))
            if labels is not None:
                lines = _write_labels(labels, draft / "labels.csv", file_column, column or ["label"], summary.names)
                print(f"labels.csv lists {lines} of them")
            if target.exists():
                target.rmdir()  # it is empty
            draft.rename(target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    print(f"{summary.written} pictures of {summary.patients} patients in {target}, checked; under the key {key}")
    for count, what in ((summary.other, "without a picture"), (summary.failed, "that cannot be read")):
        if count:
            print(f"{count} files {what} are left out")


def read_key(path: Path) -> bytes:
    """The 32 secret bytes in `path`, which only its owner may read; made from the system's randomness if it is not there.

    Raises:
        ConfigError: others may read it, or it holds something else.
    """
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} may be read by others, who could then undo the pseudonyms; chmod 600 {path}")
    try:
        secret = bytes.fromhex(path.read_text(encoding="ascii"))
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise ConfigError(f"{path} is no key of this command (64 hexadecimal digits)")
    return secret


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends it like an error, so that no half of the copies is left behind."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Undecided(DataRefused):
    """A file that can be read, and about which a person must decide."""


@dataclass
class _Summary:
    """What became of the files: new path by any name the labels may use, and how many were left out."""

    names: dict[str, str]
    patients: int = 0
    written: int = 0
    other: int = 0
    failed: int = 0


def _copies(source: Path, draft: Path, secret: bytes, *, unreadable: int, pixels_seen: bool) -> _Summary:
    from wardround.client.data.dicom import by_any_name, dicom_files, header_of, need_pydicom, read_dicom
    from wardround.client.data.dicom_pixels import has_picture
    from wardround.client.data.identifiers import quietly

    need_pydicom()
    root, files = dicom_files(source)
    headers, new, summary = [], {}, _Summary({})
    for path in _with_progress(files):
        try:
            dataset = read_dicom(path)
            with quietly():
                header = header_of(path, dataset)
                if header is None or not has_picture(dataset):
                    summary.other += 1
                    continue
                copy = _copy(path, dataset, draft, secret, pixels_seen)
        except (_Undecided, OSError):
            raise
        except Exception as error:  # values are decoded when they are looked at, and that may fail in many ways
            summary.failed += 1
            if summary.failed > unreadable:
                detail = f"{path}: {error if isinstance(error, DataRefused) else type(error).__name__}"
                raise DataRefused("more files cannot be read than --unreadable allows", detail=detail) from None
            continue
        headers.append(header)
        new[header.path] = copy.relative_to(draft).as_posix()
    summary.names = {name: new[header.path] for name, header in by_any_name(root, headers).items()}
    summary.patients, summary.written = len({path.split("/")[0] for path in new.values()}), len(new)
    return summary


def _copy(path: Path, dataset: Dataset, draft: Path, secret: bytes, pixels_seen: bool) -> Path:
    from wardround.client.data.cleaning import clean, write_clean

    try:
        cleaned = clean(dataset, secret, pixels_seen=pixels_seen)
        copy: Path = draft / cleaned.PatientID / f"{cleaned.SOPInstanceUID}.dcm"
        write_clean(cleaned, copy)
    except DataRefused as error:
        raise _Undecided(str(error), detail=f"{path}: {error.detail}") from None
    return copy


def _write_labels(labels: Path, target: Path, file_column: str, columns: Sequence[str], names: dict[str, str]) -> int:
    """The lines about copied files, with the copies' names and the chosen columns only; how many there are."""
    from wardround.client.data.lines import read_columns
    from wardround.client.policy import DataSource

    found = read_columns(DataSource(loader="dicom", path=labels), [file_column, *columns])
    count = 0
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *columns])
        for number, (_, name) in enumerate(found[file_column]):
            if copy := names.get(name, names.get(posixpath.normpath(name))):
                writer.writerow([copy, *(found[column][number][1] for column in columns)])
                count += 1
    return count


def _with_progress(files: Sequence[Path]) -> Iterator[Path]:
    """The same files; a bar on stderr once it takes more than two seconds."""
    from rich.console import Console
    from rich.progress import Progress

    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        bar = Progress(console=Console(stderr=True), transient=True)
        task = bar.add_task("cleaning", total=len(files))
        shown = False
        for path in files:
            if not shown and time.monotonic() - begin > PATIENCE:
                stack.enter_context(bar)
                shown = True
            yield path
            bar.advance(task)
