"""Loaders: what is read is what stands in the file, and what does not fit is refused without quoting it."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.client.data import open_records
from wardround.client.policy import DataSource
from wardround.common.errors import ConfigError, DataRefused
from wardround.common.tasks import TASKS, ArraySchema, ImageSchema, Records, TableSchema, Task
from wardround.simulations import SITES

HEART = TASKS["heart-disease"]
FILM = replace(TASKS["chest-xray"], schema=ArraySchema({"image": (1, 28, 28)}, classes=2, low=0, high=255, scale=255))
NAMES = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"]
HANSEN = ["63", "1", "1", "145", "233", "1", "2", "150", "0", "2.3", "3", "0", "6", "0"]
MEYER = ["67", "0", "4", "160", "286", "0", "2", "108", "1", "1.5", "2", "3", "3", "2"]


def a_row(**cells: str) -> list[str]:
    return [cells.get(name, cell) for name, cell in zip(NAMES, HANSEN, strict=True)]


def text(*rows: list[str], header: bool = True, end: str = "\n") -> str:
    return "".join(",".join(row) + end for row in ([NAMES] if header else []) + list(rows))


def load(folder: Path, content: str | bytes, task: Task = HEART, **terms: Any) -> Records:
    file = folder / "hansen.csv"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    records, held_out = open_records(DataSource(loader="table", path=file, **terms), task)
    assert len(held_out) == 0
    return records


def refused(folder: Path, content: str | bytes, **terms: Any) -> DataRefused:
    with pytest.raises(DataRefused) as found:
        load(folder, content, **terms)
    said = str(found.value)
    assert "hansen" not in said.lower()
    assert str(folder) not in said
    assert "\n" not in said
    return found.value


def entry(records: Records, column: str, row: int = 0) -> list[float]:
    """One column's entries of the encoded row, before the common scale."""
    schema = HEART.schema
    assert isinstance(schema, TableSchema)
    start = 0
    for found in schema.columns:
        if found.name == column:
            return (records.fields["table"][row, start : start + found.width] * schema.scale).tolist()
        start += found.width
    raise AssertionError(column)


# --- tables ---------------------------------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_stands(tmp_path: Path):
    records = load(tmp_path, text(HANSEN, MEYER))
    assert len(records) == records.patients == 2
    assert records.label.tolist() == [0, 1]
    assert entry(records, "age") == pytest.approx([1.3])
    assert entry(records, "sex", 1) == [-1.0]
    assert entry(records, "chol", 1) == pytest.approx([(286 - 240) / 50, 0], rel=1e-5)


@pytest.mark.parametrize("content", [
    text(HANSEN, MEYER, end="\r\n"),
    text(HANSEN, MEYER, end="\r"),
    "\ufeff" + text(HANSEN, MEYER),
    text(HANSEN, MEYER).rstrip("\n"),
    text(HANSEN, MEYER).replace("\n", "\n\n"),
    text(HANSEN, MEYER).replace(",", " , "),
    text(HANSEN, MEYER).replace("63", '"63"'),
    text([*NAMES, "ward"], [*HANSEN, "Hansen"], [*MEYER, "Meyer"], header=False),
    text(NAMES[::-1], HANSEN[::-1], MEYER[::-1], header=False),
    text([cell + ".0" if cell.isdigit() else cell for cell in HANSEN], MEYER),
], ids=[
    "crlf", "cr", "bom", "no last newline", "blank lines", "spaces", "quotes", "more columns", "other order", "floats"
])  # fmt: skip
def test_the_same_table_written_otherwise_is_the_same(tmp_path: Path, content: str):
    expected = load(tmp_path, text(HANSEN, MEYER))
    found = load(tmp_path, content)
    assert torch.equal(found.fields["table"], expected.fields["table"])
    assert torch.equal(found.label, expected.label)


def test_a_table_without_a_header_stands_in_the_schemas_order(tmp_path: Path):
    expected = load(tmp_path, text(HANSEN, MEYER))
    assert torch.equal(
        load(tmp_path, text(HANSEN, MEYER, header=False), header=False).fields["table"], expected.fields["table"]
    )


@pytest.mark.parametrize("written", ["", "?", "NA", "nan", "NaN", " ? "])
def test_an_absent_value_becomes_zero_and_says_so(tmp_path: Path, written: str):
    assert entry(load(tmp_path, text(a_row(thal=written, oldpeak=written))), "thal") == [0, 1]


