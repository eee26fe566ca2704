"""Secrets on disk: their owner reads them, or nobody does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wardround.common.errors import ConfigError
from wardround.common.trust.private_files import (
    LARGEST_SECRET,
    make_private_folder,
    read_private,
    replace_private,
    write_private,
)


def test_a_secret_comes_back_and_only_its_owner_can_open_it(tmp_path: Path):
    before = os.umask(0)
    try:
        write_private(tmp_path / "key", b"secret")
        replace_private(tmp_path / "book", b"first")
        replace_private(tmp_path / "book", b"second")
    finally:
        os.umask(before)
    assert (read_private(tmp_path / "key"), read_private(tmp_path / "book")) == (b"secret", b"second")
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"key": 0o600, "book": 0o600}


def test_nothing_is_written_over(tmp_path: Path):
    write_private(tmp_path / "key", b"first")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("key", "link"):
        with pytest.raises(ConfigError, match=f"{name} exists and is not written over"):
            write_private(tmp_path / name, b"second")
    assert read_private(tmp_path / "key") == b"first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "link"]


@pytest.mark.parametrize("write", [write_private, replace_private])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "key", b"secret")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o660, 0o666])
def test_a_file_that_others_could_open_is_refused(tmp_path: Path, mode: int):
    write_private(tmp_path / "key", b"secret")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(ConfigError, match=f"key has mode {mode:o}, wanted 600"):
        read_private(tmp_path / "key")


def test_a_link_is_refused_wherever_it_leads(tmp_path: Path):
    write_private(tmp_path / "key", b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "key")
    with pytest.raises(ConfigError, match="is a symbolic link"):
        read_private(tmp_path / "link")


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path):
    (tmp_path / "folder").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("folder", "pipe"):
        with pytest.raises(ConfigError, match=f"{name} is not an ordinary file"):
            read_private(tmp_path / name)


def test_a_file_that_is_missing_empty_or_huge_is_refused(tmp_path: Path):
    write_private(tmp_path / "empty", b"")
    write_private(tmp_path / "huge", b"x" * (LARGEST_SECRET + 1))
    for name, said in (("none", "No such file"), ("empty", "is empty"), ("huge", "has 1048577 bytes")):
        with pytest.raises(ConfigError, match=f"{name} .*{said}"):
            read_private(tmp_path / name)


def test_another_users_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_private(tmp_path / "key", b"secret")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # as if somebody else read it
    with pytest.raises(ConfigError, match=rf"belongs to user {os.getuid()}, wanted {os.getuid() + 1}"):
        read_private(tmp_path / "key")
    with pytest.raises(ConfigError, match="belongs to user"):
        make_private_folder(tmp_path)


def test_a_folder_of_secrets_is_its_owners(tmp_path: Path):
    make_private_folder(tmp_path / "keys")
    make_private_folder(tmp_path / "keys")
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    (tmp_path / "keys").chmod(0o750)
    with pytest.raises(ConfigError, match="has mode 750, wanted 700"):
        make_private_folder(tmp_path / "keys")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(ConfigError, match=f"{name} is not a folder"):
            make_private_folder(tmp_path / name)
