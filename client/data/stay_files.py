"""A file a stay, under the stay's id: the files of a folder, or the members of a zip archive, read one at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from wardround.client.data.image_files import inside
from wardround.client.data.rows import LARGEST_FILE
from wardround.common.errors import DataRefused

SUFFIXES = (".txt", ".csv")
LARGEST_STAY = 1 << 26  # bytes, unpacked

Content = Callable[[], bytes]


@contextmanager
def stay_files(path: Path) -> Iterator[dict[str, Content]]:
    """What opens each file, by the stay that its name says; usable inside the `with` only.

    Raises:
        DataRefused: the folder or archive cannot be read, a link leads out of the folder, or there are two files of one stay.
    """
    if path.is_dir():
        root = path.resolve()
        files = (file for file in sorted(root.iterdir()) if file.is_file())
        yield _by_stay(path, ((file.name, _of_file(inside(root, file.name, str(file)))) for file in files))
        return
    with _archive(path) as archive:
        members = (member for member in archive.infolist() if not member.is_dir())
        yield _by_stay(path, ((member.filename, _of_member(path, archive, member)) for member in members))


def _of_file(file: Path) -> Content:
    def content() -> bytes:
        if file.stat().st_size > LARGEST_STAY:
            raise DataRefused("a stay is too large", detail=f"{file} is larger than 64 MiB")
        return file.read_bytes()

    return content


def _of_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Content:
    def content() -> bytes:
        with archive.open(member) as file:  # no further than the limit: a small member can unfold to terabytes
            found = file.read(LARGEST_STAY + 1)
        if len(found) > LARGEST_STAY:
            raise DataRefused("a stay is too large", detail=f"{path}, {member.filename} is larger than 64 MiB")
        return found

    return content


def _by_stay(where: Path, files: Iterable[tuple[str, Content]]) -> dict[str, Content]:
    found: dict[str, Content] = {}
    for name, content in files:
        path = PurePosixPath(name)
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise DataRefused("there are two files of one stay", detail=f"{where}, {name}")
        found[path.stem] = content
    return found


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise DataRefused("the archive is too large", detail=f"{path} is larger than 1 GiB")
        return zipfile.ZipFile(path)
    except DataRefused:
        raise
    except Exception as error:  # a damaged directory ends in struct's, zipfile's and other exceptions
        raise DataRefused("the series cannot be read", detail=f"{path}: {error}") from None
