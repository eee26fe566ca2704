"""Pictures in files: what is shown is what is read, nothing outside the folder is opened, and doubt is a refusal."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wardround.client.data.annotations import Listed, read_labels, read_voc
from wardround.client.data.image_files import load_images
from wardround.client.data.loaded import Loaded
from wardround.client.data.medmnist import load_medmnist
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import TASKS, Task
from wardround.common.tasks.images import ImageSchema

GREY = ImageSchema(side=8, class_names=("normal", "pneumonia"))
MASK = ImageSchema(side=8, classes=3, target="mask")
BOXES = ImageSchema(side=8, classes=0, target="boxes", most_boxes=2)
PLAIN = {"centre": 0.0, "scale": 1.0}


def task(schema: ImageSchema = GREY) -> Task:
    return Task("films", "Films", schema, build=lambda options: torch.nn.Identity())


def picture(value: int = 100, size: tuple[int, int] = (10, 8), mode: str = "L") -> Image.Image:
    """Of one grey, (width, height)."""
    return Image.new(mode, size, value if mode in ("L", "P", "I;16", "1") else (value,) * len(mode))


def folder(place: Path, labels: str = "", **files: Any) -> DataSource:
    """`place/films` with these pictures (a__png is a.png), and `place/hansen.csv`."""
    films = place / "films"
    films.mkdir(exist_ok=True)
    for name, content in files.items():
        file = films / name.replace("__", ".")
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            content.save(file)
    if labels:
        (place / "hansen.csv").write_text(labels)
    return DataSource(loader="images", path=films, labels=place / "hansen.csv" if labels else None)


def load(source: DataSource, schema: ImageSchema = GREY, **terms: Any) -> Loaded:
    return load_images(source.model_copy(update=terms), task(schema))


def refused(source: DataSource, schema: ImageSchema = GREY, **terms: Any) -> DataRefused:
    with pytest.raises(DataRefused) as found:
        load(source, schema, **terms)
    said = str(found.value)
    assert not any(word in said.lower() for word in ("hansen", ".png", ".csv", str(source.path.parent)))
    assert "\n" not in said
    return found.value


# --- from pixels to a record ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "shape"), [(1, (5, 9)), (3, (5, 9)), (1, (20, 11, 3)), (3, (20, 11, 3))])
@pytest.mark.parametrize("crop", ["square", "whole"])
def test_a_picture_of_any_shape_becomes_the_records_shape(channels: Any, shape: tuple[int, ...], crop: Any):
    schema = ImageSchema(side=6, channels=channels, crop=crop)
    ready = schema.prepare(np.full(shape, 255, dtype=np.uint8))
    assert ready.shape == schema.blank(1).fields["image"].shape[1:]
    assert ready.dtype == torch.float32
    assert torch.allclose(ready, torch.ones_like(ready))  # (255 - 127.5) / 127.5


def test_grey_is_the_luma_of_a_colour():
    colours = np.zeros((4, 4, 3), dtype=np.uint8)
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        colours[:] = 0
        colours[..., channel] = 200
        assert float(ImageSchema(side=4, **PLAIN).prepare(colours).mean()) == pytest.approx(200 * weight, rel=1e-5)


def test_the_square_cut_is_the_centre_and_the_whole_is_not_cut():
    wide = np.zeros((4, 8), dtype=np.uint8)
    wide[:, 2:6] = 200
    assert ImageSchema(side=4, **PLAIN).prepare(wide).min() == 200
    assert ImageSchema(side=4, crop="whole", **PLAIN).prepare(wide).min() < 100


def test_a_fine_pattern_becomes_its_mean_and_not_another_pattern():
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 200
    small = ImageSchema(side=8, **PLAIN).prepare(stripes)
    assert float((small - 100).abs().max()) < 5  # every eighth column alone would be 200 throughout


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 255), st.integers(0, 255), st.integers(2, 12), st.integers(2, 12))
def test_a_picture_normalised_by_itself_has_mean_zero_and_deviation_one(low: int, high: int, height: int, width: int):
    values = np.full((height, width), low, dtype=np.uint8)
    values[: height // 2] = high
    ready = ImageSchema(side=6, normalise="image").prepare(values)
    assert bool(ready.isfinite().all())
    assert abs(float(ready.mean())) < 1e-3
    assert float(ready.std(correction=0)) == pytest.approx(0 if low == high else 1, abs=1e-3)


@pytest.mark.parametrize("values", [
    np.full((4, 4), 256), np.full((4, 4), -1.0), np.full((4, 4), np.nan), np.full((4, 4), np.inf), np.zeros((4, 4), dtype="U1"),
    np.zeros((4, 4), dtype=complex), np.zeros((4, 4, 4)), np.zeros(4), np.zeros((0, 4)), np.zeros((1, 9)),
], ids=str)  # fmt: skip
def test_what_is_no_picture_of_the_schemas_range_is_refused(values: Any):
    with pytest.raises(DataRefused):
        GREY.prepare(values)


def test_the_window_is_linear_between_its_ends_and_cut_beyond():
    shown = GREY.windowed(np.array([-1000.0, -160, 40, 140, 240, 3000]), 40, 400)
    assert shown.tolist() == pytest.approx([0, 0, 127.5, 191.25, 255, 255])


def test_a_mask_follows_the_pictures_cut_and_size():
    mask = np.zeros((8, 16), dtype=np.uint8)
    mask[:, 4:8], mask[:, 8:12], mask[:, :2] = 1, 2, 2
    small = MASK.prepare_mask(mask)
    assert small.dtype == torch.int64
    assert small[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]  # columns 4 to 11; what stands at the edges is cut off
    assert ImageSchema(side=2, target="mask").prepare_mask(np.array([[0, 255], [255, 0]])).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("mask", [np.full((4, 4), 3), np.full((4, 4), -1), np.full((4, 4), 255), np.full((4, 4), 0.5)], ids=str)
def test_a_mask_with_a_class_the_task_does_not_have_is_refused(mask: Any):
    with pytest.raises(DataRefused):
        MASK.prepare_mask(mask)


def test_a_box_follows_the_pictures_cut_and_size():
    found = BOXES.prepare_boxes([(4, 0, 8, 4), (0, 0, 3, 8), (2, 2, 6, 4)], (8, 16))  # the cut keeps columns 4 to 11
    assert found[0].tolist() == [0.25, 0.25, 0.5, 0.5]
    assert found[1].tolist() == [0.125, 0.375, 0.25, 0.25]  # its left half is cut off; the second box wholly
    assert BOXES.prepare_boxes([], (8, 16)).tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("box", [(0, 0, 17, 4), (-1, 0, 4, 4), (4, 4, 4, 8), (8, 0, 4, 4), (float("nan"), 0, 4, 4)])
def test_a_box_outside_its_picture_or_without_area_is_refused(box: Any):
    with pytest.raises(DataRefused):
        BOXES.prepare_boxes([box], (8, 16))


def test_more_boxes_than_there_is_room_for_are_refused():
    with pytest.raises(DataRefused):
        BOXES.prepare_boxes([(4, 0, 8, 4)] * 3, (8, 16))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 20), st.integers(2, 20), st.data())
def test_a_box_marks_the_same_pixels_in_file_and_record(height: int, width: int, data: st.DataObject):
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[y0:y1, x0:x1] = 1
    side = min(height, width)
    share = ImageSchema(side=side, target="mask").prepare_mask(mask).float().mean()  # the cut alone, no resizing
    (_, _, box_width, box_height), *_ = BOXES.prepare_boxes([(x0, y0, x1, y1)], (height, width)).tolist()
    assert box_width * box_height == pytest.approx(float(share), abs=1e-5)


def test_records_that_do_not_fit_the_schema_are_refused():
    image, label = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    assert GREY.encode(image, label, ["a", "a"]).patients == 1
    for wrong in [
        (image[:1], label), (image.double(), label), (image, label.float()), (image, torch.tensor([0, 2])),
        (image, torch.tensor([0, -1])), (image / 0, label), (image[:, :, :4], label), (image, label[:, None]),
    ]:  # fmt: skip
        with pytest.raises(DataRefused):
            GREY.encode(*wrong, ["a", "b"])


def test_a_schema_that_contradicts_itself_is_a_programming_error():
    for wrong in [{"classes": 0}, {"classes": 2, "target": "boxes"}, {"classes": 3, "class_names": ("a", "b")}]:
        with pytest.raises(ValueError, match="class"):
            ImageSchema(side=8, **wrong)  # type: ignore[arg-type]


# --- folders --------------------------------------------------------------------------------------------------------------


def test_pictures_are_read_in_the_labels_order_with_their_patients(tmp_path: Path):
    source = folder(
        tmp_path, "mrn,file,label\np1,b.png,pneumonia\np2,a.jpg,0\n p1 ,c.tif,1\n",
        a__jpg=picture(20), b__png=picture(40), c__tif=picture(60), d__png=b"listed by nobody",
    )  # fmt: skip
    loaded = load(source, ImageSchema(side=8, class_names=("normal", "pneumonia"), **PLAIN), patient_column="mrn")
    assert loaded.records.fields["image"].amax((1, 2, 3)).tolist() == [40, 20, 60]
    assert loaded.records.label.tolist() == [1, 0, 1]
    assert loaded.records.patient.tolist() == [0, 1, 0]
    assert loaded.owner == ["p1", "p2", "p1"]
    assert load(source).owner is None
    assert load(source).records.patients == 3


def test_a_folder_a_class_is_read_without_labels(tmp_path: Path):
    source = folder(tmp_path)
    for name in ("pneumonia/deep/a.png", "normal/b.PNG", "normal/.hidden.png", "normal/notes.txt"):
        (source.path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(source.path / name, format="PNG")
    assert load(source).records.label.tolist() == [0, 1]
    refused(source, patient_column="mrn")
    refused(source, MASK)
    (source.path / "hansen").mkdir()
    picture().save(source.path / "hansen" / "x.png")
    assert "'hansen'" in refused(source).detail


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"])
def test_every_kind_of_8_bit_picture_is_read(tmp_path: Path, mode: str):
    name = "a__tif" if mode == "CMYK" else "a__png"
    source = folder(tmp_path, f"file,label\n{name.replace('__', '.')},0\n", **{name: picture(0, mode=mode)})
    assert load(source).records.fields["image"].shape == (1, 1, 8, 8)
    assert load(source, ImageSchema(side=8, channels=3)).records.fields["image"].shape == (1, 3, 8, 8)


def test_16_bits_keep_their_depth(tmp_path: Path):
    source = folder(tmp_path, "file,label\na.png,0\n", a__png=Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)))
    deep = ImageSchema(side=8, high=65_535, **PLAIN)
    assert float(load(source, deep).records.fields["image"].max()) == 40_000
    assert "range" in str(refused(source))


def test_a_turned_photograph_is_set_upright_unless_its_pixels_are_marked(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    photo = picture(0, (8, 8))
    photo.paste(200, (0, 0, 8, 4))
    source = folder(tmp_path, "file,label,x0,y0,x1,y1\na.png,0,0,0,4,4\n")
    photo.save(source.path / "a.png", exif=exif)
    assert load(source, ImageSchema(side=8, **PLAIN)).records.fields["image"][0, 0, :, 0].tolist() == [0.0] * 4 + [200.0] * 4
    assert "turned" in str(refused(source, BOXES))


def test_masks_lie_beside_their_pictures(tmp_path: Path):
    mask = Image.new("P", (10, 8), 2)
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])  # the positions count, not the colours
    source = folder(tmp_path, "file,mask\na.png,m.png\n", a__png=picture(), m__png=mask)
    assert load(source, MASK, label_column="mask").records.label.unique().tolist() == [2]
    mask.resize((8, 8)).save(source.path / "m.png")
    assert "differ in size" in str(refused(source, MASK, label_column="mask"))
    mask.convert("RGB").save(source.path / "m.png")
    assert "plane" in str(refused(source, MASK, label_column="mask"))
    (source.path / "m.png").unlink()
    assert "not there" in str(refused(source, MASK, label_column="mask"))
    (tmp_path / "hansen.csv").write_text("file,mask\na.png,../hansen.csv\n")
    assert "outside" in str(refused(source, MASK, label_column="mask"))


def test_boxes_come_one_a_line_or_from_voc_files(tmp_path: Path):
    source = folder(
        tmp_path, "file,mrn,x0,y0,x1,y1\na.png,p1,1,0,5,4\nb.png,p2,,,,\na.png,p1,1,4,9,8\n",
        a__png=picture(), b__png=picture(),
    )  # fmt: skip
    loaded = load(source, BOXES, patient_column="mrn")
    assert loaded.records.label.tolist() == [[[0.25, 0.25, 0.5, 0.5], [0.5, 0.75, 1.0, 0.5]], [[0.0] * 4] * 2]
    assert loaded.owner == ["p1", "p2"]
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc" / "a.xml").write_text(voc("a.png", (2, 1, 5, 4)))
    found = load(source, BOXES, labels=tmp_path / "voc")
    assert found.records.label[0, 0].tolist() == [0.25, 0.25, 0.5, 0.5]  # from 1, the last one included
    refused(source, BOXES, labels=tmp_path / "voc", patient_column="mrn")
    (tmp_path / "voc" / "b.xml").write_text(voc("a.png"))
    assert "twice" in str(refused(source, BOXES, labels=tmp_path / "voc"))
    (tmp_path / "hansen.csv").write_text("file,mrn,x0,y0,x1,y1\na.png,p1,1,0,5,4\na.png,p2,1,0,5,4\n")
    assert "two patients" in str(refused(source, BOXES, patient_column="mrn"))


# --- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [
    "", "file,label\n", "file\na.png\n", "file,label,label\na.png,0,0\n", "file,label\na.png\n", "file,label\n,0\n",
    "file,label\na.png,\n", "file,label\na.png,tumour\n", "file,label\na.png,2\n", "file,label\na.png,0\na.png,0\n",
    "file,label\na.png,0\n./a.png,0\n", "file,label\n../hansen.csv,0\n", "file,label\n/etc/passwd,0\n",
    'file,label\n"a\0.png",0\n', "file,label\n\xff.png,0\n",
])  # fmt: skip
def test_labels_that_are_in_doubt_are_refused_before_a_picture_is_opened(tmp_path: Path, labels: str):
    source = folder(tmp_path, "x", a__png=b"would be unreadable")
    (tmp_path / "hansen.csv").write_bytes(labels.encode("latin-1"))
    assert "picture cannot be read" not in str(refused(source, unreadable=10))


def test_a_file_under_two_names_is_one_file(tmp_path: Path):
    source = folder(tmp_path, "file,label\na.png,0\n./a.png,0\n", a__png=picture())
    assert "twice" in str(refused(source))


@pytest.mark.parametrize("owner", ["", "?", "NA"])
def test_a_picture_without_a_patient_is_refused(tmp_path: Path, owner: str):
    source = folder(tmp_path, f"file,label,mrn\na.png,0,{owner}\n", a__png=picture())
    assert str(refused(source, patient_column="mrn")) == "a record has no patient"
    assert "mrn" in refused(source, patient_column="nhs").detail or "nhs" in refused(source, patient_column="nhs").detail


@functools.cache
def damaged() -> dict[str, bytes]:
    png, tif = io.BytesIO(), io.BytesIO()
    Image.effect_noise((40, 40), 50).save(png, format="PNG")
    picture().save(tif, format="TIFF", save_all=True, append_images=[picture()])
    huge = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(huge, format="PNG")  # a few kilobytes that unfold to 81 million pixels
    whole = png.getvalue()
    return {
        "empty": b"", "truncated": whole[: len(whole) // 2], "corrupt": whole[:60] + bytes(30) + whole[90:],
        "text": b"Hansen", "bomb": huge.getvalue(), "two frames": tif.getvalue(), "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    }  # fmt: skip


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_file_is_refused_or_passed_over_as_often_as_allowed(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
):
    content = damaged()[kind]
    source = folder(tmp_path, "file,label\na.png,0\nb.png,1\nc.png,1\n", a__png=content, b__png=picture(), c__png=content)
    assert "a.png" in refused(source).detail
    assert "c.png" in refused(source, unreadable=1).detail
    with caplog.at_level(logging.WARNING, "wardround.site"):
        assert load(source, unreadable=2).records.label.tolist() == [1]
    assert "2 files passed over" in caplog.text


def test_nothing_left_is_refused(tmp_path: Path):
    source = folder(tmp_path, "file,label\na.png,0\n")
    assert "not there" in str(refused(source))
    assert str(refused(source, unreadable=5)) == "there are no pictures"
    assert "folder" in str(refused(source, path=tmp_path / "elsewhere"))
    (source.path / "normal").mkdir()
    assert str(refused(source, labels=None)) == "there are no pictures"


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path):
    source = folder(tmp_path, "file,label\na.png,0\n", b__png=picture())
    picture().save(tmp_path / "outside.png")
    (source.path / "a.png").symlink_to(tmp_path / "outside.png")
    assert "outside" in str(refused(source, unreadable=5))
    (source.path / "a.png").unlink()
    (source.path / "a.png").symlink_to(source.path / "b.png")
    assert len(load(source).records) == 1
    (source.path / "a.png").unlink()
    (source.path / "a.png").symlink_to(source.path / "a.png")  # in a circle
    refused(source)


@pytest.mark.skipif(os.name != "posix", reason="pipes with names are a thing of POSIX")
def test_what_is_no_plain_file_is_never_opened(tmp_path: Path):
    source = folder(tmp_path, "file,label\na.png,0\n")
    os.mkfifo(source.path / "a.png")  # reading it would wait for ever
    refused(source)


def test_another_kind_of_task_is_refused(tmp_path: Path):
    with pytest.raises(DataRefused, match="does not read pictures"):
        load_images(folder(tmp_path, "file,label\na.png,0\n", a__png=picture()), TASKS["heart-disease"])


# --- parsers --------------------------------------------------------------------------------------------------------------


def voc(file: str, *boxes: tuple[float, ...], name: str = "nodule") -> str:
    things = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for a, b, c, d in boxes
    )
    return f"<annotation><filename>{file}</filename>{things}</annotation>"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(*[st.floats(1, 1e6)] * 4), max_size=4))
def test_a_voc_file_gives_back_its_boxes(boxes: list[tuple[float, ...]]):
    found = read_voc(voc("a.png", *boxes), "a.xml", names=("nodule",))
    assert found.file == "a.png"
    assert list(found.boxes) == [(a - 1, b - 1, c, d) for a, b, c, d in boxes]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.one_of(st.text(max_size=60), st.integers(0, 260).map(lambda n: voc("a.png", (1, 2, 3, 4), (5, 6, 7, 8))[:n])))
def test_any_other_text_is_refused_in_our_own_words(text: str):
    with pytest.raises(DataRefused):
        read_voc(text, "a.xml")


@pytest.mark.parametrize("text", [
    '<!DOCTYPE a [<!ENTITY b "c">]>' + voc("&b;"), voc("a.png", (1, 2, 3, 4), name="tumour"), voc(""),
    voc("a.png", ("x", 1, 2, 3)), voc("a.png", ("", "", "", "")), voc("a.png", ("nan", 1, 2, 3)),
    "<annotation></annotation>", "<x><filename>a</filename></x>",
])  # fmt: skip
def test_a_voc_file_in_doubt_is_refused(text: str):
    with pytest.raises(DataRefused):
        read_voc(text, "a.xml", names=("nodule",))


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), max_size=8)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(CELL, CELL, CELL), max_size=5), target=st.sampled_from([GREY, MASK, BOXES]))
def test_any_labels_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], target: ImageSchema
):
    file = tmp_path_factory.mktemp("data") / "l.csv"
    file.write_text(
        "file,label,mrn,x0,y0,x1,y1\n" + "".join(",".join([*row, "1", "2", "3", "4"]) + "\n" for row in rows), "utf-8"
    )
    source = DataSource(loader="images", path=file.parent, labels=file, patient_column="mrn")
    try:
        found = read_labels(source, target)
    except DataRefused:
        return
    assert all(isinstance(entry, Listed) and entry.file and entry.patient for entry in found)
    assert len({entry.file for entry in found}) == len(found)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(share=st.floats(0, 0.999), flipped=st.booleans(), kind=st.sampled_from(["PNG", "JPEG", "TIFF", "BMP"]))
def test_a_file_damaged_anywhere_is_refused_or_a_picture(
    tmp_path_factory: pytest.TempPathFactory, share: float, flipped: bool, kind: str
):
    place = tmp_path_factory.mktemp("data")
    source = folder(place, "file,label\na.png,0\n")
    file = source.path / "a.png"
    Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20) % 251).save(file, format=kind)
    content = bytearray(file.read_bytes())
    if flipped:
        content[int(share * len(content))] ^= 0x55
    else:
        del content[int(share * len(content)) :]
    file.write_bytes(content)
    with contextlib.suppress(DataRefused):
        assert load(source).records.fields["image"].shape == (1, 1, 8, 8)


# --- MedMNIST -------------------------------------------------------------------------------------------------------------


def medmnist(place: Path, **changes: Any) -> DataSource:
    arrays: dict[str, Any] = {}
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        arrays[f"{part}_images"] = np.full((count, 28, 28), {"train": 10, "val": 20, "test": 30}[part], dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count, dtype=np.uint8)[:, None] % 2
    np.savez(place / "hansenmnist.npz", **{**arrays, **changes})
    return DataSource(loader="medmnist", path=place / "hansenmnist.npz")


def test_the_test_part_of_medmnist_is_held_out(tmp_path: Path):
    loaded = load_medmnist(medmnist(tmp_path), task(ImageSchema(side=28, centre=0, scale=255)))
    assert loaded.records.fields["image"].shape == (9, 1, 28, 28)
    assert (loaded.records.fields["image"].amax((1, 2, 3)) * 255).round().tolist() == [10] * 4 + [20] * 2 + [30] * 3
    assert loaded.records.label.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert loaded.held_out is not None
    assert loaded.held_out.tolist() == [False] * 6 + [True] * 3
    assert loaded.owner is None
    assert loaded.records.patients == 9


@pytest.mark.parametrize("changes", [
    {"test_labels": np.zeros((3, 14), dtype=np.uint8)}, {"test_labels": np.zeros(3, dtype=np.uint8)},
    {"test_labels": np.full((3, 1), 2)}, {"test_labels": np.full((3, 1), 0.5)}, {"test_images": np.zeros((3, 64, 64))},
    {"val_images": np.zeros((2, 28, 28, 28))}, {"val_images": np.zeros((1, 28, 28))},
    {"train_images": np.full((4, 28, 28), 300)}, {"train_images": np.array(["Hansen"], dtype=object)},
], ids=str)  # fmt: skip
def test_another_npz_is_refused(tmp_path: Path, changes: dict[str, Any]):
    source = medmnist(tmp_path, **changes)
    with pytest.raises(DataRefused) as found:
        load_medmnist(source, TASKS["chest-xray"])
    assert str(tmp_path) not in str(found.value)
    assert "hansenmnist" in found.value.detail


def test_what_unfolds_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = medmnist(tmp_path)
    monkeypatch.setattr("wardround.client.data.npz.LARGEST_ARCHIVE", 9 * 28 * 28)
    with pytest.raises(DataRefused, match="the pictures cannot be read") as found:
        load_medmnist(source, task(ImageSchema(side=28)))
    assert "larger than 4 GiB" in found.value.detail


def test_a_file_that_is_not_there_says_how_to_get_it_and_fetches_nothing(tmp_path: Path):
    with pytest.raises(DataRefused) as found:
        load_medmnist(DataSource(loader="medmnist", path=tmp_path / "pneumoniamnist.npz"), TASKS["chest-xray"])
    assert "download" in found.value.detail
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataRefused, match="no patients"):
        load_medmnist(medmnist(tmp_path).model_copy(update={"patient_column": "mrn"}), TASKS["chest-xray"])
    with pytest.raises(DataRefused, match="does not read pictures"):
        load_medmnist(medmnist(tmp_path), TASKS["heart-disease"])


def test_the_real_file_loads():
    if "WARDROUND_DATA" not in os.environ:
        pytest.skip("WARDROUND_DATA, the folder of public data, is not set")
    (file,) = Path(os.environ["WARDROUND_DATA"]).glob("pneumonia_mnist*/pneumoniamnist.npz")
    loaded = load_medmnist(DataSource(loader="medmnist", path=file), TASKS["chest-xray"])
    assert loaded.held_out is not None
    assert 0 < int(loaded.held_out.sum()) < len(loaded.records) / 2
    assert set(loaded.records.label.tolist()) == {0, 1}
