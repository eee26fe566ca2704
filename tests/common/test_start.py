"""First weights: drawn, or out of the file the plan names and no other; what is frozen is taken by its digest."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wardround.common.errors import ConfigError, OrderRefused
from wardround.common.models import MODELS
from wardround.common.plan import StudyPlan
from wardround.common.start import named, sent, start, taken_in
from wardround.common.tasks import task_of
from wardround.common.weights import digest, trainable

SMALL = {"network": "ws-cnn", "width": 4}
MOBILE = {"network": "torchvision", "name": "mobilenet_v3_small"}


def a_plan(model: Mapping[str, Any], seed: int = 7) -> StudyPlan:
    return StudyPlan(name="films", task="chest-xray", rounds=2, seed=seed, sites={"a": 100, "b": 100}, model=dict(model))


def a_network(seed: int = 1, **options: object) -> nn.Module:
    return task_of(a_plan(SMALL)).model({**SMALL, **options}, seed)


def saved(file: Path, tensors: Mapping[str, Tensor]) -> Path:
    if file.suffix == ".pt":
        torch.save(dict(tensors), file)
    else:
        safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, file)
    return file


def starting(model: Mapping[str, Any], file: Path, seed: int = 7) -> StudyPlan:
    """A plan that names the file."""
    return a_plan({**model, **named(a_plan(model), file)}, seed)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return saved(tmp_path / "public.safetensors", trainable(a_network()))


# --- what comes out of a file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_study_starts_at_the_numbers_of_its_file(tmp_path: Path, kind: str):
    network = a_network()
    file = saved(tmp_path / f"public.{kind}", trainable(network))
    found = start(starting(SMALL, file), file)
    assert digest(found.weights) == digest(trainable(network))
    assert found.frozen == {}
    assert "No epsilon of this study" in found.notes[0]
    assert len(found.notes) == 1


def test_a_file_in_half_precision_is_read(tmp_path: Path):
    halved = {name: t.half() for name, t in trainable(a_network()).items()}
    file = saved(tmp_path / "half.safetensors", halved)
    found = start(starting(SMALL, file), file).weights
    assert all(torch.equal(found[name], t.float()) for name, t in halved.items())


def test_without_a_file_a_study_starts_at_its_seed():
    one, again, other = (start(a_plan(SMALL, seed)).weights for seed in (1, 1, 2))
    assert digest(one) == digest(again) != digest(other)


@pytest.mark.parametrize(("train", "learns"), [
    ("head", {"head"}),
    ("last-block", {"head", "features.8", "features.9"}),
])  # fmt: skip
def test_what_does_not_learn_comes_out_of_the_file_and_travels_apart(public: Path, train: str, learns: set[str]):
    found = start(starting(SMALL | {"train": train}, public), public)
    whole = trainable(a_network())
    assert {name.rpartition(".")[0] for name in found.weights} == learns
    assert found.weights.keys() | found.frozen.keys() == whole.keys()
    assert not found.weights.keys() & found.frozen.keys()
    assert digest(found.weights | found.frozen) == digest(whole)


def test_an_answer_for_other_classes_is_drawn_from_the_seed_and_said(tmp_path: Path):
    of_nine = MODELS["ws-cnn"]({"width": 4}, channels=1, classes=9)
    file = saved(tmp_path / "nine.safetensors", trainable(of_nine))
    one, again, other = (start(starting(SMALL, file, seed), file) for seed in (1, 1, 2))
    assert torch.equal(one.weights["head.weight"], again.weights["head.weight"])
    assert not torch.equal(one.weights["head.weight"], other.weights["head.weight"])
    assert torch.equal(one.weights["features.0.weight"], trainable(of_nine)["features.0.weight"])
    assert any("(head) did not come out of it" in note for note in one.notes)
    assert any("not used: head.bias, head.weight" in note for note in one.notes)


def test_a_file_without_an_answer_gives_the_features(tmp_path: Path):
    features = {name: t for name, t in trainable(a_network()).items() if not name.startswith("head")}
    file = saved(tmp_path / "features.safetensors", features)
    found = start(starting(SMALL, file), file)
    assert all(torch.equal(found.weights[name], t) for name, t in features.items())
    assert any("(head) did not come out of it" in note for note in found.notes)


def test_a_checkpoint_of_torchvision_fits_but_for_its_statistics(tmp_path: Path):
    from torchvision import models

    published = models.get_model("mobilenet_v3_small", weights=None).state_dict()
    file = saved(tmp_path / "mobile.pt", published)
    plan = starting(MOBILE | {"train": "head"}, file)
    found = start(plan, file)
    whole = found.weights | found.frozen
    assert torch.equal(whole["network.features.0.0.weight"], published["features.0.0.weight"])
    assert torch.equal(whole["network.features.0.1.weight"], published["features.0.1.weight"])  # scale of a norm
    assert torch.equal(whole["network.classifier.0.weight"], published["classifier.0.weight"])
    assert whole["network.classifier.3.weight"].shape == (2, 1024)
    assert {name.split(".")[1] for name in found.weights} == {"classifier"}
    notes = " ".join(found.notes)
    assert f"{3 * sum(name.endswith('running_var') for name in published)} tensors of the file are statistics" in notes
    assert "(network.classifier.3) did not come out of it" in notes


def test_the_notes_name_some_of_many_tensors_that_were_not_used(tmp_path: Path):
    more = {f"other.{number:02}": torch.zeros(1) for number in range(20)}
    file = saved(tmp_path / "more.safetensors", trainable(a_network()) | more)
    (note,) = [note for note in start(starting(SMALL, file), file).notes if "not used" in note]
    assert "other.07 and 12 more" in note
    assert "other.08" not in note


# --- what is refused ------------------------------------------------------------------------------------------------------


def broken(name: str, value: Tensor | None) -> dict[str, Tensor]:
    tensors = trainable(a_network())
    if value is None:
        tensors.pop(name)
    else:
        tensors[name] = value
    return tensors


@pytest.mark.parametrize(("tensors", "why"), [
    (broken("features.4.weight", None), r"has no tensor features\.4\.weight"),
    (broken("features.4.weight", torch.zeros(3)), r"features\.4\.weight has shape \[3\], .* wants \[1, 8, 4, 3, 3\]"),
    (broken("features.5.bias", torch.full((8,), torch.nan)), r"features\.5\.bias holds something that is no number"),
    (broken("features.5.bias", torch.full((8,), 1e300, dtype=torch.float64)), r"features\.5\.bias holds something"),
    (broken("features.5.bias", torch.zeros(8, dtype=torch.int64)), r"features\.5\.bias holds something"),
    (broken("head.bias", torch.full((2,), torch.inf)), r"head\.bias holds something"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_by_the_tensor(tmp_path: Path, tensors: dict[str, Tensor], why: str):
    file = saved(tmp_path / "public.safetensors", tensors)
    with pytest.raises(ConfigError, match=why):
        named(a_plan(SMALL), file)


def test_another_file_than_the_plans_is_refused(public: Path, tmp_path: Path):
    plan = starting(SMALL, public)
    other = saved(tmp_path / "other.safetensors", trainable(a_network(2)))
    with pytest.raises(ConfigError, match=f"the plan's model.weights are {plan.model['weights']}"):
        start(plan, other)
    with pytest.raises(ConfigError, match="cannot be read"):
        start(plan, tmp_path / "absent.safetensors")


def test_a_frozen_part_of_another_digest_is_refused(public: Path):
    plan = a_plan({**starting(SMALL | {"train": "head"}, public).model, "frozen": f"sha256:{'0' * 64}"})
    with pytest.raises(ConfigError, match=r"the plan's model\.frozen is sha256:0000"):
        start(plan, public)


def test_a_file_and_a_plan_that_names_one_go_together(public: Path):
    with pytest.raises(ConfigError, match=r"names no model\.weights"):
        start(a_plan(SMALL), public)
    with pytest.raises(ConfigError, match="give their file"):
        start(starting(SMALL, public))


class _Program:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (Path.touch, (Path("ran"),))  # type: ignore[return-value]


def test_a_program_in_a_file_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": _Program()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"w": _Program()}))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ConfigError, match="neither safetensors nor a file of tensors alone"):
            named(a_plan(SMALL), tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, {"model": {"w": torch.zeros(1)}}, {1: torch.zeros(1)}])
def test_what_holds_more_than_tensors_is_refused(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "training.pt")
    with pytest.raises(ConfigError, match=r"state_dict\(\) alone"):
        named(a_plan(SMALL), tmp_path / "training.pt")


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda b: len(b).to_bytes(8, "little") + b"{" + b))
def test_any_bytes_that_are_no_weights_are_refused(tmp_path_factory: pytest.TempPathFactory, body: bytes):
    file = tmp_path_factory.getbasetemp() / "any.bin"
    file.write_bytes(body)
    plan = a_plan(SMALL | {"weights": f"sha256:{hashlib.sha256(body).hexdigest()}"})
    with pytest.raises(ConfigError, match=r"any\.bin: "):
        start(plan, file)


# --- what a plan may say --------------------------------------------------------------------------------------------------

SOME = f"sha256:{'a' * 64}"


@pytest.mark.parametrize(("model", "why"), [
    ({"weights": "resnet18.pt"}, "'resnet18.pt' is no digest"),
    ({"weights": SOME.upper()}, "is no digest"),
    ({"weights": SOME + "\n"}, "is no digest"),
    ({"weights": 3}, "3 is no digest"),
    ({"weights": SOME, "train": "head", "frozen": "sha256:"}, "model.frozen: 'sha256:' is no digest"),
    ({"weights": SOME, "train": "head"}, "model.frozen: is missing"),
    ({"weights": SOME, "train": "last-block"}, "model.frozen: is missing"),
    ({"weights": SOME, "frozen": SOME}, "model.frozen: does nothing"),
    ({"train": "head", "frozen": SOME}, "model.frozen: does nothing"),
])  # fmt: skip
def test_a_plan_that_names_weights_wrongly_is_refused(model: dict[str, object], why: str):
    with pytest.raises(ValueError, match=why):
        a_plan(SMALL | model)


def test_a_network_without_parts_learns_as_a_whole():
    with pytest.raises(ConfigError, match="train"):
        MODELS["mlp"]({"train": "head"}, features=3, classes=2)


@pytest.mark.parametrize("name", ["cnn", "two-conv-cnn", "ws-cnn", "resnet18"])
def test_our_own_networks_learn_in_part_where_that_is_wanted(name: str):
    counts = []
    for train in ("all", "last-block", "head"):
        with torch.device("meta"):
            network = MODELS[name]({"train": train}, channels=3, classes=4)
        counts.append(sum(p.numel() for p in network.parameters() if p.requires_grad))
        assert list(network.parameters())[-1].requires_grad
    assert counts[0] > counts[1] > counts[2] > 0


def test_a_network_that_is_wrapped_learns_in_part_too():
    with torch.device("meta"):
        network = MODELS["torchvision"]({"name": "resnet18", "train": "head"})
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {"network.fc.weight", "network.fc.bias"}


# --- what a site takes ----------------------------------------------------------------------------------------------------


def test_a_site_takes_what_is_frozen_into_its_network_and_learns_the_rest(public: Path):
    plan = starting(SMALL | {"train": "head"}, public)
    first = start(plan, public)
    network = task_of(plan).model(plan.model, 99)
    arrived = first.weights | first.frozen
    assert sent(network, plan.model).keys() == arrived.keys()
    assert taken_in(network, plan.model, arrived).keys() == {"head.weight", "head.bias"}
    held = dict(network.named_parameters())
    assert all(torch.equal(held[name], tensor) for name, tensor in first.frozen.items())
    assert {name for name, p in held.items() if p.requires_grad} == {"head.weight", "head.bias"}


def test_a_site_refuses_frozen_weights_that_the_plan_does_not_name(public: Path):
    plan = starting(SMALL | {"train": "head"}, public)
    first = start(plan, public)
    network = task_of(plan).model(plan.model, 99)
    before = digest(sent(network, plan.model))
    changed = {name: tensor.clone() for name, tensor in first.frozen.items()}
    changed["features.0.weight"][0, 0, 0, 0, 0] += 1e-6
    with pytest.raises(OrderRefused, match="not those the plan names"):
        taken_in(network, plan.model, first.weights | changed)
    assert digest(sent(network, plan.model)) == before


def test_without_a_file_only_what_learns_travels():
    network = a_network(train="head")
    assert sent(network, {"train": "head"}).keys() == {"head.weight", "head.bias"}
    weights = trainable(network)
    assert taken_in(network, {"train": "head"}, weights) is weights