def test_a_cholesterol_of_zero_was_not_measured(tmp_path: Path):
    records = load(tmp_path, text(a_row(chol="0"), a_row(trestbps="0.0"), HANSEN))
    assert entry(records, "chol") == [0, 1]
    assert entry(records, "trestbps", 1) == [0, 1]
    assert entry(records, "chol", 2)[1] == 0


@pytest.mark.parametrize("column", ["age", "sex", "cp", "num"])
def test_a_value_that_must_be_there_is_missed(tmp_path: Path, column: str):
    assert column in str(refused(tmp_path, text(HANSEN, a_row(**{column: "?"}))))


@pytest.mark.parametrize(("column", "value"), [
    ("chol", "6.2"),  # mmol/l
    ("age", "1952"), ("age", "5"), ("age", "-1"),
    ("trestbps", "14.5"),  # cm Hg
    ("sex", "2"), ("cp", "5"), ("thal", "4"), ("fbs", "105"), ("num", "5"), ("num", "-1"), ("oldpeak", "99"),
])  # fmt: skip
def test_an_implausible_value_is_refused_without_being_quoted(tmp_path: Path, column: str, value: str):
    error = refused(tmp_path, text(HANSEN, a_row(**{column: value})))
    assert str(error).endswith(f"{column} does not fit the task's schema")
    assert "1 records" in error.detail


@pytest.mark.parametrize("value", ["Hansen", "2;3", "1e", "0x10", "--", "12 3", "1,5"])
def test_a_cell_that_is_no_number_is_refused_without_being_quoted(tmp_path: Path, value: str):
    error = refused(tmp_path, text(HANSEN, a_row(oldpeak=f'"{value}"')))
    assert str(error) == "column oldpeak holds something that is no number"
    assert error.detail == f"{tmp_path / 'hansen.csv'}, line 3, column oldpeak"


@pytest.mark.parametrize("value", ["inf", "-inf", "1e999", "infinity", "NAN"])
def test_an_infinite_number_is_refused(tmp_path: Path, value: str):
    error = refused(tmp_path, text(HANSEN, a_row(oldpeak=value)))
    assert "infinite" in str(error)
    assert "line 3" in error.detail


def test_the_line_named_is_the_line_of_the_file(tmp_path: Path):
    error = refused(tmp_path, "\n" + text(HANSEN).replace("\n", "\n\n\n") + text(a_row(age="x"), header=False))
    assert "line 8, column age" in error.detail
    assert "line 1," in refused(tmp_path, text(a_row(age="x"), header=False), header=False).detail


@pytest.mark.parametrize(("content", "said"), [
    ("", "holds no records"),
    ("\n\n", "holds no records"),
    (text(), "holds no records"),
    (text(HANSEN, header=False), "lacks a column"),
    (text(HANSEN).replace(",", ";"), "lacks a column"),
    (text(HANSEN).replace("chol", "cholesterol"), "lacks a column"),
    (text(HANSEN).replace("chol", "age"), "lacks a column|twice"),
    (text([*NAMES, "age"], [*HANSEN, "30"], header=False), "holds a column twice"),
    (text(HANSEN, MEYER[:-1]), "wrong length"),
    (text(HANSEN, [*MEYER, "Hansen"]), "wrong length"),
    (text(HANSEN).replace("2.3", "2,3"), "wrong length"),
    (text(HANSEN, MEYER).replace("67", '"67'), "wrong length|no number|cannot be read"),
    (text(HANSEN) + "M\u00fcller,1\n", "wrong length"),
    (b"\xff\xfe" + text(HANSEN).encode("utf-16-le"), "cannot be read"),
    ((text([*NAMES, "name"], [*HANSEN, "M\u00fcller"], header=False)).encode("latin-1"), "cannot be read"),
    (text(HANSEN, ["x" * 200_000, *MEYER[1:]]), "cannot be read"),
    (b"\x00" * 100, "lacks a column"),
    (pickle.dumps({"a": 1}), "cannot be read|lacks"),
])  # fmt: skip
def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path, content: str | bytes, said: str):
    error = refused(tmp_path, content)
    assert any(part in str(error) for part in said.split("|"))
    assert str(tmp_path / "hansen.csv") in error.detail


