"""Explanations add up, follow what was learnt, show what they say they show, and stay with their owner."""

from __future__ import annotations

import html.parser
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tomli_w
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nets import Net
from task_nets import CASES
from wardround.client.dp.proof import made_up
from wardround.client.interpret import Request, explain
from wardround.client.interpret.answers import Answers, answers, exact_model, exact_records, score_of
from wardround.client.interpret.attributions import Attribution, attribute, embedding_of, kind_of, last_convolution
from wardround.client.interpret.choice import choose
from wardround.client.interpret.command import explained_of
from wardround.client.interpret.likeness import likeness, rank_correlation
from wardround.client.interpret.pages import page_of, table_of, write_private
from wardround.client.interpret.study import Files, Opened, open_study
from wardround.client.interpret.views import reading, views
from wardround.client.policy import SiteConfig
from wardround.common import cli
from wardround.common.errors import ConfigError
from wardround.common.models import MODELS
from wardround.common.models.detector import detection_loss
from wardround.common.plan import SignedText, StudyPlan
from wardround.common.tasks import TASKS, ArraySchema, Column, Records, Task
from wardround.common.tasks.base import cross_entropy
from wardround.common.tasks.images import ImageSchema
from wardround.common.tasks.sequences import SequenceSchema
from wardround.common.tasks.text import TextSchema, bucket
from wardround.common.weights import digest, trainable
from wardround.simulations import STUDIES
from wardround.simulations.run import simulate
from wardround.simulations.scenario import Changes, Scenario

pytest.importorskip("captum", reason="captum is not installed: pip install wardround[explain]")

ANSWERING = sorted(name for name, task in TASKS.items() if task.makes is None)


def task_of(schema: Any, network: Callable[[], nn.Module], loss: Any = cross_entropy) -> Task:
    return Task("made-up", "Made up", schema, lambda options: network(), loss)


def table_task(width: int, network: Callable[[], nn.Module], classes: int = 2) -> Task:
    return task_of(ArraySchema({"table": (width,)}, classes=classes, low=-9, high=9), network)


def the_first(task: Task, model: nn.Module, records: Records) -> tuple[Records, Attribution]:
    model, record = exact_model(model), exact_records(records).take(torch.tensor([0]))
    with torch.no_grad():
        score = score_of(task, model(**record.fields))
    return record, attribute(task, model, record, score)


def opened(task: Task, count: int = 5, *, words: list[list[str]] | None = None, owner: list[str] | None = None) -> Opened:
    """A study of `task` at its first weights, whose held-out records are made up."""
    plan = StudyPlan(name="made-up", task=task.name, rounds=1, min_sites=1, sites={"here": 100}, seed=3)
    weights = trainable(task.model({}, 11))
    records = made_up(task.blank(1), torch.arange(count))
    number = torch.arange(1, count + 1)
    return Opened(SignedText(plan, "made up"), SiteConfig(site="here"), task, weights, records, number, owner, words or [])


