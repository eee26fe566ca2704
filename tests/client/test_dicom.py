"""DICOM: a record is what a viewer shows, whose it is stands in the header, and a header that points at a person is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wardround.client.data import dicom
from wardround.client.data.dicom import dicom_files, load_dicom, read_dicom
from wardround.client.data.identifiers import IDENTIFIERS, identifiers, is_placeholder
from wardround.client.data.loaded import Loaded
from wardround.client.policy import DataSource
from wardround.common.errors import ConfigError, DataRefused
from wardround.common.tasks import Task
from wardround.common.tasks.images import ImageSchema

pydicom = pytest.importorskip("pydicom", reason="pydicom, of the extra `dicom`, is not installed")

PLAIN = ImageSchema(side=4, centre=0, scale=1)
REAL = ("PrivateTags", "PatientName", "PatientBirthDate", "ImageComments", "BurnedInAnnotation")


def written(path: Path, pixels: Any = None, **header: Any) -> Path:
    """One CT slice of nobody, with these attributes besides; None leaves one out."""
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    pixels = np.full((4, 4), 1024, dtype=np.uint16) if pixels is None else np.asarray(pixels)
    dataset = pydicom.Dataset()
    values = {
        "SOPClassUID": CTImageStorage, "SOPInstanceUID": generate_uid(), "PatientID": "p1", "PatientName": "", "Modality": "CT",
        "SamplesPerPixel": 3 if pixels.ndim == 3 else 1, "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0], "Columns": pixels.shape[1], "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 8 * pixels.itemsize, "HighBit": 8 * pixels.itemsize - 1, "PixelRepresentation": 0,
        "RescaleIntercept": -1024, "RescaleSlope": 1, "PixelData": pixels.tobytes(), **header,
    }  # fmt: skip
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def source(place: Path, labels: str = "file,label\na.dcm,1\n", **terms: Any) -> DataSource:
    (place / "labels.csv").write_text(labels)
    return DataSource(loader="dicom", **{"path": place / "raw", "labels": place / "labels.csv", **terms})


def load(found: DataSource, schema: ImageSchema = PLAIN) -> Loaded:
    return load_dicom(found, Task("slices", "Slices", schema, build=lambda options: torch.nn.Identity()))


def refused(found: DataSource, schema: ImageSchema = PLAIN) -> DataRefused:
    with pytest.raises(DataRefused) as error:
        load(found, schema)
    said = str(error.value)
    assert not any(word in said.lower() for word in ("hansen", ".dcm", "/", "19520101"))
    return error.value


def values(found: DataSource, schema: ImageSchema = PLAIN) -> list[float]:
    return load(found, schema).records.fields["image"][0].flatten().tolist()


# --- what is shown --------------------------------------------------------------------------------------------------------


def test_the_tasks_window_is_in_modality_units(tmp_path: Path):
    written(tmp_path / "raw" / "a.dcm", np.full((4, 4), 532, np.uint16), RescaleSlope=2, WindowCenter=0, WindowWidth=10)
    schema = ImageSchema(side=4, centre=0, scale=1, window=(40, 400))
    assert values(source(tmp_path), schema) == [127.5] * 16  # 2 x 532 - 1024 = 40


def test_the_files_own_window_comes_next_and_then_its_own_range(tmp_path: Path):
    ramp = np.arange(16, dtype=np.uint16).reshape(4, 4)
    written(tmp_path / "raw" / "a.dcm", ramp, RescaleIntercept=0, WindowCenter=[8.5, 1], WindowWidth=[3, 1])  # the first of two
    assert values(source(tmp_path)) == [0] * 8 + [127.5] + [255] * 7
    written(tmp_path / "raw" / "a.dcm", ramp, RescaleIntercept=0)
    assert values(source(tmp_path)) == pytest.approx(np.linspace(0, 255, 16).tolist(), rel=1e-4)
    written(tmp_path / "raw" / "a.dcm", np.zeros((4, 4), np.uint16))
    assert len(set(values(source(tmp_path)))) == 1


@pytest.mark.parametrize(("function", "centre", "width"), [("LINEAR", 8.5, 11), (None, 8.5, 11), ("LINEAR_EXACT", 8, 10)])
def test_both_kinds_of_straight_windows_mean_what_the_standard_says(
    tmp_path: Path, function: str | None, centre: float, width: float
):
    ramp = np.arange(16, dtype=np.uint16).reshape(4, 4)
    header = {"RescaleIntercept": 0, "WindowCenter": centre, "WindowWidth": width, "VOILUTFunction": function}
    written(tmp_path / "raw" / "a.dcm", ramp, **header)
    assert values(source(tmp_path)) == pytest.approx(np.clip((np.arange(16) - 3) * 25.5, 0, 255).tolist(), abs=1e-3)


def test_padding_does_not_stretch_a_files_own_range(tmp_path: Path):
    slice_ = np.arange(100, 116, dtype=np.uint16).reshape(4, 4)
    slice_[0, 0] = 0
    written(tmp_path / "raw" / "a.dcm", slice_, PixelPaddingValue=0)
    assert values(source(tmp_path))[1] == 0


def test_more_is_brighter_also_in_monochrome1(tmp_path: Path):
    ramp = np.arange(16, dtype=np.uint16).reshape(4, 4)
    written(tmp_path / "raw" / "a.dcm", ramp)
    upright = values(source(tmp_path))
    written(tmp_path / "raw" / "a.dcm", ramp, PhotometricInterpretation="MONOCHROME1")
    assert values(source(tmp_path)) == pytest.approx([255 - value for value in upright], abs=1e-3)


def test_colours_run_over_the_schemas_range(tmp_path: Path):
    colours = np.zeros((4, 4, 3), np.uint8)
    colours[..., 0] = 255
    written(tmp_path / "raw" / "a.dcm", colours, PhotometricInterpretation="RGB", PlanarConfiguration=0, RescaleSlope=None)
    found = load(source(tmp_path), ImageSchema(side=4, channels=3, centre=0, scale=1)).records.fields["image"]
    assert found.amax((0, 2, 3)).tolist() == [255, 0, 0]


# --- whose, and which -----------------------------------------------------------------------------------------------------


def test_the_patient_stands_in_the_header_and_files_go_by_path_uid_or_name(tmp_path: Path):
    for number, name in enumerate(["one/a", "two/b.dcm", "two/c.dcm"]):
        written(tmp_path / "raw" / name, PatientID=f"p{number % 2}", SOPInstanceUID=f"1.2.{number}")
    loaded = load(source(tmp_path, "file,label\n1.2.2,0\none/a,1\nb.dcm,1\n"))
    assert loaded.owner == ["p0", "p0", "p1"]
    assert loaded.records.label.tolist() == [0, 1, 1]
    again = load(source(tmp_path, "file,label,mrn\n1.2.2,0,x\none/a,1,y\n", patient_column="mrn"))
    assert again.owner == ["x", "y"]
    assert "twice" in str(refused(source(tmp_path, "file,label\n1.2.2,0\ntwo/c.dcm,1\n")))


def test_a_name_that_two_files_have_is_nobodys(tmp_path: Path):
    for folder in ("one", "two"):
        written(tmp_path / "raw" / folder / "a.dcm")
    assert "not there" in str(refused(source(tmp_path)))


@pytest.mark.parametrize("damaged", ["a.dcm", "one/a.dcm"])
@pytest.mark.parametrize("content", [bytes(128) + b"DICM" + bytes(50), b"cut"])
def test_a_damaged_files_label_goes_to_no_other_picture(tmp_path: Path, damaged: str, content: bytes):
    for number, name in enumerate([damaged, "two/a.dcm", "b.dcm"]):
        written(tmp_path / "raw" / name, PatientID=f"p{number}", SOPInstanceUID=f"1.2.{number}")
    (tmp_path / "raw" / damaged).write_bytes(content)
    loaded = load(source(tmp_path, "file,label\na.dcm,1\nb.dcm,0\n", unreadable=1))
    assert loaded.owner == ["p2"]
    assert loaded.records.label.tolist() == [0]


def test_a_path_is_a_file_even_where_another_files_uid_is_written_so(tmp_path: Path):
    written(tmp_path / "raw" / "b.dcm", SOPInstanceUID="1.2.3")
    (tmp_path / "raw" / "1.2.3").write_bytes(b"damaged")
    assert "cannot be read" in str(refused(source(tmp_path, "file,label\n1.2.3,1\n")))


def test_a_deflated_file_is_refused_before_it_is_inflated(tmp_path: Path):
    path = written(tmp_path / "raw" / "a.dcm")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    with pytest.raises(DataRefused, match="deflated"):
        read_dicom(path, pixels=False)
    refused(source(tmp_path))


@pytest.mark.parametrize("owner", ["", "ANONYMOUS", "anonymized", "0000", "unknown", None])
def test_a_record_without_a_patient_of_its_own_is_refused(tmp_path: Path, owner: str | None):
    written(tmp_path / "raw" / "a.dcm", PatientID=owner)
    assert str(refused(source(tmp_path, unreadable=5))) == "a record has no patient"
    assert load(source(tmp_path, "file,label,mrn\na.dcm,1,p7\n", patient_column="mrn")).owner == ["p7"]
    assert not is_placeholder("p7")


def test_an_object_that_is_there_twice_is_refused(tmp_path: Path):
    for name in ("a.dcm", "b.dcm"):
        written(tmp_path / "raw" / name, SOPInstanceUID="1.2.3")
    assert "same DICOM object" in str(refused(source(tmp_path)))


def test_what_lies_outside_or_is_not_listed_is_not_opened(tmp_path: Path):
    written(tmp_path / "raw" / "a.dcm")
    (tmp_path / "raw" / "notes.txt").write_text("Hansen")
    (tmp_path / "raw" / "b.dcm").write_bytes(bytes(128) + b"DICM" + bytes(50))  # unreadable, and nobody lists it
    assert len(load(source(tmp_path)).records) == 1
    assert "outside" in str(refused(source(tmp_path, "file,label\n../hansen.dcm,0\n", unreadable=5)))
    written(tmp_path / "hansen.dcm")
    (tmp_path / "raw" / "c.dcm").symlink_to(tmp_path / "hansen.dcm")
    assert "outside" in str(refused(source(tmp_path)))


@pytest.mark.parametrize("change", [
    {"Modality": "MR"}, {"NumberOfFrames": 2}, {"PixelData": bytes(3)}, {"PixelData": None}, {"Rows": None}, {"Rows": 0},
    {"BitsAllocated": 12}, {"PhotometricInterpretation": None}, {"Rows": 60_000, "Columns": 60_000}, {"RescaleSlope": "1E999"},
])  # fmt: skip
def test_what_cannot_be_shown_is_refused_or_passed_over_as_often_as_allowed(tmp_path: Path, change: dict[str, Any]):
    from pydicom import config

    schema = ImageSchema(side=4, modalities=("CT", "CR"))
    with config.disable_value_validation():
        written(tmp_path / "raw" / "a.dcm", **change)
    written(tmp_path / "raw" / "b.dcm")
    both = "file,label\na.dcm,1\nb.dcm,0\n"
    assert "a.dcm" in refused(source(tmp_path, both), schema).detail
    assert load(source(tmp_path, both, unreadable=1), schema).records.label.tolist() == [0]


def test_a_truncated_file_is_refused_or_passed_over(tmp_path: Path):
    whole = written(tmp_path / "raw" / "a.dcm").read_bytes()
    for length in (0, 100, 140, 300, 600, len(whole) - 5):
        (tmp_path / "raw" / "a.dcm").write_bytes(whole[:length])
        refused(source(tmp_path))


def test_masks_and_boxes_go_with_slices(tmp_path: Path):
    from PIL import Image

    written(tmp_path / "raw" / "a.dcm")
    Image.new("L", (4, 4), 1).save(tmp_path / "raw" / "m.png")
    mask = load(source(tmp_path, "file,label\na.dcm,m.png\n"), ImageSchema(side=4, target="mask"))
    assert mask.records.label.sum() == 16
    boxes = load(source(tmp_path, "file,x0,y0,x1,y1\na.dcm,0,0,2,4\n"), ImageSchema(side=4, classes=0, target="boxes"))
    assert boxes.records.label[0, 0].tolist() == [0.25, 0.5, 0.5, 1.0]


# --- the gate -------------------------------------------------------------------------------------------------------------

POINTING: list[tuple[str, dict[str, Any]]] = [
    ("PatientName", {"PatientName": "Hansen^Kari"}), ("PatientBirthDate", {"PatientBirthDate": "19520101"}),
    ("PatientAddress", {"PatientAddress": "Hansen street 1"}), ("OtherPatientIDs", {"OtherPatientIDs": ["1", "2"]}),
    ("PatientTelephoneNumbers", {"PatientTelephoneNumbers": "123"}), ("PatientComments", {"PatientComments": "Hansen"}),
    ("ReferringPhysicianName", {"ReferringPhysicianName": "Hansen"}), ("AccessionNumber", {"AccessionNumber": "7"}),
    ("ImageComments", {"ImageComments": "Hansen"}), ("OperatorsName", {"OperatorsName": ["Anonymous", "Hansen"]}),
    ("BurnedInAnnotation", {"BurnedInAnnotation": "YES"}), ("BurnedInAnnotation", {"Modality": "US"}),
    ("BurnedInAnnotation", {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2"}),
    ("RecognizableVisualFeatures", {"RecognizableVisualFeatures": "YES"}), ("StudyID", {"StudyID": "A4711"}),
    ("PlacerOrderNumberImagingServiceRequest", {"PlacerOrderNumberImagingServiceRequest": "PO-4711"}),
    ("FillerOrderNumberImagingServiceRequest", {"FillerOrderNumberImagingServiceRequest": "FO-4711"}),
    ("RequestedProcedureID", {"RequestedProcedureID": "RP-4711"}), ("StudyDescription", {"StudyDescription": "Hansen"}),
    ("SeriesDescription", {"SeriesDescription": "Hansen"}), ("ProtocolName", {"ProtocolName": "Hansen"}),
    ("PerformedProcedureStepDescription", {"PerformedProcedureStepDescription": "Hansen"}),
    ("RequestedProcedureDescription", {"RequestedProcedureDescription": "Hansen"}),
]  # fmt: skip


@pytest.mark.parametrize(("keyword", "header"), POINTING)
def test_a_header_that_points_at_a_person_is_refused_unless_the_site_allows_it(
    tmp_path: Path, keyword: str, header: dict[str, Any]
):
    written(tmp_path / "raw" / "a.dcm")
    written(tmp_path / "raw" / "b.dcm", **header)  # the whole folder must be clean, listed or not
    error = refused(source(tmp_path, unreadable=5))
    assert keyword in error.detail
    assert "Hansen" not in error.detail
    assert len(load(source(tmp_path, allow_identifiers=("PatientSex", keyword))).records) == 1


def test_private_tags_and_what_lies_deep_are_found(tmp_path: Path):
    item = pydicom.Dataset()
    item.PersonName = "Hansen^Kari"
    outer = pydicom.Dataset()
    outer.ReferencedImageSequence = [item]
    path = written(tmp_path / "raw" / "a.dcm", SourceImageSequence=[outer])
    assert "PersonName" in refused(source(tmp_path)).detail
    dataset = pydicom.dcmread(path)
    del dataset.SourceImageSequence
    dataset.private_block(0x7FE3, "HANSEN CORP", create=True).add_new(1, "LO", "Hansen")  # behind the pixels
    dataset.save_as(path)
    assert "PrivateTags" in refused(source(tmp_path)).detail


@pytest.mark.parametrize(("tag", "kind", "value", "keyword"), [
    (0x60003000, "OW", b"\1\0", "OverlayData"), (0x60023000, "OW", b"\1\0", "OverlayData"),
    (0x60001500, "LO", "Hansen", "OverlayLabel"), (0x60024000, "LT", "Hansen", "OverlayComments"),
    (0x60000010, "US", 4, "OverlayRows"), (0x50003000, "OW", b"\1\0", "CurveData"), (0x501E0022, "LO", "Hansen", ""),
    (0x60000005, "LO", "Hansen", "PrivateTags"),
])  # fmt: skip
def test_nothing_of_an_overlay_or_a_curve_passes(tmp_path: Path, tag: int, kind: str, value: Any, keyword: str):
    path = written(tmp_path / "raw" / "a.dcm")
    dataset = pydicom.dcmread(path)
    dataset.add_new(tag, kind, value)
    dataset.save_as(path)
    assert keyword in refused(source(tmp_path)).detail
    found = identifiers(read_dicom(path))
    assert len(found) == 1
    assert len(load(source(tmp_path, allow_identifiers=tuple(found))).records) == 1


@pytest.mark.parametrize(("keyword", "kind", "value"), [
    ("PatientName", "LO", "Hansen^Kari"), ("PatientName", "OB", b"Hansen"), ("SourceImageSequence", "OB", b"Hansen"),
    ("Rows", "PN", "Hansen"),
])  # fmt: skip
def test_a_name_written_as_another_kind_of_value_is_found(tmp_path: Path, keyword: str, kind: str, value: str | bytes):
    dataset = pydicom.Dataset()
    dataset.add_new(keyword, kind, value)
    assert identifiers(dataset) == [keyword]


def test_a_public_tag_that_no_dictionary_knows_counts_as_private():
    dataset = pydicom.Dataset()
    dataset.add_new(0x00100003, "LO", "Hansen")
    assert identifiers(dataset) == ["PrivateTags"]
    length = pydicom.Dataset()
    length.add_new(0x00100000, "UL", 12)  # of a group, as old files have it
    assert not identifiers(length)


def test_a_file_whose_header_the_gate_cannot_read_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def undecodable(*_: object) -> list[str]:
        raise UnicodeDecodeError("utf-8", b"", 0, 0, "as some headers are")

    written(tmp_path / "raw" / "a.dcm", PatientName="Hansen^Kari")  # its pixels are fine
    monkeypatch.setattr(dicom, "identifiers", undecodable)
    assert "cannot be decoded" in refused(source(tmp_path)).detail


@pytest.mark.parametrize("name", ["", "ANONYMOUS", "Anonymized^^^", "anonymous 12", "removed", "P0123456789ABCDEF0123", "17"])
def test_a_name_that_says_that_there_is_none_passes(tmp_path: Path, name: str):
    assert not identifiers(read_dicom(written(tmp_path / "a.dcm", PatientName=name, BurnedInAnnotation="NO")))


@pytest.mark.parametrize("name", ["Hansen", "Anonymous^Hansen", "Anon Hansen", "x^y", "P0123"])
def test_a_name_that_only_begins_so_does_not(tmp_path: Path, name: str):
    assert identifiers(read_dicom(written(tmp_path / "a.dcm", PatientName=name))) == ["PatientName"]


def test_the_list_of_identifiers_has_no_slip_of_the_pen(tmp_path: Path):
    from pydicom.datadict import keyword_dict, repeater_has_keyword

    assert not [name for name in IDENTIFIERS if name not in keyword_dict and not repeater_has_keyword(name)]
    written(tmp_path / "raw" / "a.dcm")
    with pytest.raises(ConfigError, match="PatientNaem"):
        load(source(tmp_path, allow_identifiers=("PatientNaem",)))


def test_without_pydicom_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ConfigError, match=r"wardround\[dicom\]"):
        load(source(tmp_path))


# --- real files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Path:
    if "WARDROUND_DATA" not in os.environ:
        pytest.skip("WARDROUND_DATA, the folder of public data, is not set")
    return Path(os.environ["WARDROUND_DATA"]) / "dicom_samples"


@pytest.mark.parametrize(
    "name", ["CT_small", "MR_small", "explicit_VR-UN", "693_J2KI", "J2K_pixelrep_mismatch", "examples_overlay"]
)
def test_real_slices_of_several_transfer_syntaxes_are_shown(tmp_path: Path, real: Path, name: str):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.dcm").write_bytes((real / f"{name}.dcm").read_bytes())
    found = identifiers(read_dicom(tmp_path / "raw" / "a.dcm"))
    shown = load(source(tmp_path, allow_identifiers=tuple(found)), ImageSchema(side=32)).records.fields["image"]
    assert -1.001 < float(shown.min()) < 0 < float(shown.max()) < 1.001
    assert float(shown.std()) > 0.1


@pytest.mark.parametrize("name", ["examples_rgb_color", "examples_palette", "US1_J2KI"])
def test_real_colours_are_shown(tmp_path: Path, real: Path, name: str):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.dcm").write_bytes((real / f"{name}.dcm").read_bytes())
    found = identifiers(read_dicom(tmp_path / "raw" / "a.dcm"))
    assert "BurnedInAnnotation" in found  # ultrasound that does not say NO
    shown = load(source(tmp_path, allow_identifiers=tuple(found)), ImageSchema(side=32, channels=3)).records.fields["image"][0]
    assert float((shown[0] - shown[2]).abs().max()) > 0.1


def test_a_real_broken_file_and_real_files_without_pictures_are_passed_over(tmp_path: Path, real: Path):
    (tmp_path / "raw").mkdir()
    for name in ("bad_sequence", "waveform_ecg", "CT_small"):
        (tmp_path / "raw" / f"{name}.dcm").write_bytes((real / f"{name}.dcm").read_bytes())
    listed = "file,label\nbad_sequence.dcm,0\nwaveform_ecg.dcm,1\nCT_small.dcm,1\n"
    _, files = dicom_files(tmp_path / "raw")
    found = tuple({keyword for path in files for keyword in identifiers(read_dicom(path))})
    assert "a" in refused(source(tmp_path, listed, allow_identifiers=found)).detail
    loaded = load(source(tmp_path, listed, allow_identifiers=found, unreadable=2))
    assert "1CT1" in (loaded.owner or [])


def test_a_real_dicomdir_gives_its_patients(tmp_path: Path, real: Path):
    directory = real / "dicomdir_2patients" / "DICOMDIR"
    root, files = dicom_files(directory)
    names = [path.relative_to(root).as_posix() for path in files if path.name != "DICOMDIR"]
    found = tuple({keyword for path in files for keyword in identifiers(read_dicom(path))})
    listed = "file,label\n" + "".join(f"{name},0\n" for name in names)
    loaded = load(source(tmp_path, listed, path=directory, allow_identifiers=found), ImageSchema(side=8))
    assert len(names) == len(loaded.records) == 31
    assert loaded.records.patients == 2
    refused(source(tmp_path, listed, path=directory))