def test_a_header_where_none_was_promised_is_refused(tmp_path: Path):
    assert "no number" in str(refused(tmp_path, text(HANSEN), header=False))
    assert "holds no records" in str(refused(tmp_path, "", header=False))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    for path in (tmp_path / "hansen.csv", tmp_path):
        with pytest.raises(DataRefused, match=r"^the table cannot be read$"):
            open_records(DataSource(loader="table", path=path), HEART)
    with pytest.raises(ConfigError, match="no loader is called 'tabel'"):
        open_records(DataSource(loader="tabel", path=tmp_path), HEART)


def test_a_loader_for_another_kind_of_task_is_refused(tmp_path: Path):
    with pytest.raises(DataRefused, match="does not read tables"):
        open_records(DataSource(loader="table", path=tmp_path / "x"), FILM)
    with pytest.raises(DataRefused, match="does not read arrays"):
        open_records(DataSource(loader="arrays", path=tmp_path / "x"), HEART)


# --- patients -------------------------------------------------------------------------------------------------------------


def with_owners(*owners: str) -> str:
    return text([*NAMES, "mrn"], *([*HANSEN, owner] for owner in owners), header=False)


def test_records_with_one_owner_are_one_patient(tmp_path: Path):
    records = load(tmp_path, with_owners("b", "a", "b", "c", " a ", "b"), patient_column="mrn")
    assert records.patient.tolist() == [0, 1, 0, 2, 1, 0]
    assert records.patients == 3


@pytest.mark.parametrize("owner", ["", "?", "  ", "NA"])
def test_a_record_without_an_owner_is_refused(tmp_path: Path, owner: str):
    # all of them together would count as one patient, and each real owner would move the sum by twice the clip norm
    error = refused(tmp_path, with_owners("a", owner, "b"), patient_column="mrn")
    assert str(error) == "a record has no patient"
    assert "line 3, column mrn" in error.detail


def test_a_missing_patient_column_is_refused(tmp_path: Path):
    assert "no column mrn" in refused(tmp_path, text(HANSEN), patient_column="mrn").detail
    assert "no column mrn" in refused(tmp_path, text(HANSEN, header=False), patient_column="mrn", header=False).detail


@settings(max_examples=30, deadline=None, derandomize=True)
@given(owners=st.lists(st.integers(0, 12), min_size=1, max_size=40), holdout=st.floats(0, 0.99), seed=st.integers(0, 5))
def test_no_patient_is_both_trained_on_and_held_out(
    tmp_path_factory: pytest.TempPathFactory, owners: list[int], holdout: float, seed: int
):
    file = tmp_path_factory.mktemp("data") / "t.csv"
    ages = [str(20 + owner) for owner in owners]  # an age for each patient tells them apart
    file.write_text(text([*NAMES, "mrn"], *([age, *HANSEN[1:], f"p{age}"] for age in ages), header=False))
    source = DataSource(loader="table", path=file, patient_column="mrn", holdout=holdout, holdout_seed=seed)
    training, held_out = open_records(source, HEART)
    trained = {round(float(row[0]), 4) for row in training.fields["table"]}
    kept = {round(float(row[0]), 4) for row in held_out.fields["table"]}
    assert not trained & kept
    assert len(training) + len(held_out) == len(owners)
    assert training.patients + held_out.patients == len(set(owners))
    again, _ = open_records(source, HEART)
    assert torch.equal(again.fields["table"], training.fields["table"])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    owners=st.lists(st.integers(0, 8), min_size=2, max_size=20),
    column=st.booleans(),
    seed=st.integers(0, 5),
    left_out=st.integers(0, 19),
)
def test_whether_a_patient_is_held_out_does_not_depend_on_who_else_is_there(
    tmp_path_factory: pytest.TempPathFactory, owners: list[int], column: bool, seed: int, left_out: int
):
    """Else removing one patient would move others between training and test, and one would weigh as much as many."""
    folder = tmp_path_factory.mktemp("data")
    gone = owners[left_out % len(owners)]
    sides = []
    for present in (owners, [owner for owner in owners if owner != gone]):
        if not present:
            return
        rows = [[str(20 + owner), *HANSEN[1:], f"p{owner}"] for owner in present]
        (folder / "t.csv").write_text(text([*NAMES, "mrn"], *rows, header=False))
        mrn = {"patient_column": "mrn"} if column else {}
        source = DataSource(loader="table", path=folder / "t.csv", holdout=0.4, holdout_seed=seed, **mrn)  # type: ignore[arg-type]
        training, _ = open_records(source, HEART)
        sides.append({round(float(row[0]) * 20 + 50) - 20 for row in training.fields["table"]})
    assert sides[0] - {gone} == sides[1]


# --- constants only -------------------------------------------------------------------------------------------------------