class Page(html.parser.HTMLParser):
    """What a browser would find: tags, attributes, and the text a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# ---- every task


@pytest.mark.parametrize("name", ANSWERING)
def test_every_task_is_explained_and_its_weights_add_up(name: str):
    task = TASKS[name]
    explained = explained_of(opened(task), 2)
    table = json.loads(json.dumps(table_of(explained), allow_nan=False))
    assert len(table["records"]) == 2
    for shown, printed in zip(explained.shown, table["records"], strict=True):
        assert printed["fields"].keys() == task.blank(1).fields.keys()
        weights = [part.weight for view in shown.views for part in view.parts]
        found = shown.attribution
        assert found.adds_up
        assert sum(weights) == pytest.approx(found.score - found.reference + found.delta, abs=1e-9)
        for view in shown.views:
            assert view.pictures if view.kind == "picture" else view.parts
    page = Page(page_of(explained))
    assert "must stay at here" in page.text
    assert "attribution is not causation" in page.text


@pytest.mark.parametrize("name", ANSWERING)
def test_other_weights_give_another_explanation(name: str):
    task = TASKS[name]
    record = exact_records(made_up(task.blank(1), torch.arange(1)))
    one, other = (exact_model(task.model({}, seed)) for seed in (0, 1))
    with torch.no_grad():
        score = score_of(task, one(**record.fields))
    of_one, of_other = (attribute(task, model, record, score) for model in (one, other))
    assert set(likeness([(of_one, of_one)]).values()) == {1.0}
    assert all(value < 0.9 for value in likeness([(of_one, of_other)]).values())


def test_a_model_is_compared_with_other_first_weights_than_it_began_with():
    task = TASKS["heart-disease"]
    made = opened(task)
    at_the_start = replace(made, weights=trainable(task.model({}, made.study.plan.seed)))
    assert explained_of(at_the_start, 3).likeness["integrated"] < 0.9


@pytest.mark.parametrize("name", sorted(TASKS.keys() - ANSWERING))
def test_a_network_that_makes_pictures_has_no_answer_to_explain(name: str):
    with pytest.raises(ConfigError, match="makes pictures; it has no answer"):
        explained_of(opened(TASKS[name]), 2)


@pytest.mark.parametrize(
    ("network", "classes", "target", "loss"),
    [
        ("unet", 1, "mask", lambda logits, mask: (logits[:, 0] - mask).square().flatten(1).mean(1)),
        ("unet", 3, "mask", lambda logits, mask: cross_entropy(logits, mask).flatten(1).mean(1)),
        ("detector", 1, "boxes", detection_loss),
    ],
)
def test_masks_and_boxes_are_explained_by_what_is_marked(network: str, classes: int, target: Any, loss: Any):
    schema = ImageSchema(side=16, classes=0 if target == "boxes" else max(2, classes), target=target)
    task = task_of(schema, lambda: MODELS[network]({"side": 16, "width": 4, "depth": 2, "classes": classes}), loss)
    explained = explained_of(opened(task), 3)
    assert len({shown.number for shown in explained.shown}) == 3
    assert [shown.why for shown in explained.shown] == [
        "among the smallest errors", "among the largest errors", "a middling error",
    ]  # fmt: skip
    assert explained.shown[0].loss <= explained.shown[2].loss <= explained.shown[1].loss
    assert all(shown.attribution.grad_cam for shown in explained.shown)
    assert "error (the task's loss)" in Page(page_of(explained)).text


# ---- known answers


def map_of(*planes: list[list[float]]) -> Tensor:
    return torch.tensor([planes])


def test_the_number_that_is_explained_is_what_the_page_says_it_is():
    of_classes = table_task(1, nn.Identity, classes=3)
    logits = torch.tensor([[0.5, 2.0, -1.0]])
    probability = logits.softmax(1)[0, 1]
    score = score_of(of_classes, logits)
    assert float(score(logits)) == pytest.approx(float((probability / (1 - probability)).log()))
    assert float(score(-logits)) < 0  # of the answer that was given, whatever another network says

    one, several = (task_of(ImageSchema(side=2, classes=n, target="mask"), nn.Identity) for n in (2, 3))
    low = map_of([[-1, -2], [-3, -4]])
    assert float(score_of(one, low)(map_of([[2, -1], [3, -5]]))) == 5
    assert float(score_of(one, low)(low)) == -1
    of_three = map_of([[1, 1], [1, 1]], [[2, 0], [0, 0]], [[0, 4], [0, 0]])
    assert float(score_of(several, of_three)(of_three)) == (2 - 1) + (4 - 1)

    boxes = task_of(ImageSchema(side=8, classes=0, target="boxes"), nn.Identity, detection_loss)
    found = map_of([[-2, 3], [1, -1]], *[[[9, 9], [9, 9]]] * 4)
    assert float(score_of(boxes, found)(found)) == 4


def test_integrated_gradients_of_a_linear_network_are_weight_times_value():
    linear = nn.Linear(3, 2)
    record, found = the_first(table_task(3, lambda: Net(linear)), Net(linear), made_up_table(3))
    weight = linear.weight.detach()
    answer = int(linear(record.fields["table"]).argmax())
    expected = (weight[answer] - weight[1 - answer]) * record.fields["table"][0]
    torch.testing.assert_close(found.integrated["table"], expected)
    assert abs(found.delta) < 1e-7


def made_up_table(width: int, count: int = 1) -> Records:
    return made_up(Records({"table": torch.zeros(1, width)}, torch.zeros(1).long(), torch.zeros(1).long()), torch.arange(count))


class Words(nn.Module):
    """The sum of what each token is worth; padding is worth nothing, but is counted."""

    def __init__(self, worth: list[float]) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.tensor([[0.0, 0.0], *([0.0, w] for w in worth)]), padding_idx=0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens).sum(1) / (tokens != 0).sum(1, keepdim=True)


def test_integrated_gradients_of_tokens_are_what_each_is_worth_and_padding_is_worth_nothing():
    schema = ArraySchema({"tokens": (5,)}, classes=2, low=0, high=9)
    records = Records({"tokens": torch.tensor([[1, 3, 2, 0, 0]])}, torch.tensor([1]), torch.tensor([0]))
    _, found = the_first(task_of(schema, nn.Identity), Words([0.6, -0.3, 2.7]), records)
    assert found.integrated["tokens"].tolist() == pytest.approx([0.2, 0.9, -0.1, 0.0, 0.0])
    assert found.reference == pytest.approx(0.0)  # with the record's own padding: nothing but its words is taken away


class Spot(nn.Module):
    """Class 1 is what its first channel sees, class 0 what the second sees: the picture, and the picture upside down."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(1, 2, 1, bias=False)
        self.pooled = nn.Conv2d(2, 2, 1, bias=False)
        with torch.no_grad():
            self.look.weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
            self.pooled.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).reshape(2, 2, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.pooled(self.look(image).mean((2, 3), keepdim=True)).flatten(1)


SPOT = task_of(ImageSchema(side=8), Spot)


def spots() -> Records:
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2:4, 5:7] = 3.0
    image[0, 0, 7, 0] = -1.0
    return Records({"image": image}, torch.tensor([1]), torch.tensor([0]))


