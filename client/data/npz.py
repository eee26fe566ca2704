"""NumPy's .npz archives: what unfolds beyond a limit is refused before it is unfolded, and nothing is unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST_ARCHIVE = 1 << 32  # bytes, unpacked; a small file can unfold to more than the memory holds


def read_npz(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The arrays `names` of the archive.

    Raises:
        ValueError: all members together are larger than 4 GiB, unpacked.
        Exception: a damaged archive ends in half a dozen other kinds: zlib's, struct's, zipfile's ...
    """
    with path.open("rb") as file:
        with zipfile.ZipFile(file) as archive:  # no member is read beyond the size that is written here
            if sum(member.file_size for member in archive.infolist()) > LARGEST_ARCHIVE:
                raise ValueError("the arrays are larger than 4 GiB, unpacked")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
