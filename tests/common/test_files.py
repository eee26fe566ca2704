"""A file is whole, or it is what it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wardround.common.files import write_atomically


def test_a_draft_that_a_crash_left_behind_is_written_over(tmp_path: Path):
    with pytest.MonkeyPatch.context() as crash:
        crash.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(SystemExit))
        crash.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process tidies nothing
        with pytest.raises(SystemExit):
            write_atomically(tmp_path / "model", b"half of what")
    assert [path.name for path in tmp_path.iterdir()] == [".model.draft"]
    write_atomically(tmp_path / "model", b"what ", b"was meant")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model").read_bytes() == b"what was meant"


def test_a_draft_that_somebody_left_open_to_all_does_not_lend_its_mode(tmp_path: Path):
    draft = tmp_path / ".page.draft"
    draft.touch()
    draft.chmod(0o666)
    before = os.umask(0o077)
    try:
        write_atomically(tmp_path / "page", b"whose")
    finally:
        os.umask(before)
    assert (tmp_path / "page").stat().st_mode & 0o777 == 0o600
