"""DICOM files: a folder, or a DICOMDIR and what it lists. No picture is opened before every header is free of identifiers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wardround.client.data.annotations import Listed, read_labels
from wardround.client.data.dicom_pixels import shown
from wardround.client.data.identifiers import PRIVATE, identifiers, is_placeholder, quietly
from wardround.client.data.image_files import Found, data_folder, gather, image_schema, inside, target_of
from wardround.client.data.loaded import Loaded
from wardround.client.policy import DataSource
from wardround.common.errors import ConfigError, DataRefused
from wardround.common.tasks import Task

if TYPE_CHECKING:
    from pydicom import Dataset

LARGEST_DICOM = 1 << 30  # bytes
_DIRECTORY = "1.2.840.10008.1.3.10"  # the SOP class of a DICOMDIR
_DEFLATED = "1.2.840.10008.1.2.1.99"


@dataclass(frozen=True)
class Header:
    """What is needed of a header before its pixels may be read."""

    path: Path
    uid: str
    patient: str


def load_dicom(source: DataSource, task: Task) -> Loaded:
    """Read the files of `source.path` that `source.labels` lists by path, SOPInstanceUID or file name.

    A record's patient is its PatientID, or the `patient_column` of the labels where that is set.

    Raises:
        DataRefused: a header still holds identifiers, or the files cannot be read or do not fit; the detail names the file.
        ConfigError: pydicom is not installed, or `allow_identifiers` holds no DICOM keyword.
    """
    schema = image_schema(source, task)
    check_keywords(source.allow_identifiers)
    root, files = dicom_files(source.path)
    known = by_any_name(root, _headers(files, source.allow_identifiers))
    readable = {header.path for header in known.values()}
    found: dict[Path, Found] = {}
    for entry in read_labels(source, schema):
        path = inside(root, entry.file, entry.where)
        header = known.get(path.relative_to(root).as_posix()) or known.get(entry.file)
        path = header.path if header else path
        if path in found:
            raise DataRefused("the labels list a file twice", detail=entry.where)
        found[path] = Found(path, target_of(schema, root, entry), _patient(entry, header))

    def read(path: Path) -> NDArray[np.float32]:
        dataset = read_dicom(path)
        if path not in readable:
            raise DataRefused("a DICOM file cannot be read", detail="its header cannot be decoded, or it has none")
        return shown(dataset, schema)

    return gather(source, schema, list(found.values()), read)


def check_keywords(allowed: Collection[str]) -> None:
    """Refuse `allow_identifiers` that would do nothing; raises `ConfigError`."""
    need_pydicom()
    from pydicom.datadict import repeater_has_keyword, tag_for_keyword

    known = (PRIVATE, *(name for name in allowed if tag_for_keyword(name) is not None or repeater_has_keyword(name)))
    if wrong := [name for name in allowed if name not in known]:
        raise ConfigError(f"allow_identifiers: {wrong[0]!r} is no DICOM keyword (such as PatientName) and not {PRIVATE}")


def dicom_files(place: Path) -> tuple[Path, list[Path]]:
    """The folder, and every DICOM file in it, sorted; of a DICOMDIR itself and those that it lists.

    Raises:
        DataRefused: no folder, or a file lies outside of it.
    """
    if place.is_file():
        place = place.resolve()
        return place.parent, list(dict.fromkeys([place, *_of_directory(place.parent, place)]))
    root = data_folder(place)
    found = [inside(root, str(path), str(path)) for path in sorted(root.rglob("*")) if path.is_symlink() or path.is_file()]
    return root, [path for path in dict.fromkeys(found) if path.is_file() and _is_dicom(path)]


def read_dicom(path: Path, *, pixels: bool = True) -> Dataset:
    """One file; without `pixels` large values stay on disk until they are asked for.

    Raises:
        DataRefused: it cannot be read.
    """
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info

    try:
        if not path.is_file():
            raise DataRefused("a listed file is not there")
        if path.stat().st_size > LARGEST_DICOM:
            raise DataRefused("a file is empty or too large", detail="wanted at most 1 GiB")
        with quietly():
            if read_file_meta_info(path).get("TransferSyntaxUID") == _DEFLATED:
                raise DataRefused("a DICOM file is deflated", detail="nobody knows how large it is before it is in memory")
            return dcmread(path, defer_size=None if pixels else 1 << 16)
    except DataRefused:
        raise
    except Exception as error:  # damage ends in a dozen kinds of exceptions
        raise DataRefused("a DICOM file cannot be read", detail=type(error).__name__) from None


def need_pydicom() -> None:
    """Raises `ConfigError` where it is not installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise ConfigError("DICOM files need pydicom: pip install 'wardround[dicom]'") from None


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _of_directory(root: Path, path: Path) -> list[Path]:
    """The files that a DICOMDIR lists (PS3.3 F.3); raises `DataRefused`."""
    try:
        entries = [entry.get("ReferencedFileID") for entry in read_dicom(path).get("DirectoryRecordSequence", [])]
        names = ["/".join([name] if isinstance(name, str) else name) for name in entries if name]
    except DataRefused:
        raise
    except Exception as error:
        raise DataRefused("a DICOM file cannot be read", detail=f"{path}: {type(error).__name__}") from None
    if not names:
        raise DataRefused("the DICOM directory lists no files", detail=str(path))
    return [inside(root, name, str(path)) for name in names]


