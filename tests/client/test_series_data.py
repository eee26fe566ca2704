"""Series from files: every layout says the same, damage is counted stay by stay, and nothing is guessed."""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.client.data import open_records
from wardround.client.data.series import hours, load_series, read_stay, reader_of
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.models import MODELS
from wardround.common.tasks import TASKS, Column, Records, Task
from wardround.common.tasks.series import SeriesSchema, Variable

SCHEMA = SeriesSchema(
    (Variable("pulse", "", 20, 300, centre=80, scale=20, also=("hr",)), Variable("heat", "", 30, 45, centre=37, scale=1)),
    hours=4,
    static=(Column("age", "", 15, 110, centre=60, scale=10),),
)
WARD = Task("ward", "", SCHEMA, lambda options: MODELS["series-rnn"](options, inputs=4, table=2, classes=2))

LABELS = "stay,died,owner\nhansen,1,p1\nmeyer,0,p2\nmueller,0,p1\n"
STAYS = {
    "hansen": [("00:00", "age", "70"), ("00:30", "pulse", "100"), ("02:10", "heat", "38")],
    "meyer": [("00:10", "pulse", "60"), ("3.5", "hr", "80"), ("01:00", "", "1"), ("01:00", "weight", "80")],
    "mueller": [("00:00", "age", ""), ("01:00:59", "heat", "36")],
}
Rows = dict[str, list[tuple[str, str, str]]]


