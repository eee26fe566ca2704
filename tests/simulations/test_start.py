"""Studies that start from public weights: the file is named, checked and kept, and what is frozen never comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import Message
from typer.testing import CliRunner

from tests.server.conftest import MeddledGrid, coordinate
from wardround.client.hospital import Hospital
from wardround.client.interpret.command import explained_of
from wardround.client.interpret.study import Opened, read_model
from wardround.client.policy import SiteConfig
from wardround.common.cli import application
from wardround.common.errors import ConfigError, OrderRefused
from wardround.common.messages import OrderFacts
from wardround.common.start import sent
from wardround.common.tasks import TASKS, Records
from wardround.common.weights import Shapes, Weights, trainable
from wardround.server.checkpoint import Progress, RoundRecord
from wardround.simulations.command import Request, run
from wardround.simulations.phantom import films
from wardround.simulations.run import Watch, simulate
from wardround.simulations.scenario import Changes, Scenario

STUDY = """
name = "few-films"
task = "chest-xray"
rounds = 3
min_sites = 2
[sites]
east = 20
north = 20
south = 20
west = 20
[model]
network = "ws-cnn"
width = 4
train = "head"
[privacy]
epsilon = 8.0
sampling_rate = 0.5
records_per_patient = 1
"""
FEATURES = {f"features.{number}" for number in (0, 1, 4, 5, 8, 9)}
Prepared = Callable[..., Scenario]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with PneumoniaMNIST's layout and phantom films in it."""
    folder = tmp_path_factory.mktemp("data")
    arrays = {}
    for part, count in (("train", 70), ("val", 10), ("test", 16)):
        drawn = films(part, count, seed=3, side=32, records_per_patient=(1.0,), prevalence=0.5)
        arrays |= {f"{part}_images": drawn.image, f"{part}_labels": drawn.label[:, None]}
    (folder / "pneumonia_mnist_balanced").mkdir()
    np.savez(folder / "pneumonia_mnist_balanced" / "pneumoniamnist.npz", **arrays)
    return folder


@pytest.fixture
def public(tmp_path: Path) -> Path:
    network = TASKS["chest-xray"].model({"network": "ws-cnn", "width": 4}, seed=1)
    safetensors.torch.save_file(trainable(network), tmp_path / "public.safetensors")
    return tmp_path / "public.safetensors"


@pytest.fixture
def study(tmp_path: Path, data: Path, public: Path) -> Prepared:
    def prepare(name: str = "run", text: str = STUDY, weights: Path | None = public, **changes: object) -> Scenario:
        (tmp_path / "few-films.toml").write_text(text)
        changed = Changes(weights=weights, **changes)  # type: ignore[arg-type]
        return Scenario.prepare(tmp_path / "few-films.toml", tmp_path / name, changed, data)

    return prepare


def whole(file: Path) -> Weights:
    return safetensors.torch.load_file(file)


def test_the_plan_of_a_run_names_its_file(study: Prepared, public: Path):
    first = study().study
    assert set(first.plan.model) == {"network", "width", "train", "weights", "frozen"}
    assert first.plan.model["weights"] == f"sha256:{hashlib.sha256(public.read_bytes()).hexdigest()}"
    assert study("again", text=first.text).study == first  # a plan that names it is left as it is