def test_grad_cam_is_bright_where_the_answer_comes_from_and_nowhere_else():
    record, found = the_first(SPOT, Spot(), spots())
    assert found.layer == {"image": "look"}  # the last convolution sees one place only, and has no map
    # each channel's mean gradient over 64 places is +1/64 or -1/64, times a channel that is the picture or its negative
    expected = record.fields["image"][0, 0].relu() * 2 / 64
    torch.testing.assert_close(found.grad_cam["image"], expected)
    torch.testing.assert_close(found.saliency["image"], torch.full((8, 8), 2 / 64, dtype=torch.float64))


def test_the_map_of_the_answer_itself_is_not_taken_for_what_led_to_it():
    model = MODELS["unet"]({"side": 16, "width": 4, "depth": 2})
    record = made_up(ImageSchema(side=16, target="mask").blank(1), torch.arange(1))
    last = last_convolution(model, record)
    assert last is not None
    assert last[0].startswith("up.")
    assert last_convolution(Net(nn.Flatten(), nn.Linear(256, 2)), record) is None


def test_every_registered_network_of_pictures_has_a_last_convolution():
    pictures = [case for case in CASES if case.fields.keys() == {"image"} and case.output == (3,)]
    assert len(pictures) >= 4  # the large ones take longer to import than all others to explain
    for case in pictures:
        with torch.device("meta"):
            model, image = case.build(), torch.zeros(1, *case.fields["image"])  # type: ignore[arg-type]
        assert last_convolution(model.eval(), Records({"image": image}, torch.zeros(1), torch.zeros(1))), str(case)


def test_a_norm_close_to_the_reference_does_not_spoil_the_sum():
    schema = ArraySchema({"signal": (1, 40)}, classes=2, low=-9, high=9)
    task = task_of(schema, lambda: MODELS["sequence-cnn"]({"channels": 1, "classes": 2, "widths": [8, 16]}))
    _, found = the_first(task, task.model({}, 5), made_up(schema.blank(1), torch.arange(1)))
    assert found.steps == 5 * 128
    assert found.adds_up