ROWS = st.fixed_dictionaries({
    "age": st.integers(18, 110), "sex": st.sampled_from([0, 1]), "cp": st.integers(1, 4),
    "trestbps": st.one_of(st.just("?"), st.integers(50, 260)),
    "chol": st.one_of(st.sampled_from(["?", 0]), st.integers(50, 700)),
    "thalach": st.floats(40, 230), "oldpeak": st.one_of(st.just("?"), st.floats(-5, 10)), "num": st.integers(0, 4),
})  # fmt: skip


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(ROWS, min_size=2, max_size=8))
def test_how_a_record_is_encoded_does_not_depend_on_the_others(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]
):
    folder = tmp_path_factory.mktemp("data")
    cells = [a_row(**{name: str(value) for name, value in row.items()}) for row in rows]
    together = load(folder, text(*cells))
    for number, row in enumerate(cells):
        alone = load(folder, text(row))
        assert torch.equal(alone.fields["table"][0], together.fields["table"][number])
        assert alone.label[0] == together.label[number]
    assert float(together.fields["table"].abs().max()) <= 1.5  # cut to three scales, over the common scale of two


@pytest.mark.parametrize(("site", "count"), [("cleveland", 303), ("hungarian", 294), ("switzerland", 123), ("va", 200)])
def test_the_shipped_records_load(site: str, count: int):
    file = SITES.parent / "data" / "heart_disease" / f"processed.{site}.data"
    records, held_out = open_records(DataSource(loader="table", path=file, header=False, holdout=0.3333), HEART)
    assert len(records) + len(held_out) == count
    assert 0.25 * count < len(held_out) < 0.42 * count  # each patient by an own hash, so not to the last one
    assert bool(records.fields["table"].isfinite().all())


# --- arrays ---------------------------------------------------------------------------------------------------------------


def films(count: int = 4, **changes: Any) -> dict[str, Any]:
    image = (np.arange(count * 784) % 256).astype(np.uint8).reshape(count, 1, 28, 28)
    return {"image": image, "label": np.arange(count) % 2, "owner": np.array(["b", "a", "b", "c"][:count]), **changes}


def written(folder: Path, arrays: dict[str, Any]) -> Path:
    file = folder / "hansen.npz"
    np.savez(file, **arrays)
    return file


def load_films(file: Path, **terms: Any) -> Records:
    return open_records(DataSource(loader="arrays", path=file, **terms), FILM)[0]


def films_refused(file: Path, **terms: Any) -> DataRefused:
    with pytest.raises(DataRefused) as found:
        load_films(file, **terms)
    said = str(found.value)
    assert str(file) not in said
    assert "hansen" not in said.lower()
    return found.value


def test_arrays_are_read_as_they_stand(tmp_path: Path):
    records = load_films(written(tmp_path, films()), patient_column="owner")
    assert records.fields["image"].shape == (4, 1, 28, 28)
    assert records.fields["image"].dtype == torch.float32
    assert float(records.fields["image"][0, 0, 0, 3]) == pytest.approx(3 / 255)
    assert records.label.tolist() == [0, 1, 0, 1]
    assert records.patient.tolist() == [0, 1, 0, 2]


def test_without_a_patient_column_each_record_is_a_patient_in_the_files_order(tmp_path: Path):
    file = written(tmp_path, {"image": np.zeros((12, 1, 28, 28)), "label": np.zeros(12, dtype=int)})
    assert load_films(file).patient.tolist() == list(range(12))


@pytest.mark.parametrize("arrays", [
    films(image=np.zeros((4, 28, 28))),
    films(image=np.zeros((3, 1, 28, 28))),
    films(image=np.zeros((4, 1, 28, 28), dtype="U5")),
    films(image=np.zeros((4, 1, 28, 28), dtype=complex)),
    films(image=np.full((4, 1, 28, 28), 256)),
    films(image=np.full((4, 1, 28, 28), -1.0)),
    films(image=np.full((4, 1, 28, 28), np.nan)),
    films(image=np.full((4, 1, 28, 28), 1e300)),
    films(image=np.array(3.0)),
    films(label=np.array([0, 1, 2, 0])),
    films(label=np.array([0, 1, -1, 0])),
    films(label=np.array([0, 0.5, 1, 0])),
    films(label=np.array([0, np.nan, 1, 0])),
    films(label=np.zeros((4, 1), dtype=int)),
    films(label=np.zeros(3, dtype=int)),
    films(label=np.array(["0", "1", "0", "Hansen"])),
    films(label=np.array(0)),
    films(label=np.zeros(0, dtype=int), image=np.zeros((0, 1, 28, 28))),
    {"image": np.zeros((4, 1, 28, 28))},
    {"label": np.zeros(4, dtype=int)},
], ids=str)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any]):
    films_refused(written(tmp_path, arrays))