@pytest.mark.parametrize("without_privacy", [True, False], ids=["plain", "private"])
def test_what_is_frozen_is_in_the_model_handed_out_as_it_was_and_the_head_has_moved(
    study: Prepared, public: Path, without_privacy: bool
):
    scenario = study(without_privacy=without_privacy)
    report = simulate(scenario, baselines=without_privacy)
    before, after = whole(public), whole(scenario.folder / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head"}
    assert any("started from public weights" in note for note in report.notes)
    assert "Of 1,566 numbers 34 learn" in " ".join(report.notes)


def test_an_update_holds_no_frozen_tensor(study: Prepared):
    scenario = study()
    seen: list[tuple[set[str], set[str]]] = []

    def between(site: str, order: Message, reply: Message) -> Message:
        seen.append((set(order.content["model"]), set(reply.content["model"])))
        return reply

    assert coordinate(scenario, MeddledGrid(scenario, between), weights=str(scenario.weights)) == ""
    down, up = seen[0]
    assert len(seen) == 12
    assert up == {"head.weight", "head.bias"}
    assert {name.rpartition(".")[0] for name in down - up} == FEATURES


def test_several_processes_give_the_same_bits(study: Prepared):
    one, two = (study(name, without_privacy=True) for name in ("one", "two"))
    simulate(one, baselines=False)
    simulate(two, baselines=False, processes=2)
    first, second = (whole(scenario.folder / "model.safetensors") for scenario in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_site_refuses_other_frozen_weights_before_it_pays(study: Prepared, public: Path):
    scenario = study()
    hospital = Hospital(scenario.sites["east"])
    sent = whole(public)
    sent["features.0.weight"] = sent["features.0.weight"] + 1
    order = OrderFacts(scenario.study.digest, "run", 1, 1, "")
    with pytest.raises(OrderRefused, match="not those the plan names"):
        hospital.train(scenario.study, order, sent)
    assert hospital.ledger.accounts() == []
    hospital.close()


def test_a_resumed_run_needs_no_other_file(study: Prepared, public: Path):
    whole_run = study("whole", without_privacy=True)
    simulate(whole_run, baselines=False)
    cut = study("cut", without_privacy=True)
    public.unlink()

    def fall(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(cut, baselines=False, watch=Watch(round_done=fall))
    held = Progress.latest(cut.folder / "checkpoints", study=cut.study.digest)
    assert held is not None
    assert {name.rpartition(".")[0] for name in held.frozen} == FEATURES
    report = simulate(Scenario.reopen(cut.folder))
    assert report.results.local
    assert any("started from public weights" in note for note in report.notes)
    one, two = (whole(scenario.folder / "model.safetensors") for scenario in (whole_run, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_model_handed_out_can_be_explained(study: Prepared):
    scenario = study(without_privacy=True)
    simulate(scenario, baselines=False)
    task, options = scenario.task, scenario.study.plan.model
    network = task.model(options, 99)
    weights = read_model(scenario.folder / "model.safetensors", scenario.study, Shapes.like(sent(network, options)))
    record = Records({"image": torch.randn(1, 1, 28, 28)}, torch.tensor([1]), torch.tensor([0]))
    site = SiteConfig.load(scenario.sites["east"])
    opened = Opened(scenario.study, site, task, weights, record, torch.tensor([1]), None, [])
    (shown,) = explained_of(opened, 1).shown
    says = torch.func.functional_call(network, weights, (), dict(record.fields))
    assert shown.loss == pytest.approx(float(task.loss(says, record.label)), rel=1e-4)


def test_a_file_that_does_not_fit_leaves_no_run_folder(study: Prepared, tmp_path: Path):
    safetensors.torch.save_file({"head.bias": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="has no tensor"):
        study("run", weights=tmp_path / "other.safetensors")
    named = study("named").study.text
    with pytest.raises(ConfigError, match="give their file"):
        study("without", text=named, weights=None)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "without").exists()


def test_a_coordinator_without_the_file_asks_no_site(study: Prepared):
    scenario = study()
    with pytest.raises(ConfigError, match="give their file"):
        coordinate(scenario, MeddledGrid(scenario))
    assert not (scenario.folder / "checkpoints").exists()


def test_a_resumed_run_takes_no_other_file(study: Prepared, public: Path):
    with pytest.raises(ConfigError, match="--weights: a resumed run keeps its plan"):
        run(Request("few-films", resume=study().folder, weights=public))


def test_check_says_how_a_file_is_named_and_whether_it_fits(study: Prepared, public: Path, tmp_path: Path):
    scenario = study()
    model = scenario.study.plan.model
    told = CliRunner().invoke(application(), ["check", str(tmp_path / "few-films.toml"), "--weights", str(public)])
    assert f'weights = "{model["weights"]}"\nfrozen = "{model["frozen"]}"' in told.stdout
    told = CliRunner().invoke(application(), ["check", str(scenario.folder / "plan.toml"), "--weights", str(public)])
    assert "Of 1,566 numbers 34 learn" in told.stdout
    assert "1,532 that do not learn" in told.stdout
    assert "No epsilon of this study covers" in told.stdout