def test_a_picture_without_a_convolution_has_its_saliency_alone():
    task = task_of(ImageSchema(side=4), lambda: Net(nn.Flatten(), nn.Linear(16, 2)))
    explained = explained_of(opened(task), 1)
    (view,) = explained.shown[0].views
    assert [picture.title for picture in view.pictures] == ["the picture", "saliency"]
    assert view.note == "Grad-CAM needs a convolution that gives a map."


class Step(nn.Module):
    """A cliff that lies between two points of any path."""

    def forward(self, table: Tensor) -> Tensor:
        high = torch.sigmoid(1e9 * (table.sum(1, keepdim=True) - 0.123456789))
        return torch.cat([torch.zeros_like(high), 40 * high], 1)


def test_weights_that_do_not_add_up_say_so():
    task = table_task(2, Step)
    records = Records({"table": torch.tensor([[1.0, 1.0]])}, torch.tensor([1]), torch.tensor([0]))
    record, found = the_first(task, Step(), records)
    assert found.steps == 5 * 128
    assert found.delta == pytest.approx(-40, abs=1e-6)
    assert not found.adds_up
    explained = replace(explained_of(opened(table_task(2, lambda: Net(nn.Linear(2, 2)))), 1))
    shown = replace(explained.shown[0], attribution=found, views=views(task, record, found))
    assert "do not add up and should not be trusted" in Page(page_of(replace(explained, shown=[shown]))).text
    assert "should not be trusted" not in Page(page_of(explained)).text


def test_a_picture_stays_as_it_is_beside_fields_that_are_integrated():
    schema = ArraySchema({"image": (1, 16, 16), "tokens": (8,)}, classes=2, low=0, high=9)
    task = task_of(schema, lambda: MODELS["fusion"]({"channels": 1, "vocabulary": 9, "hidden": 8}))
    (shown,) = explained_of(opened(task), 1).shown
    assert shown.attribution.integrated.keys() == {"tokens"}
    assert shown.attribution.grad_cam.keys() == shown.attribution.saliency.keys() == {"image"}
    assert shown.attribution.adds_up


# ---- what is shown


PROBABILITY = st.floats(0.5, 1.0)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(PROBABILITY, st.booleans()), min_size=1, max_size=12), st.integers(1, 15))
def test_the_records_are_chosen_by_rule(found: list[tuple[float, bool]], count: int):
    certainty = torch.tensor([c for c, _ in found], dtype=torch.float64)
    label = torch.tensor([int(right) for _, right in found])
    said = Answers("class", torch.ones_like(label), certainty, certainty)
    chosen = choose(said, label, count)
    assert chosen == choose(said, label, count)
    assert len({c.position for c in chosen}) == len(chosen) == min(count, len(found))
    first: dict[str, int] = {}
    for c in chosen:
        first.setdefault(c.why, c.position)
    for why, wanted in (("that are right", 1), ("that are wrong", 0)):
        position = next((p for text, p in first.items() if text.endswith(why)), None)
        if position is not None:
            assert label[position] == wanted
    right = "among the most certain answers that are right"
    if bool(label.any()):
        assert certainty[first[right]] == certainty[label == 1].max()


def test_a_value_is_read_back_as_it_stood_in_the_file():
    age = Column("age", "years", 0, 120, centre=50, scale=10)
    kind = Column("thal", "scan", yes=(6, 7), no=(3,), may_be_missing=False)
    values = [62.0, 95.0, 1.0, np.nan]
    assert [reading(age, row) for row in age.encode(np.array(values))] == ["62", "at least 80", "at most 20", "not measured"]
    assert [reading(kind, row) for row in kind.encode(np.array([6.0, 3.0]))] == ["6 or 7", "3"]


