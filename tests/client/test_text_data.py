"""Loaders of sequences and texts: what is read is what stands in the file, and the rest is refused without being quoted."""

from __future__ import annotations

import contextlib
import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.client.data import load
from wardround.client.data.loaded import Loaded
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import TASKS
from wardround.common.tasks.text import bucket

A, B = "A" * 60, "ACGTN" * 12
LINES = f"sequence,label\n{A},EI\n{B},N\n"
REPORTS = "patient,impression,findings,label\nhansen,Normal chest.,Clear lungs.,normal\nmeyer,,Large effusion.,abnormal\n"
CASES = {"splice-junctions": ("sequences", LINES), "radiology-reports": ("text", REPORTS)}


def read(folder: Path, content: str | bytes, task: str = "splice-junctions", name: str = "hansen.csv", **terms: Any) -> Loaded:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return load(DataSource(loader=terms.pop("loader", CASES[task][0]), path=file, **terms), TASKS[task])


def refused(folder: Path, content: str | bytes, task: str = "splice-junctions", **terms: Any) -> DataRefused:
    with pytest.raises(DataRefused) as found:
        read(folder, content, task, **terms)
    said = str(found.value)
    assert "hansen" not in said.lower()
    assert str(folder) not in said
    assert "\n" not in said
    return found.value


@pytest.fixture(params=CASES)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_sequences_are_read_as_they_stand(tmp_path: Path):
    found = read(tmp_path, LINES)
    assert found.records.fields["tokens"].tolist() == [[1] * 60, [1, 2, 3, 4, 5] * 12]
    assert found.records.label.tolist() == [0, 2]
    assert found.owner is None
    assert found.records.patients == 2


def test_texts_are_read_one_after_the_other(tmp_path: Path):
    found = read(tmp_path, REPORTS, "radiology-reports", patient_column="patient")
    expected = [bucket(word, 2000) for word in ("normal", "chest", "clear", "lungs")]
    assert found.records.fields["tokens"][0].tolist() == expected + [0] * 60
    assert found.records.fields["tokens"][1, 0] == bucket("large", 2000)
    assert found.records.label.tolist() == [0, 1]
    assert found.owner == ["hansen", "meyer"]


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r\n"),
    lambda text: "\ufeff" + text,
    lambda text: text.rstrip("\n"),
    lambda text: text.replace("\n", "\n\n"),
    lambda text: text.replace(",", " , "),
    lambda text: "\n".join('"' + line.replace(",", '","') + '"' for line in text.splitlines()),
    lambda text: "\n".join(line + ("," + "ward" if n == 0 else ",7") for n, line in enumerate(text.splitlines())),
], ids=["crlf", "bom", "no last newline", "blank lines", "spaces", "quotes", "more columns"])  # fmt: skip
def test_the_same_file_written_otherwise_is_the_same(tmp_path: Path, task: str, change: Any):
    expected, found = read(tmp_path, CASES[task][1], task), read(tmp_path, change(CASES[task][1]), task)
    assert torch.equal(found.records.fields["tokens"], expected.records.fields["tokens"])
    assert torch.equal(found.records.label, expected.records.label)


def test_a_compressed_file_is_the_same(tmp_path: Path, task: str):
    expected = read(tmp_path, CASES[task][1], task)
    found = read(tmp_path, gzip.compress(CASES[task][1].encode()), task, name="hansen.csv.gz")
    assert torch.equal(found.records.fields["tokens"], expected.records.fields["tokens"])


def test_without_a_header_the_columns_stand_in_the_schemas_order(tmp_path: Path):
    found = read(tmp_path, LINES.split("\n", 1)[1], header=False)
    assert torch.equal(found.records.label, read(tmp_path, LINES).records.label)


@pytest.mark.parametrize(("content", "said"), [
    ("", "holds no records"),
    ("sequence,label\n", "holds no records"),
    (LINES.replace("sequence", "dna"), "lacks a column"),
    (LINES.replace("label", "sequence,label"), "holds a column twice"),
    (LINES + f"{A}\n", "wrong length"),
    (LINES + f"{A},N,N\n", "wrong length"),
    (LINES.replace("AAAA", "AAAU"), "column sequence does not fit"),
    (LINES.replace("AAAA", "AAA"), "column sequence does not fit"),
    (LINES.replace("EI", "Hansen"), "label label does not fit"),
    (LINES.encode("utf-16"), "cannot be read"),
    (LINES + "sequence,label\n", "does not fit"),
])  # fmt: skip
def test_a_damaged_file_of_sequences_is_refused(tmp_path: Path, content: str | bytes, said: str):
    assert said in str(refused(tmp_path, content))


@pytest.mark.parametrize(("content", "said"), [
    (REPORTS.replace("normal\n", "Hansen\n", 1), "label label does not fit"),
    (REPORTS.replace("Large effusion.", "--"), "column impression + findings does not fit"),
    (REPORTS.replace("findings", "finding"), "lacks a column"),
    (REPORTS.replace("meyer", "?"), "a record has no patient"),
])  # fmt: skip
def test_a_damaged_file_of_texts_is_refused(tmp_path: Path, content: str, said: str):
    assert said in str(refused(tmp_path, content, "radiology-reports", patient_column="patient"))


@pytest.mark.parametrize("damage", [lambda packed: packed[:-9], lambda packed: b"PK" + packed, lambda packed: packed[:20]])
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, damage: Any):
    error = refused(tmp_path, damage(gzip.compress(LINES.encode())), name="hansen.csv.gz")
    assert str(error) == "the table cannot be read"
    assert "hansen.csv.gz" in error.detail


def test_a_compressed_file_that_grows_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wardround.client.data.lines.LARGEST_FILE", 100)
    assert str(refused(tmp_path, gzip.compress(LINES.encode()), name="hansen.csv.gz")) == "the table is too large"


@pytest.mark.parametrize(("loader", "said"), [("sequences", "does not read sequences"), ("text", "does not read texts")])
def test_a_task_of_another_kind_is_refused(tmp_path: Path, loader: str, said: str):
    other = {"sequences": "radiology-reports", "text": "splice-junctions"}[loader]
    assert said in str(refused(tmp_path, LINES, other, loader=loader))


@given(st.binary(max_size=80), st.sampled_from(["a.csv", "a.csv.gz"]))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str):
    folder = tmp_path_factory.mktemp("any")
    for task, (loader, head) in CASES.items():
        for begin in (b"", head.encode()):
            with contextlib.suppress(DataRefused):
                assert len(read(folder, begin + content, task, name=name, loader=loader).records) >= 2