def by_any_name(root: Path, headers: Iterable[Header]) -> dict[str, Header]:
    """Headers by path in `root`, by SOPInstanceUID, and by file name where only one file has it, readable or not.

    A name that is the path of a file is that file's alone: a damaged file's label must not go to another patient's picture.

    Raises:
        DataRefused: two files hold the same object.
    """
    by_name: dict[str, Header] = {}
    by_uid: dict[str, Header] = {}
    by_path: dict[str, Header] = {}
    for header in headers:
        if (other := by_uid.get(header.uid)) is not None:
            raise DataRefused("two files hold the same DICOM object", detail=f"{other.path} and {header.path}")
        by_uid[header.uid] = header
        by_path[header.path.relative_to(root).as_posix()] = header
        by_name[header.path.name] = header
    count = Counter(path.name for path in root.rglob("*") if path.is_file())
    others = {name: header for name, header in by_name.items() if count[name] == 1} | by_uid
    return {name: header for name, header in others.items() if not os.path.lexists(root / name)} | by_path


def header_of(path: Path, dataset: Dataset) -> Header | None:
    """What identifies a file; None of a DICOMDIR, which is no object of its own."""
    with quietly():
        if _DIRECTORY in (dataset.get("SOPClassUID"), dataset.file_meta.get("MediaStorageSOPClassUID")):
            return None
        uid, patient = (str(dataset.get(keyword) or "").strip() for keyword in ("SOPInstanceUID", "PatientID"))
    if not uid:
        raise DataRefused("a DICOM file cannot be read", detail="it has no SOPInstanceUID")
    return Header(path, uid, patient)


def _headers(files: list[Path], allowed: Collection[str]) -> list[Header]:
    """All headers that can be read; a file whose header cannot is never opened again."""
    headers, pointing = [], []
    for path in files:
        try:
            dataset = read_dicom(path, pixels=False)
            left, header = identifiers(dataset, allowed), header_of(path, dataset)
        except Exception:  # values are decoded when they are looked at, and that may fail in many ways
            continue
        if left:
            pointing.append(f"{path}: {', '.join(left)}")
        if header is not None:
            headers.append(header)
    if pointing:
        raise DataRefused(
            "DICOM headers still hold what points at a person",
            detail=f"{len(pointing)} files; {'; '.join(pointing[:5])}. Clean them with `wardround deidentify`, or name what "
            "may stay in allow_identifiers",
        )
    return headers


def _patient(entry: Listed, header: Header | None) -> str | None:
    if entry.patient is not None or header is None:
        return entry.patient or "?"  # of a file that cannot be read: gather passes it over or refuses
    if is_placeholder(header.patient):  # many patients would count as one, and each move the sum further than it may
        raise DataRefused("a record has no patient", detail=f"{header.path}: PatientID is empty or a placeholder")
    return header.patient
