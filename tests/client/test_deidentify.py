"""Cleaned copies: nothing in them points at a person, the same patient stays the same, and OUT is whole or not there."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress
from typer.testing import CliRunner, Result

from wardround.client import deidentify as command
from wardround.client.data.dicom import dicom_files, load_dicom, read_dicom
from wardround.client.data.identifiers import identifiers
from wardround.client.policy import DataSource
from wardround.common.errors import ConfigError, DataRefused
from wardround.common.tasks import Task
from wardround.common.tasks.images import ImageSchema

pydicom = pytest.importorskip("pydicom", reason="pydicom, of the extra `dicom`, is not installed")
from wardround.client.data.cleaning import CODES, EMPTIED, KEPT, UIDS, clean, other_uid, pseudonym  # noqa: E402

KEY = bytes(range(32))


def raw(path: Path, **header: Any) -> Path:
    """A CT slice that says much about Kari Hansen."""
    dataset = pydicom.Dataset()
    private = {"PatientComments": "Hansen", "PatientAddress": "Hansen street 1", "StudyDescription": "knee of Hansen"}
    values = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "SOPInstanceUID": "1.2.3", "StudyInstanceUID": "1.2",
        "SeriesInstanceUID": "1.9",
        "PatientID": "HANSEN19520101", "PatientName": "Hansen^Kari", "PatientBirthDate": "19520101", "StudyDate": "20260101",
        "Modality": "CT", "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": 4, "Columns": 4,
        "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0, "WindowCenter": 8, "WindowWidth": 16,
        "RescaleSlope": 1, "RescaleIntercept": 0, "PixelData": np.arange(16, dtype=np.uint16).tobytes(), **private, **header,
    }  # fmt: skip
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.private_block(0x0009, "HANSEN CORP", create=True).add_new(1, "LO", "Hansen")
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.SourceApplicationEntityTitle = "HANSEN"
    dataset.preamble = b"Hansen".ljust(128)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def run(place: Path, *options: str, source: str = "raw") -> Result:
    """`wardround deidentify raw clean --key key`."""
    app = typer.Typer()
    app.command()(command.deidentify)
    words = [str(place / source), str(place / "clean"), "--key", str(place / "key"), *options]
    return CliRunner().invoke(app, words, catch_exceptions=False)


def copies(place: Path) -> list[Path]:
    return sorted((place / "clean").rglob("*.dcm"))


def refused(place: Path, *options: str, kind: type[Exception] = DataRefused, source: str = "raw") -> str:
    before = sorted(place.rglob("*"))
    with pytest.raises(kind) as error:
        run(place, *options, source=source)
    assert sorted(path for path in place.rglob("*") if path.name != "key") == [path for path in before if path.name != "key"]
    assert "hansen" not in str(error.value).lower()
    return f"{error.value} {getattr(error.value, 'detail', '')}"


# --- what is in a copy ----------------------------------------------------------------------------------------------------


def test_no_byte_of_a_copy_names_the_patient_and_its_picture_is_the_same(tmp_path: Path):
    raw(tmp_path / "raw" / "Hansen, Kari.dcm")
    assert "1 pictures of 1 patients" in run(tmp_path).output
    (copy,) = copies(tmp_path)
    content = copy.read_bytes() + str(copy.relative_to(tmp_path)).encode()
    assert b"hansen" not in content.lower()
    assert b"19520101" not in content  # a whole date: new identifiers are random digits, and may hold any year
    assert b"20260101" not in content
    dataset = read_dicom(copy)
    assert not identifiers(dataset)
    assert dataset.pixel_array.tolist() == np.arange(16).reshape(4, 4).tolist()
    assert dataset.PatientIdentityRemoved == "YES"
    assert dataset.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    assert all(dataset[keyword].is_empty for keyword in EMPTIED)
    assert dataset.SOPInstanceUID == dataset.file_meta.MediaStorageSOPInstanceUID == copy.stem


def test_nothing_that_a_person_types_is_on_the_list_of_what_stays():
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    tags = {keyword: tag_for_keyword(keyword) for keyword in KEPT}
    assert None not in tags.values()
    kinds = {kind for tag in tags.values() for kind in dictionary_VR(tag or 0).split(" or ")}
    assert kinds <= {"CS", "DS", "IS", "US", "SS", "UI", "SQ", "OB", "OW", "OF", "OD"}
    assert not KEPT & {*UIDS, *EMPTIED, "PatientID", "PatientName"}


WORDS = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=6, max_size=16).map(lambda word: f"QX{word}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    words=st.lists(st.tuples(st.sampled_from(sorted(pydicom.datadict.keyword_dict)), WORDS), min_size=1, max_size=8),
    deep=st.booleans(),
)
def test_no_text_of_any_attribute_gets_into_a_copy(
    tmp_path_factory: pytest.TempPathFactory, words: list[tuple[str, str]], deep: bool
):
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    place = tmp_path_factory.mktemp("data")
    dataset = read_dicom(raw(place / "a.dcm"))
    item = pydicom.Dataset()
    dataset.SharedFunctionalGroupsSequence = [item]
    texts = {"LO", "SH", "LT", "ST", "UT", "PN", "UC", "AE", "CS"}
    for keyword, word in words:
        tag = tag_for_keyword(keyword)
        if tag is not None and tag >> 16 > 8 and dictionary_VR(tag) in texts and keyword != "PatientID":
            with pydicom.config.disable_value_validation():
                (item if deep else dataset).add_new(tag, dictionary_VR(tag), word.lower())
    with pydicom.config.disable_value_validation():
        clean(dataset, KEY, pixels_seen=True).save_as(place / "b.dcm", enforce_file_format=True)
    assert b"qx" not in (place / "b.dcm").read_bytes()


def test_a_name_hidden_as_a_code_or_as_another_kind_of_value_goes(tmp_path: Path):
    dataset = read_dicom(raw(tmp_path / "a.dcm"))
    dataset.add_new("ViewPosition", "CS", "LL")
    with pydicom.config.disable_value_validation():
        dataset.add_new("BodyPartExamined", "CS", "Hansen^Kari")
        dataset.add_new("ScanOptions", "LO", "HANSEN")
    cleaned = clean(dataset, KEY, pixels_seen=False)
    assert "BodyPartExamined" not in cleaned
    assert "ScanOptions" not in cleaned
    assert cleaned.ViewPosition == "LL"


def test_every_code_that_stays_is_one_that_the_standard_defines(tmp_path: Path):
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    assert {keyword for keyword in KEPT if dictionary_VR(tag_for_keyword(keyword) or 0) == "CS"} == set(CODES)
    header = {"ImageType": ["ORIGINAL", "PRIMARY", "HANSEN ANNA"], "BodyPartExamined": "MRN 4711", "ViewPosition": "PA"}
    cleaned = clean(read_dicom(raw(tmp_path / "a.dcm", **header)), KEY, pixels_seen=False)
    assert list(cleaned.ImageType) == ["ORIGINAL", "PRIMARY"]
    assert "BodyPartExamined" not in cleaned
    assert cleaned.ViewPosition == "PA"
    for value, kept in (("DERIVED", "DERIVED"), ("HANSEN", None), (["ORIGINAL", "HANSEN"], None)):
        cleaned = clean(read_dicom(raw(tmp_path / "a.dcm", ImageType=value)), KEY, pixels_seen=False)
        assert cleaned.get("ImageType") == kept


@pytest.mark.parametrize(("signed", "high", "values", "kept"), [
    (0, 11, [0x8FFF, 0x7001], [0x0FFF, 0x0001]), (1, 11, [0x8FFF, 0x8001, 0x77FF], [0xFFFF, 0x0001, 0x07FF]),
    (0, 15, [0xFFFF, 0x123F], [0xFFF0, 0x1230]), (0, 12, [0xFFFF], [0x1FFE]),
])  # fmt: skip
def test_bits_that_no_pixel_uses_hold_nothing(tmp_path: Path, signed: int, high: int, values: list[int], kept: list[int]):
    pixels = np.array(values, dtype="<u2").tobytes()
    header = {"BitsStored": 12, "HighBit": high, "PixelRepresentation": signed, "Rows": 1, "Columns": len(values)}
    raw(tmp_path / "raw" / "a.dcm", PixelData=pixels, **header)
    run(tmp_path)
    assert np.frombuffer(read_dicom(copies(tmp_path)[0]).PixelData, "<u2").tolist() == kept


@pytest.mark.parametrize("header", [{}, {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "Rows": 3, "Columns": 3}])
def test_no_byte_behind_the_last_pixel_stays(tmp_path: Path, header: dict[str, int]):
    raw(tmp_path / "raw" / "a.dcm", PixelData=bytes(range(32)) + b"HANSEN^ANNA 19520101", **header)
    run(tmp_path)
    (copy,) = copies(tmp_path)
    assert b"HANSEN" not in copy.read_bytes()
    assert read_dicom(copy).PixelData == (bytes(range(9)) + b"\0" if header else bytes(range(32)))


def test_pixels_deep_in_a_header_go(tmp_path: Path):
    item = pydicom.Dataset()
    item.PixelData = b"HANSEN"
    item["PixelData"].VR = "OW"
    raw(tmp_path / "raw" / "a.dcm", SharedFunctionalGroupsSequence=[item])
    run(tmp_path)
    assert b"HANSEN" not in copies(tmp_path)[0].read_bytes()


@pytest.mark.parametrize(("descriptor", "table", "fits"), [
    ([4, 0, 16], b"HANSEN^ANNA-1952", False), ([4, 0, 16], bytes(8), True), ([3, 0, 8], bytes(4), True),
    ([3, 0, 8], b"HANSEN^A", False),
])  # fmt: skip
def test_a_lookup_table_is_as_long_as_it_says(tmp_path: Path, descriptor: list[int], table: bytes, fits: bool):
    item = pydicom.Dataset()
    item.LUTDescriptor = descriptor
    item.add_new("LUTData", "OW", table)
    item["LUTDescriptor"].VR = "US"
    raw(tmp_path / "raw" / "a.dcm", VOILUTSequence=[item])
    if fits:
        run(tmp_path)
        assert read_dicom(copies(tmp_path)[0]).VOILUTSequence[0].LUTData == table
    else:
        assert "ValueError" in refused(tmp_path)


@pytest.mark.parametrize("header", [
    {"PixelData": bytes(30)}, {"BitsAllocated": 12}, {"BitsStored": 17}, {"HighBit": 3}, {"FloatPixelData": bytes(64)},
])  # fmt: skip
def test_pixels_that_are_not_what_the_header_says_cannot_be_read(tmp_path: Path, header: dict[str, Any]):
    raw(tmp_path / "raw" / "a.dcm", **header)
    raw(tmp_path / "raw" / "b.dcm", SOPInstanceUID="1.2.4")
    assert "ValueError" in refused(tmp_path)
    run(tmp_path, "--unreadable", "1")
    assert len(copies(tmp_path)) == 1


def test_compressed_pixels_wait_for_somebody_who_answers_for_them(tmp_path: Path):
    path = raw(tmp_path / "raw" / "a.dcm")
    dataset = pydicom.dcmread(path)
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    dataset.save_as(path)
    assert "--pixels-seen" in refused(tmp_path, "--unreadable", "5")
    run(tmp_path, "--pixels-seen")
    assert read_dicom(copies(tmp_path)[0]).pixel_array.tolist() == np.arange(16).reshape(4, 4).tolist()


def test_pixels_in_big_endian_are_refused(tmp_path: Path):
    dataset = read_dicom(raw(tmp_path / "a.dcm"))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    with pytest.raises(DataRefused, match="cannot be checked"):
        clean(dataset, KEY, pixels_seen=True)


@pytest.mark.parametrize("header", [
    {"BurnedInAnnotation": "YES"}, {"Modality": "US"}, {"RecognizableVisualFeatures": "YES"},
    {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
])  # fmt: skip
def test_pixels_that_may_name_somebody_are_refused_until_somebody_has_looked(tmp_path: Path, header: dict[str, str]):
    raw(tmp_path / "raw" / "a.dcm", **header)
    assert "--pixels-seen" in refused(tmp_path, "--unreadable", "5")  # a decision, not one of the files to leave out
    run(tmp_path, "--pixels-seen")
    assert read_dicom(copies(tmp_path)[0]).BurnedInAnnotation == "NO"


# --- pseudonyms -----------------------------------------------------------------------------------------------------------


def test_a_patient_keeps_the_pseudonym_from_run_to_run_and_has_another_under_another_key(tmp_path: Path):
    for number in range(3):
        raw(tmp_path / "raw" / f"{number}.dcm", PatientID=f"p{number % 2}", SOPInstanceUID=f"1.2.{number}")
    run(tmp_path)
    first = copies(tmp_path)
    assert len({path.parent.name for path in first}) == 2
    assert {path.parent.name for path in first} == {pseudonym(command.read_key(tmp_path / "key"), f"p{n}") for n in range(2)}
    (tmp_path / "clean").rename(tmp_path / "earlier")
    run(tmp_path)
    assert copies(tmp_path) == first
    assert [p.read_bytes() for p in copies(tmp_path)] == [p.read_bytes() for p in sorted((tmp_path / "earlier").rglob("*.dcm"))]
    (tmp_path / "clean").rename(tmp_path / "later")
    (tmp_path / "key").unlink()
    run(tmp_path)
    assert not {path.parent.name for path in copies(tmp_path)} & {path.parent.name for path in first}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(max_size=20), st.text(max_size=20), st.binary(min_size=32, max_size=32))
def test_pseudonyms_and_uids_are_valid_and_tell_texts_apart(one: str, other: str, key: bytes):
    assert (pseudonym(key, one) == pseudonym(key, other)) == (one == other)
    assert (other_uid(key, one) == other_uid(key, other)) == (one == other)
    assert pydicom.uid.UID(other_uid(key, one)).is_valid
    assert pseudonym(key, one) != pseudonym(key[::-1], one) or key == key[::-1]


@pytest.mark.skipif(os.name != "posix", reason="file modes are a thing of POSIX")
def test_a_key_is_secret_or_refused(tmp_path: Path):
    raw(tmp_path / "raw" / "a.dcm")
    assert len(command.read_key(tmp_path / "key")) == 32
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert command.read_key(tmp_path / "key") == command.read_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    assert "chmod 600" in refused(tmp_path, kind=ConfigError)
    (tmp_path / "key").chmod(0o600)
    for content in ("", "00", "x" * 64, "00" * 33):
        (tmp_path / "key").write_text(content)
        assert "no key" in refused(tmp_path, kind=ConfigError)


# --- whole or not there ---------------------------------------------------------------------------------------------------


def test_nothing_is_written_over(tmp_path: Path):
    raw(tmp_path / "raw" / "a.dcm")
    (tmp_path / "clean").mkdir()
    assert run(tmp_path).exit_code == 0  # empty is as good as absent
    assert "written over" in refused(tmp_path, kind=ConfigError)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="written over"):
        command.deidentify(tmp_path / "raw", tmp_path / "file", key=tmp_path / "key")


@pytest.mark.parametrize(("source", "target", "key"), [
    ("raw", "raw/clean", "key"), ("clean/raw", "clean", "key"), ("raw", "clean", "clean/key"), ("raw", "raw", "key"),
    ("raw", "no/clean", "key"), ("raw", "clean", "raw/key"),
])  # fmt: skip
def test_in_out_and_key_lie_apart(tmp_path: Path, source: str, target: str, key: str):
    (tmp_path / "raw").mkdir()
    with pytest.raises(ConfigError):
        command.deidentify(tmp_path / source, tmp_path / target, key=tmp_path / key)
    assert [path.name for path in tmp_path.rglob("*")] == ["raw"]


@pytest.mark.parametrize("content", [b"DICM", b"DICM" + bytes(300), None])
def test_one_file_too_many_that_cannot_be_read_and_there_is_no_out(tmp_path: Path, content: bytes | None):
    whole = raw(tmp_path / "raw" / "a.dcm").read_bytes()
    (tmp_path / "raw" / "b.dcm").write_bytes(bytes(128) + content if content else whole[:300])
    raw(tmp_path / "raw" / "c.dcm", SOPInstanceUID="1.2.4")
    refused(tmp_path)
    assert "1 files that cannot be read" in run(tmp_path, "--unreadable", "1").output
    assert len(copies(tmp_path)) == 2


def test_a_record_without_a_patient_and_an_object_that_is_there_twice_are_refused(tmp_path: Path):
    raw(tmp_path / "raw" / "a.dcm")
    raw(tmp_path / "raw" / "b.dcm", PatientID="ANONYMOUS", SOPInstanceUID="1.2.4")
    assert "no patient" in refused(tmp_path, "--unreadable", "5")
    raw(tmp_path / "raw" / "b.dcm")
    assert "same DICOM object" in refused(tmp_path)


def test_a_folder_without_pictures_is_refused(tmp_path: Path):
    (tmp_path / "raw").mkdir()
    assert "no pictures" in refused(tmp_path)
    assert "not there" in refused(tmp_path, source="elsewhere")


def test_a_copy_that_would_not_pass_the_gate_is_never_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from wardround.client.data import cleaning

    raw(tmp_path / "raw" / "a.dcm")
    monkeypatch.setattr(cleaning, "KEPT", KEPT | {"PatientComments"})  # a slip in the list
    assert "PatientComments" in refused(tmp_path, "--unreadable", "5")


# --- labels and training --------------------------------------------------------------------------------------------------


def test_labels_go_along_under_the_new_names_and_without_other_columns(tmp_path: Path):
    for number in range(3):
        raw(tmp_path / "raw" / f"{number}.dcm", PatientID=f"p{number % 2}", SOPInstanceUID=f"1.2.{number}")
    labels = tmp_path / "labels.csv"
    labels.write_text("name,image,finding\nHansen,0.dcm,1\nHansen,1.2.1,0\nHansen,./2.dcm,1\nHansen,9.dcm,1\n")
    output = run(tmp_path, "--labels", str(labels), "--file-column", "image", "--column", "finding").output
    assert "lists 3 of them" in output
    found = (tmp_path / "clean" / "labels.csv").read_text()
    assert "Hansen" not in found
    assert [row["finding"] for row in csv.DictReader(found.splitlines())] == ["1", "0", "1"]
    source = DataSource(
        loader="dicom", path=tmp_path / "clean", labels=tmp_path / "clean" / "labels.csv", label_column="finding"
    )
    task = Task("slices", "Slices", ImageSchema(side=4), build=lambda options: torch.nn.Identity())
    loaded = load_dicom(source, task)
    assert loaded.records.label.tolist() == [1, 0, 1]
    assert loaded.records.patient.tolist() == [0, 1, 0]


def test_a_damaged_files_label_goes_to_no_other_copy(tmp_path: Path):
    raw(tmp_path / "raw" / "one" / "a.dcm")
    raw(tmp_path / "raw" / "b.dcm", SOPInstanceUID="1.2.4")
    (tmp_path / "raw" / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(50))
    (tmp_path / "labels.csv").write_text("file,label\na.dcm,1\nb.dcm,0\n")
    run(tmp_path, "--labels", str(tmp_path / "labels.csv"), "--unreadable", "1")
    found = list(csv.DictReader((tmp_path / "clean" / "labels.csv").read_text().splitlines()))
    assert [row["label"] for row in found] == ["0"]


@pytest.mark.skipif(os.name != "posix", reason="signals are a thing of POSIX")
def test_a_run_that_is_told_to_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from wardround.client.data import cleaning

    def told(cleaned: object, path: Path) -> None:
        path.parent.mkdir()
        path.write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)

    raw(tmp_path / "raw" / "a.dcm")
    monkeypatch.setattr(cleaning, "write_clean", told)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert run(tmp_path).exit_code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "raw"]


def test_a_bar_is_shown_when_it_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(3):
        raw(tmp_path / "raw" / f"{number}.dcm", SOPInstanceUID=f"1.2.{number}")
    begun: list[object] = []
    monkeypatch.setattr(Progress, "start", lambda bar: begun.append(bar))
    run(tmp_path)
    assert not begun
    (tmp_path / "clean").rename(tmp_path / "earlier")
    monkeypatch.setattr(command, "PATIENCE", -1.0)
    run(tmp_path)
    assert len(begun) == 1


def test_real_files_are_cleaned(tmp_path: Path):
    if "WARDROUND_DATA" not in os.environ:
        pytest.skip("WARDROUND_DATA, the folder of public data, is not set")
    real = Path(os.environ["WARDROUND_DATA"]) / "dicom_samples"
    (tmp_path / "raw").mkdir()
    for name in ("CT_small", "MR_small", "US1_J2KI", "bad_sequence", "eCT_Supplemental", "rtplan", "explicit_VR-UN"):
        (tmp_path / "raw" / f"{name}.dcm").write_bytes((real / f"{name}.dcm").read_bytes())
    assert "without a picture" in run(tmp_path, "--pixels-seen").output
    _, files = dicom_files(tmp_path / "clean")
    assert len(files) == 6
    assert not [keyword for path in files for keyword in identifiers(read_dicom(path))]


def test_a_real_dicomdir_is_cleaned_to_its_two_patients(tmp_path: Path):
    if "WARDROUND_DATA" not in os.environ:
        pytest.skip("WARDROUND_DATA, the folder of public data, is not set")
    (tmp_path / "raw").symlink_to(Path(os.environ["WARDROUND_DATA"]) / "dicom_samples" / "dicomdir_2patients")
    assert "31 pictures of 2 patients" in run(tmp_path).output
    assert b"Doe" not in b"".join(path.read_bytes() for path in copies(tmp_path))