@pytest.mark.parametrize("owner", [
    np.array(["a", "", "b", "c"]), np.array(["a", " ", "b", "c"]), np.array([1.0, np.nan, 2.0, 3.0]),
    np.array(["a", "b"]), np.array("a"),
], ids=str)  # fmt: skip
def test_arrays_without_an_owner_for_each_record_are_refused(tmp_path: Path, owner: Any):
    films_refused(written(tmp_path, films(owner=owner)), patient_column="owner")


def test_a_patient_column_that_is_not_there_is_refused(tmp_path: Path):
    assert "mrn" in films_refused(written(tmp_path, films()), patient_column="mrn").detail


def test_nothing_in_an_archive_is_unpickled(tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    file = tmp_path / "hansen.npz"
    np.savez(file, image=films()["image"], label=np.array([Bomb(), 1, 0, 1], dtype=object))
    films_refused(file)
    file.write_bytes(pickle.dumps(Bomb()))
    films_refused(file)
    assert not (tmp_path / "exploded").exists()


def test_a_single_array_or_a_foreign_archive_is_refused(tmp_path: Path):
    file = tmp_path / "hansen.npz"
    with file.open("wb") as stream:
        np.save(stream, np.zeros(3))
    films_refused(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("image", b"Hansen")
        archive.writestr("label", b"Hansen")
    films_refused(file)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**14, 1, 28, 28)})
    with zipfile.ZipFile(file, "w") as archive:  # claims a petabyte
        archive.writestr("image.npy", header.getvalue())
        archive.writestr("label.npy", header.getvalue())
    films_refused(file)


def test_what_unfolds_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = written(tmp_path, films())
    monkeypatch.setattr("wardround.client.data.npz.LARGEST_ARCHIVE", 4 * 28 * 28)  # so much are the pictures alone
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unfolded"))
    assert "larger than 4 GiB" in films_refused(file).detail


@pytest.mark.parametrize("terms", [{}, {"patient_column": "owner"}])
def test_more_labels_than_pictures_are_refused_before_they_are_listed(tmp_path: Path, terms: dict[str, str]):
    error = films_refused(written(tmp_path, films(label=np.zeros(5, dtype=int))), **terms)
    assert str(error) == "the arrays differ in their number of records"


def test_labels_without_pictures_are_refused_before_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageSchema, "encode_arrays", lambda *_: pytest.fail("listed"))
    file = written(tmp_path, films(image=np.zeros(4, dtype=np.uint8)))
    with pytest.raises(DataRefused, match="not one picture for each record") as found:
        open_records(DataSource(loader="arrays", path=file), TASKS["chest-xray"])
    assert str(file) in found.value.detail


@settings(max_examples=60, deadline=None, derandomize=True)
@given(share=st.floats(0, 0.999), flipped=st.booleans(), packed=st.booleans())
def test_a_damaged_archive_is_refused_or_whole(
    tmp_path_factory: pytest.TempPathFactory, share: float, flipped: bool, packed: bool
):
    file = tmp_path_factory.mktemp("data") / "hansen.npz"
    (np.savez_compressed if packed else np.savez)(file, **films())
    content = bytearray(file.read_bytes())
    place = int(share * len(content))
    if flipped:
        content[place] ^= 0x55
    else:
        del content[place:]
    file.write_bytes(content)
    with contextlib.suppress(DataRefused):
        load_films(file, patient_column="owner")
        assert flipped  # a truncated one is never whole


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 255), min_size=2, max_size=6))
def test_how_an_image_is_encoded_does_not_depend_on_the_others(greys: list[int]):
    schema = FILM.schema
    assert isinstance(schema, ArraySchema)
    images = np.stack([np.full((1, 28, 28), grey) for grey in greys])
    together = schema.encode({"image": images}, np.zeros(len(greys), dtype=int), [str(n) for n in range(len(greys))])
    for number in range(len(greys)):
        alone = schema.encode({"image": images[number : number + 1]}, np.zeros(1, dtype=int), ["0"])
        assert torch.equal(alone.fields["image"][0], together.fields["image"][number])