def test_a_scaled_table_shows_the_values_of_its_file():
    task = TASKS["heart-disease"]
    row = {
        "age": 63, "sex": 1, "cp": 1, "trestbps": 145, "chol": 233, "fbs": 1, "restecg": 2, "thalach": 150, "exang": 0,
        "oldpeak": 2.3, "slope": 3, "ca": 0, "thal": np.nan, "num": 0,
    }  # fmt: skip
    records = task.schema.encode({name: np.array([value], dtype=np.float64) for name, value in row.items()}, ["p"])  # type: ignore[attr-defined]
    (shown,) = explained_of(replace(opened(task, 1), records=records), 1).shown
    assert [part.found for part in shown.views[0].parts] == [
        "63", "1", "1, 2 or 3", "1, 3 or 4", "145", "233", "1", "1 or 2", "150", "0", "2.3", "2 or 3", "0", "not measured",
    ]  # fmt: skip


def test_every_column_of_a_table_stands_on_the_page_by_name():
    page = Page(page_of(explained_of(opened(TASKS["heart-disease"]), 1))).text
    for column in TASKS["heart-disease"].schema.columns:  # type: ignore[attr-defined]
        assert f"{column.name}: {column.meaning}" in page


def test_every_variable_of_a_series_stands_on_the_page_with_its_hours():
    task = TASKS["icu-mortality"]
    explained = explained_of(opened(task), 1)
    series = next(view for view in explained.shown[0].views if view.kind == "series")
    weight = explained.shown[0].attribution.integrated["series"]
    assert [part.name.split(":")[0] for part in series.parts] == [v.name for v in task.schema.variables]  # type: ignore[attr-defined]
    assert series.columns[:2] == ["hour 0", "hour 2"]
    variables = len(series.parts)
    assert series.parts[4].cells[7] == pytest.approx(float(weight[7, 4] + weight[7, 4 + variables]))


def test_the_letters_of_a_sequence_are_shown():
    schema = SequenceSchema(length=5, alphabet="ACGT", unknown="N", labels=(("no",), ("yes",)))
    task = task_of(schema, lambda: MODELS["sequence-rnn"]({"vocabulary": schema.codes, "hidden": 4}))
    made = opened(task, 1)
    made = replace(made, records=schema.encode(["gcNtA"], ["yes"], ["p"]))
    (view,) = explained_of(made, 1).shown[0].views
    assert [part.name for part in view.parts] == ["G", "C", "?", "T", "A"]
    assert "one of N" in view.note
    assert explained_of(made, 1).shown[0].truth == "yes"


TEXT = TextSchema(length=6, buckets=50, labels=(("normal",), ("abnormal",)))
READER = {"vocabulary": TEXT.codes, "embedding": 4, "hidden": 4, "classes": 2}
TEXT_TASK = Task("text-made-up", "Texts", TEXT, lambda options: MODELS["text-rnn"](READER))