def table(header: list[str], rows: list[tuple[str, ...]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def long(stays: Rows = STAYS) -> str:
    return table(["stay", "Time", "Parameter", "Value"], [(name, *row) for name, rows in stays.items() for row in rows])


def a_file_each(stays: Rows = STAYS) -> dict[str, bytes]:
    return {f"{name}.txt": table(["Time", "Parameter", "Value"], list(rows)).encode() for name, rows in stays.items()}


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"set/{name}", content)
    return path


def load(folder: Path, series: str | Path, labels: str = LABELS, task: Task = WARD, **terms: Any) -> Records:
    (folder / "labels.csv").write_text(labels)
    path = folder / "hansen-series.csv" if isinstance(series, str) else series
    if isinstance(series, str):
        path.write_text(series)
    known = {"file_column": "stay", "label_column": "died", "patient_column": "owner"} | terms
    return open_records(DataSource(loader="series", path=path, labels=folder / "labels.csv", **known), task)[0]


def refused(folder: Path, *given: Any, **terms: Any) -> DataRefused:
    with pytest.raises(DataRefused) as found:
        load(folder, *given, **terms)
    said = str(found.value)
    assert "hansen" not in said.lower()
    assert str(folder) not in said
    return found.value


def same(one: Records, two: Records) -> bool:
    return all(torch.equal(one.fields[name], two.fields[name]) for name in two.fields) and torch.equal(one.label, two.label)


def test_one_long_table_is_read_as_it_stands(tmp_path: Path):
    records = load(tmp_path, long())
    assert records.label.tolist() == [1, 0, 0]
    assert records.patient.tolist() == [0, 1, 0]
    pulse = records.fields["series"][:, :, 0]
    assert pulse.tolist() == [[1, 1, 1, 1], [-1, -1, -1, 0], [0, 0, 0, 0]]
    assert records.fields["table"].tolist() == [[1, 0], [0, 1], [0, 1]]


def test_a_folder_and_an_archive_say_what_one_table_says(tmp_path: Path):
    files = a_file_each()
    (tmp_path / "stays").mkdir()
    for name, content in files.items():
        (tmp_path / "stays" / name).write_bytes(content)
    one = load(tmp_path, long())
    assert same(one, load(tmp_path, tmp_path / "stays"))
    assert same(one, load(tmp_path, zipped(tmp_path / "stays.zip", files)))


def test_a_wide_table_says_what_a_long_one_says(tmp_path: Path):
    wide = table(
        ["stay", "time", "pulse", "heat", "age"],
        [("hansen", "0:30", "100", "", "70"), ("hansen", "2:10", "", "38", "NA"), ("meyer", "0:10", "60", "", ""),
         ("meyer", "3.5", "80", "", ""), ("mueller", "1", "", "36", "")],
    )  # fmt: skip
    assert same(load(tmp_path, long()), load(tmp_path, wide))


def test_parquet_says_what_csv_says(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    seconds = [1800, 7800, 600, 12600, 3659]
    columns = {
        "stay": arrow.array(["hansen", "hansen", "meyer", "meyer", "mueller"]),
        "time": arrow.array(seconds, arrow.duration("s")),
        "pulse": arrow.array([100.0, None, 60.0, 80.0, float("nan")]),
        "heat": arrow.array([None, 38.0, None, None, 36.0]),
        "age": arrow.array([70, None, None, None, None]),
    }
    parquet.write_table(arrow.table(columns), tmp_path / "dyn.parquet")
    assert same(load(tmp_path, long()), load(tmp_path, tmp_path / "dyn.parquet"))


def test_a_table_task_reads_parquet(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    heart = TASKS["heart-disease"]
    names = [
        "age",
        "sex",
        "cp",
        "trestbps",
        "chol",
        "fbs",
        "restecg",
        "thalach",
        "exang",
        "oldpeak",
        "slope",
        "ca",
        "thal",
        "num",
    ]
    rows = [[63, 1, 1, 145, None, 1, 2, 150, 0, 2.3, 3, 0, 6, 0], [67, 0, 4, 160, 286.0, 0, 2, 108, 1, 1.5, 2, 3, 3, 2]]
    (tmp_path / "heart.csv").write_text(
        table(names, [tuple("" if cell is None else str(cell) for cell in row) for row in rows])
    )
    parquet.write_table(arrow.table({n: [row[at] for row in rows] for at, n in enumerate(names)}), tmp_path / "heart.parquet")
    one, two = (open_records(DataSource(loader="table", path=tmp_path / f"heart.{s}"), heart)[0] for s in ("csv", "parquet"))
    assert torch.equal(one.fields["table"], two.fields["table"])


def test_without_its_library_parquet_is_refused_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "dyn.parquet").write_bytes(b"PAR1")
    assert "pip install wardround[parquet]" in str(refused(tmp_path, tmp_path / "dyn.parquet"))


def test_damaged_parquet_is_refused(tmp_path: Path):
    pytest.importorskip("pyarrow")
    (tmp_path / "dyn.parquet").write_bytes(b"PAR1 and nothing else")
    assert "cannot be read" in str(refused(tmp_path, tmp_path / "dyn.parquet"))


def test_static_findings_may_stand_in_the_labels(tmp_path: Path):
    labels = "stay,died,owner,age\nhansen,1,p1,80\nmeyer,0,p2,\nmueller,0,p1,60\n"
    assert load(tmp_path, long(), labels).fields["table"].tolist() == [[2, 0], [0, 1], [0, 0]]


def test_without_a_patient_column_each_stay_is_a_patient(tmp_path: Path):
    assert load(tmp_path, long(), patient_column=None).patients == 3


@pytest.mark.parametrize("bad", [("0:99", "pulse", "90"), ("1", "pulse", "fast"), ("1", "pulse", "inf"), ("", "pulse", "1")])
@pytest.mark.parametrize("layout", ["table", "archive"])
def test_a_damaged_stay_is_passed_over_as_often_as_allowed_and_no_more(tmp_path: Path, bad: tuple[str, str, str], layout: str):
    damaged = STAYS | {"meyer": [*STAYS["meyer"], bad]}
    series = long(damaged) if layout == "table" else zipped(tmp_path / "x.zip", a_file_each(damaged))
    error = refused(tmp_path, series)
    assert "meyer" in error.detail or "line 9" in error.detail
    left = load(tmp_path, series, unreadable=1)
    assert left.label.tolist() == [1, 0]
    worse = damaged | {"hansen": [bad]}
    series = long(worse) if layout == "table" else zipped(tmp_path / "x.zip", a_file_each(worse))
    assert "more stays" in str(refused(tmp_path, series, unreadable=1))


@pytest.mark.parametrize("layout", ["table", "archive"])
def test_a_stay_without_series_counts_as_damaged(tmp_path: Path, layout: str):
    fewer = {name: rows for name, rows in STAYS.items() if name != "mueller"}
    series = long(fewer) if layout == "table" else zipped(tmp_path / "x.zip", a_file_each(fewer))
    assert "a stay cannot be read" in str(refused(tmp_path, series))
    assert len(load(tmp_path, series, unreadable=1)) == 2
    assert "there are no stays" in str(refused(tmp_path, series, "stay,died,owner\nschmidt,0,p9\n", unreadable=1))


def test_stays_that_the_labels_do_not_list_are_left_alone(tmp_path: Path):
    more = STAYS | {"schmidt": [("what", "pulse", "ever")]}
    assert same(load(tmp_path, long()), load(tmp_path, long(more)))
    assert same(load(tmp_path, long()), load(tmp_path, zipped(tmp_path / "x.zip", a_file_each(more))))


@pytest.mark.parametrize(("labels", "said"), [
    (LABELS.replace("died", "dead"), "lack a column"),
    (LABELS.replace("owner", "stay"), "lack a column"),
    ("stay,died,owner,age,age\nhansen,1,p1,70,70\n", "lack a column"),
    (LABELS + "hansen,0,p1\n", "list a stay twice"),
    (LABELS + ",0,p1\n", "names no stay"),
    (LABELS + "schmidt,0,\n", "no patient"),
    (LABELS + "schmidt,0\n", "wrong length"),
    (LABELS.replace("meyer,0", "meyer,no"), "a label is no class"),
    (LABELS.replace("meyer,0", "meyer,-1"), "a label is no class"),
    (LABELS.replace("meyer,0", "meyer,2"), "does not fit"),
    ("stay,died,owner,age\nhansen,1,p1,old\n", "a value is no number"),
    ("stay,died,owner\n", "list no stays"),
    ("", "lack a column"),
])  # fmt: skip
def test_doubtful_labels_are_refused_whatever_is_allowed(tmp_path: Path, labels: str, said: str):
    assert said in str(refused(tmp_path, long(), labels, unreadable=100))


@pytest.mark.parametrize(("series", "said"), [
    ("stay,parameter,value\nhansen,pulse,1\n", "cannot be read"),
    ("stay,time,colour\nhansen,1,red\n", "cannot be read"),
    ("stay,time,pulse,pulse\nhansen,1,80,80\n", "cannot be read"),
    ("time,parameter,value\n1,pulse,1\n", "lack a column"),
    (long() + "hansen,1\n", "wrong length"),
    ("", "cannot be read"),
])  # fmt: skip
def test_a_table_of_another_kind_is_refused_whatever_is_allowed(tmp_path: Path, series: str, said: str):
    assert said in str(refused(tmp_path, series, unreadable=100))


def test_two_files_of_one_stay_are_refused(tmp_path: Path):
    files = a_file_each()
    assert "two files" in str(refused(tmp_path, zipped(tmp_path / "x.zip", files | {"more/hansen.csv": files["hansen.txt"]})))


def test_a_link_out_of_the_folder_is_refused_whatever_is_allowed(tmp_path: Path):
    stays = tmp_path / "stays"
    stays.mkdir()
    for name, content in a_file_each().items():
        (stays / name).write_bytes(content)
    (stays / "meyer.txt").rename(tmp_path / "outside.txt")
    (stays / "meyer.txt").symlink_to(tmp_path / "outside.txt")
    assert "outside" in str(refused(tmp_path, stays, unreadable=100))
    (tmp_path / "outside.txt").rename(stays / "under-another-name.dat")
    (stays / "meyer.txt").unlink()
    (stays / "meyer.txt").symlink_to(stays / "under-another-name.dat")
    assert same(load(tmp_path, long()), load(tmp_path, stays))


def test_a_damaged_archive_is_refused(tmp_path: Path):
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 and nothing else")
    assert "cannot be read" in str(refused(tmp_path, tmp_path / "x.zip"))


def test_a_damaged_member_costs_one_stay(tmp_path: Path):
    path = zipped(tmp_path / "x.zip", a_file_each())
    content = path.read_bytes()
    path.write_bytes(content.replace(b"38\n", b"39\n", 1))  # the member's checksum no longer fits
    refused(tmp_path, path)
    assert len(load(tmp_path, path, unreadable=1)) == 2


def test_a_stay_beyond_the_limit_is_not_unfolded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wardround.client.data.stay_files.LARGEST_STAY", 60)
    assert "cannot be read" in str(refused(tmp_path, zipped(tmp_path / "x.zip", a_file_each())))


def test_other_tasks_and_missing_files_are_refused(tmp_path: Path):
    assert "does not read series" in str(refused(tmp_path, long(), task=TASKS["heart-disease"]))
    refused(tmp_path, tmp_path / "nowhere.zip")
    refused(tmp_path, tmp_path / "nowhere.csv")
    with pytest.raises(DataRefused, match="no labels"):
        load_series(DataSource(loader="series", path=tmp_path), WARD)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.binary(max_size=120) | st.text("Time,Parameter,Value\n0123456789:.-pulsehrage \"'", max_size=200).map(str.encode))
def test_any_bytes_are_a_stay_or_a_refusal(content: bytes):
    try:
        found = read_stay(b"Time,Parameter,Value\n" + content, SCHEMA)
    except (ValueError, csv.Error):
        return
    assert all(np.isfinite(hour) and np.isfinite(value) and 0 <= what < 3 for hour, what, value in found)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 5999), st.sampled_from(["pulse", "hr", "heat", "age", "other"]), st.floats(-1e6, 1e6)))
)
def test_what_was_written_is_what_is_read(events: list[tuple[int, str, float]]):
    rows: list[tuple[str, ...]] = [
        (f"{minute // 60:02d}:{minute % 60:02d}", name, repr(value)) for minute, name, value in events
    ]
    found = read_stay(table(["Time", "Parameter", "Value"], rows).encode(), SCHEMA)
    known = SCHEMA.names
    assert found == [(pytest.approx(minute / 60), known[name], value) for minute, name, value in events if name in known]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.text(max_size=12))
def test_a_time_is_hours_or_a_refusal(text: str):
    try:
        found = hours(text)
    except ValueError:
        return
    assert np.isfinite(found)


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 values for 3 columns"):
        reader_of(["time", "parameter", "value"], SCHEMA)(["1", "pulse"])


def test_the_task_learns_from_what_was_read(tmp_path: Path):
    draw = np.random.default_rng(0)
    died = draw.integers(0, 2, 60)
    stays = {f"s{n}": [(f"0{h}:00", "pulse", str(80 + 20 * (2 * d - 1))) for h in range(4)] for n, d in enumerate(died)}
    labels = "stay,died,owner\n" + "".join(f"s{n},{d},p{n}\n" for n, d in enumerate(died))
    records = load(tmp_path, long(stays), labels)
    model = WARD.model({"hidden": 4}, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        WARD.loss(model(**records.fields), records.label).mean().backward()
        optimizer.step()
    assert float((model(**records.fields).argmax(1) == records.label).float().mean()) == 1.0