def text_site(folder: Path, monkeypatch: pytest.MonkeyPatch, **source: Any) -> Files:
    """A hospital with two reports, one of them hostile, and a model at its first weights."""
    monkeypatch.setattr("wardround.client.interpret.study.task_of", lambda plan: TEXT_TASK)
    rows = [
        ("patient", "text", "label"), ("<b>p1</b>", "No <script>alert(1)</script> Effusion!", "normal"),
        ("p2", "large effusion", "abnormal"),
    ]  # fmt: skip
    (folder / "reports.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    plan = {"name": "texts", "task": "text-made-up", "rounds": 1, "min_sites": 1, "sites": {"here": 2}, "seed": 1}
    (folder / "plan.toml").write_text(tomli_w.dumps(plan))
    data = {"loader": "text", "path": "reports.csv", "patient_column": "patient", "holdout": 0.9999, **source}
    (folder / "site.toml").write_text(tomli_w.dumps({"site": "here", "data": {"text-made-up": data}}))
    study = SignedText.load(folder / "plan.toml")
    save_model(folder / "model.safetensors", trainable(TEXT_TASK.model({}, 2)), study.digest)
    return Files(folder / "site.toml", folder / "plan.toml", folder / "model.safetensors")


def save_model(path: Path, weights: dict[str, Tensor], study: str) -> None:
    safetensors.torch.save_file({name: t.contiguous() for name, t in weights.items()}, path, metadata={"study": study})


def test_words_are_shown_where_the_hospitals_own_file_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = open_study(text_site(tmp_path, monkeypatch))
    assert found.words == [["no", "script", "alert", "1", "script", "effusion"], ["large", "effusion"]]
    views_of = [shown.views[0] for shown in explained_of(found, 2).shown]
    assert sorted([part.name for part in view.parts] for view in views_of) == sorted(found.words)


def test_words_are_those_of_the_record_they_stand_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = text_site(tmp_path, monkeypatch, holdout=0.5)
    rows = [f"p{n},finding number {n},normal" for n in range(12)]
    (tmp_path / "reports.csv").write_text("patient,text,label\n" + "\n".join(rows) + "\n")
    found = open_study(files)
    assert 0 < len(found.number) < 12
    assert found.words == [["finding", "number", str(n - 1)] for n in found.number.tolist()]
    assert found.owner == [f"p{n - 1}" for n in found.number.tolist()]


def test_numbers_of_words_are_shown_where_nobody_has_the_words():
    made = opened(TEXT_TASK, 1)
    made = replace(made, records=TEXT.encode(["large effusion"], ["normal"], ["p"]))
    (view,) = explained_of(made, 1).shown[0].views
    assert [part.name for part in view.parts] == [f"#{bucket('large', 50)}", f"#{bucket('effusion', 50)}"]
    assert "the numbers are shown" in view.note


def test_texts_of_files_are_escaped_and_the_page_fetches_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    explained = explained_of(open_study(text_site(tmp_path, monkeypatch)), 2)
    hostile = [replace(shown, patient="<script>x</script>\"'><img src=x onerror=y>") for shown in explained.shown]
    page = page_of(replace(explained, title="</title><script>", shown=hostile))
    found = Page(page)
    assert "<script>x</script>\"'><img src=x onerror=y>" in found.text
    assert {tag for tag, _ in found.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "h3", "p", "strong", "ul",
        "li", "span", "code", "div", "table", "caption", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert not any(name.startswith("on") or name in ("src", "href") for _, given in found.tags for name in given)
    assert not re.search(r"https?:|url\(|@import", page)


def test_a_page_with_pictures_brings_them_along():
    page = Page(page_of(explained_of(opened(SPOT), 1)))
    pictures = [given for tag, given in page.tags if tag == "img"]
    assert len(pictures) == 3
    assert all((given["src"] or "").startswith("data:image/png;base64,iVBOR") and given["alt"] for given in pictures)


# ---- refusals


def test_without_captum_the_way_to_get_it_is_named(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ConfigError, match=re.escape("pip install wardround[explain]")):
        explain(Request(run))


@pytest.mark.parametrize(
    "field", [torch.zeros(1, 1, 4, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, 3).long()]
)
def test_a_field_without_a_method_is_refused(field: Tensor):
    with pytest.raises(ConfigError, match="task made-up, field x: no method for"):
        kind_of(table_task(1, nn.Identity), "x", field)


class TwoEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(9, 2), nn.Embedding(9, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.one(tokens) + self.two(tokens)).sum(1)


def test_tokens_that_several_embeddings_read_are_refused():
    records = Records({"tokens": torch.ones(1, 3).long()}, torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ConfigError, match="field tokens: 2 embeddings"):
        embedding_of(TwoEmbeddings(), records, "tokens")


def test_an_answer_that_is_no_logits_of_the_tasks_classes_is_refused():
    task = table_task(3, lambda: Net(nn.Linear(3, 1)))
    with pytest.raises(ConfigError, match=r"gives \[1\] numbers for a record"):
        answers(task, task.model({}, 0), made_up_table(3))


def test_a_record_of_a_constant_has_no_rank_correlation():
    assert rank_correlation(np.ones(4), np.arange(4.0)) is None
    assert rank_correlation(np.array([1.0, 0.0]), np.array([2.0, 0.0])) is None
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == -1.0


# ---- a study from end to end


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain") / "run"
    scenario = Scenario.prepare(STUDIES / "heart-disease.toml", folder, Changes(rounds=2, without_privacy=True))
    simulate(scenario, baselines=False)
    return folder


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_run_is_explained_at_one_hospital_for_its_owners_eyes_only(
    run: Path, open_umask: None, capsys: pytest.CaptureFixture[str]
):
    path = explain(Request(run, site="va", records=4))
    said = capsys.readouterr().out
    assert said == f"{path}\n4 records of patients are shown in it: it must stay at va.\n"
    assert path.parent == run / "sites" / "va" / "state" / "explain"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    first = path.read_bytes()
    assert explain(Request(run, site="va", records=4)) == path
    assert path.read_bytes() == first
    page = Page(first.decode())
    assert {given.get("content") for _, given in page.tags} >= {
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:", "no-referrer",
    }  # fmt: skip


def test_the_files_of_a_real_hospital_give_the_same_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    of_run = explain(Request(run, out=tmp_path / "one"))
    site = run / "sites" / "cleveland" / "site.toml"
    of_files = explain(Request(None, str(site), run / "plan.toml", run / "model.safetensors", out=tmp_path / "two"))
    assert of_run.name == of_files.name
    assert of_run.read_bytes() == of_files.read_bytes()


def test_the_json_is_the_numbers_of_the_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = explain(Request(run, records=2, out=tmp_path, json=True))
    table = json.loads(capsys.readouterr().out)
    weights = safetensors.torch.load_file(run / "model.safetensors")
    assert table["page"] == str(path)
    assert table["model"] == digest(weights)
    assert table["digest"] == SignedText.load(run / "plan.toml").digest
    page = Page(path.read_text()).text
    model = TASKS["heart-disease"].model(SignedText.load(run / "plan.toml").plan.model, 0).double()
    model.load_state_dict(weights)
    records = open_study(Files.of_run(run, None)).records
    logits = model(table=records.fields["table"].double())
    margins = (logits[:, 1] - logits[:, 0]).abs().tolist()
    for record in table["records"]:
        assert any(record["score"] == pytest.approx(margin, rel=1e-5) for margin in margins)
        parts = record["fields"]["table"]["parts"]
        assert sum(part["attribution"] for part in parts) == pytest.approx(record["score"] - record["reference"], abs=1e-4)
        assert record["adds_up"]
        assert f"Record {record['record']}" in page
        assert all(f"{part['attribution']:+.3f}" in page for part in parts)


def test_only_records_that_were_held_out_are_shown(run: Path):
    from wardround.client.data import open_records

    opened = open_study(Files.of_run(run, "hungarian"))
    source = opened.site.data["heart-disease"]
    _, held_out = open_records(source, TASKS["heart-disease"])
    assert torch.equal(opened.records.fields["table"], held_out.fields["table"])
    assert 0 < len(opened.records) == len(opened.number)


def test_a_page_does_not_go_where_the_hospitals_of_a_run_share_files(run: Path, tmp_path: Path):
    before = sorted(run.rglob("*"))
    (tmp_path / "link").symlink_to(run)
    for out in (run, run / "pages", run / "sites" / "hungarian", tmp_path / "link", run / "sites" / "va" / ".." / "new"):
        with pytest.raises(ConfigError, match="lies in what the hospitals of this run share"):
            explain(Request(run, site="va", out=out))
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(), "--site: is missing; give a run folder, or all of --site, --plan and --model"),
        (Request(site="s", plan=Path("p")), "--model: is missing"),
        (Request(Path("nowhere")), "nowhere is no run folder: it has no plan.toml"),
        (Request(Path("RUN"), plan=Path("p")), "--plan: the run folder"),
        (Request(Path("RUN"), model=Path("m")), "--model: the run folder"),
        (Request(Path("RUN"), site="cleveand"), "the plan does not name this site (did you mean cleveland?)"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(run: Path, request_: Request, said: str):
    if request_.run == Path("RUN"):
        request_ = replace(request_, run=run)
    with pytest.raises(ConfigError, match=re.escape(said)):
        explain(request_)


def shortened(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(iter(weights))
    return {**weights, name: weights[name][:1]}


def without_one(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(weights.items())[1:])


def not_a_number(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(iter(weights))
    return {**weights, name: torch.full_like(weights[name], torch.nan)}


MODELS_THAT_ARE_NOT = MappingProxyType(
    {
        "another study's": (lambda weights: weights, "0" * 64, "is of study 0000"),
        "another network's": (shortened, None, "the plan's network wants shape"),
        "one tensor short": (without_one, None, "has no such tensor, the plan's network wants"),
        "one tensor more": (lambda weights: {**weights, "x": torch.zeros(1)}, None, "tensor x has shape [1]"),
        "no numbers": (not_a_number, None, "holds something that is no number"),
    }
)


@pytest.mark.parametrize("wrong", MODELS_THAT_ARE_NOT)
def test_a_model_that_is_not_the_plans_is_refused(run: Path, tmp_path: Path, wrong: str):
    change, study, said = MODELS_THAT_ARE_NOT[wrong]
    files = Files.of_run(run, None)
    weights = change(safetensors.torch.load_file(files.model))  # type: ignore[no-untyped-call]
    save_model(tmp_path / "m.safetensors", weights, study or SignedText.load(files.plan).digest)
    with pytest.raises(ConfigError, match=re.escape(said)):
        open_study(replace(files, model=tmp_path / "m.safetensors"))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(content=st.binary(max_size=200))
def test_a_file_that_is_no_model_is_refused_and_named(run: Path, tmp_path_factory: pytest.TempPathFactory, content: bytes):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"m\.safetensors"):
        open_study(replace(Files.of_run(run, None), model=path))


def test_records_that_were_trained_on_are_not_explained(run: Path, tmp_path: Path):
    files = Files.of_run(run, None)
    table = SiteConfig.load(files.site).model_dump(mode="json", exclude_none=True)
    table["data"]["heart-disease"]["holdout"] = 0.0
    (tmp_path / "site.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(ConfigError, match="holds no record out"):
        open_study(replace(files, site=tmp_path / "site.toml"))
    del table["data"]
    (tmp_path / "site.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(ConfigError, match=re.escape("has no [data.heart-disease]")):
        open_study(replace(files, site=tmp_path / "site.toml"))


def test_a_study_that_has_not_ended_has_no_model_to_explain(tmp_path: Path):
    scenario = Scenario.prepare(STUDIES / "heart-disease.toml", tmp_path / "run", Changes())
    with pytest.raises(ConfigError, match=r"has no model\.safetensors: its study has not ended"):
        explain(Request(scenario.folder))


def test_a_page_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_private(tmp_path / "page.html", "first")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    mask = os.umask(0o022)
    with pytest.raises(OSError, match="No space"):
        write_private(path, "second")
    assert os.umask(mask) == 0o022  # the process goes on with the mask it had
    assert [p.read_text() for p in tmp_path.iterdir()] == ["first"]


@pytest.fixture
def wardround(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    verb = EntryPoint("explain", "wardround.client.cli:explain", "wardround.verbs")
    monkeypatch.setattr(cli, "entry_points", lambda group: [verb, replace_verb(verb)])

    def run_(*words: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["wardround", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code, *capsys.readouterr()

    return run_


def replace_verb(verb: EntryPoint) -> EntryPoint:
    return EntryPoint("ledger", "wardround.client.cli:ledger", verb.group)  # one verb alone would be no verb


def test_the_command_explains_and_refuses_with_exit_code_2(wardround, run: Path, tmp_path: Path):
    code, out, err = wardround("explain", run, "--site", "hungarian", "--records", 1, "--out", tmp_path, "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["records"]) == 1
    code, out, err = wardround("explain", run, "--site", "nowhere")
    assert (code, out) == (2, "")
    assert err == "wardround: --site nowhere: the plan does not name this site\n"
    assert wardround("explain", run, "--records", 0)[0] == 2
    code, out, _ = wardround("explain", "--help")
    assert code == 0
    assert "wardround explain --site site.toml --plan plan.toml --model m.safetensors" in out
