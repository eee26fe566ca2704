"""Before a ledger entry is made and a record is opened: what couples patients is refused, by what it does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from nets import Net, losses
from wardround.client import hospital as house
from wardround.client.dp import clipped_sum, preflight, refuse_coupled, refuse_entangled
from wardround.client.dp.engine import Engine, engine_of
from wardround.client.hospital import Hospital
from wardround.common.errors import PlanRefused
from wardround.common.messages import OrderFacts, RollCall
from wardround.common.tasks import TASKS, Records
from wardround.common.weights import trainable
from wardround.simulations.scenario import Scenario

WIDTH = 6


def like(*shape: int, name: str = "table", label: Tensor | None = None) -> Records:
    label = torch.zeros(1, dtype=torch.int64) if label is None else label
    return Records({name: torch.zeros(1, *(shape or (WIDTH,)))}, label, torch.zeros(1, dtype=torch.int64))


class Does(nn.Module):
    """A function as a layer."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def around(layer: nn.Module) -> Net:
    return Net(nn.Linear(WIDTH, 5), layer, nn.Linear(5, 2))


class Centred(Net):
    """Takes the batch's mean away in its own forward, before any layer."""

    def forward(self, table: Tensor) -> Tensor:
        return super().forward(table - table.mean(0))


class Finally(Net):
    """Takes the batch's mean away behind all layers."""

    def forward(self, table: Tensor) -> Tensor:
        y = super().forward(table)
        return y - y.mean(0)


class Averaging(nn.Module):
    """Statistics by hand: a buffer that follows the batches, and is used by nobody yet."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return x


class Adapting(nn.Module):
    """A weight that follows the batches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data.add_(x.detach().std(0))
        return x


class Remembering(nn.Module):
    """Subtracts what it saw last, kept where no buffer is."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.last
        self.last = x.detach().mean(0)
        return y


class Highest(nn.Module):
    """Subtracts the highest it ever saw: the same batch twice would not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.highest = torch.full((5,), -torch.inf)

    def forward(self, x: Tensor) -> Tensor:
        self.highest = torch.maximum(self.highest, x.detach().amax(0))
        return x - self.highest


class First(nn.Module):
    """Centres by the first batch it ever sees."""

    def __init__(self) -> None:
        super().__init__()
        self.centre: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.centre is None:
            self.centre = x.detach().mean(0)
        return x - self.centre


class Counting(nn.Module):
    """Warms up over the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        return x * min(1.0, self.batches / 100)


# --- networks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "where"), [
    (around(Does(lambda x: x - x.mean(0))), r"layer layers\.1 \(Does\) mixes"),
    (around(Does(lambda x: x / x.norm())), r"layer layers\.1 \(Does\) mixes"),
    (around(Does(lambda x: F.batch_norm(x, None, None, training=True))), r"layer layers\.1 \(Does\) mixes"),
    (around(Does(lambda x: x * x.abs().amax(0))), r"layer layers\.1 \(Does\) mixes"),
    (around(Does(lambda x: x.cumsum(0))), r"layer layers\.1 \(Does\) mixes"),  # the first record is nobody's follower
    (around(Does(lambda x: x.flip(0).cumsum(0).flip(0))), r"layer layers\.1 \(Does\) mixes"),
    (around(Does(lambda x: x + torch.stack([x[1::2], 0 * x[1::2]], 1).flatten(0, 1))), r"layer layers\.1 \(Does\) mixes"),
    (around(Does(lambda x: x + torch.stack([0 * x[::2], x[::2]], 1).flatten(0, 1))), r"layer layers\.1 \(Does\) mixes"),
    (Centred(nn.Linear(WIDTH, 5), nn.Linear(5, 2)), r"what reaches layer layers \(Sequential\) mixes"),
    (Finally(nn.Linear(WIDTH, 5), nn.Linear(5, 2)), r"the network mixes"),
])  # fmt: skip
def test_a_network_in_which_records_see_each_other_is_refused_with_the_place(model: nn.Module, where: str):
    with pytest.raises(PlanRefused, match=f"^{where} the records of a batch"):
        preflight(model, losses, like())


@pytest.mark.parametrize("layer", [
    nn.BatchNorm1d(5),
    nn.BatchNorm1d(5, affine=False),
    nn.BatchNorm1d(5, affine=False, track_running_stats=False),
    nn.BatchNorm1d(5).eval().requires_grad_(False),  # frozen: one `train()` away from mixing
])  # fmt: skip
def test_batch_norm_is_refused_however_it_is_dressed(layer: nn.Module):
    with pytest.raises(PlanRefused, match=r"layers\.1 \(BatchNorm1d\) mixes the patients"):
        preflight(around(layer), losses, like())
    with pytest.raises(PlanRefused):  # what it does gives it away as well
        refuse_entangled(around(layer), losses, like())


@pytest.mark.parametrize(("model", "why"), [
    (Net(nn.utils.spectral_norm(nn.Linear(WIDTH, 2))), "changes its weights in a hook"),
    (Net(parametrizations.spectral_norm(nn.Linear(WIDTH, 2))), r"layers\.0\.parametrizations\.weight\.0\._[uv] .*changes"),
    (around(Averaging()), r"layers\.1\.average of the network changes in a pass: it would learn from patients without noise"),
    (around(Adapting()), r"layers\.1\.scale of the network changes in a pass"),
    (around(Remembering()), "remembers earlier batches"),
    (around(First()), r"layer layers\.1 \(First\) mixes"),
    (around(Highest()), "remembers earlier batches"),
    (around(Counting()), "remembers earlier batches"),
])  # fmt: skip
def test_a_network_that_keeps_something_of_a_batch_is_refused(model: nn.Module, why: str):
    with pytest.raises(PlanRefused, match=why):
        preflight(model, losses, like())


def test_nothing_of_the_network_itself_is_touched():
    model = around(Averaging())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    chance = torch.random.get_rng_state()
    with pytest.raises(PlanRefused):
        preflight(model.eval(), losses, like())
    assert not model.training
    assert torch.equal(chance, torch.random.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


class Sequences(nn.Module):
    """A recurrent layer over (records, moments, features), right or wrong about which comes first."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=batch_first)
        self.fc = nn.Linear(4, 2)

    def forward(self, table: Tensor) -> Tensor:
        y, _ = self.rnn(table)
        logits: Tensor = self.fc(y[:, -1])
        return logits


@pytest.mark.parametrize("moments", [1, 5, 6])
def test_a_recurrent_layer_that_takes_records_for_moments_is_refused(moments: int):
    refuse_entangled(Sequences(batch_first=True), losses, like(moments, 3))
    with pytest.raises(PlanRefused, match="mixes the records"):
        refuse_entangled(Sequences(batch_first=False), losses, like(moments, 3))


class Straight(nn.Module):
    """Adds the batch's mean to the gradients and not to the numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.mean(0) - x.mean(0).detach())


def test_records_coupled_in_gradients_alone_are_differentiated_alone():
    model = around(Straight())
    preflight(model, losses, like())
    assert not engine_of(model, losses, like()).in_one_pass


def test_a_network_that_does_not_fit_the_records_is_refused_without_torchs_words():
    with pytest.raises(PlanRefused, match=r"^the network cannot compute on records of this task's shape$") as refusal:
        preflight(Net(nn.Linear(WIDTH + 1, 2)), losses, like())
    assert "mat1" in refusal.value.detail


# --- losses ---------------------------------------------------------------------------------------------------------------


def weighted(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, weight=torch.tensor([1.0, 9.0]))


def weighted_by_record(logits: Tensor, label: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 9.0])
    return F.cross_entropy(logits, label, weight=weight, reduction="none") / weight[label].sum()


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    p = logits.sigmoid()
    return 1 - 2 * (p * mask).sum() / (p.sum() + mask.sum())


def dice_of_each(logits: Tensor, mask: Tensor) -> Tensor:
    p = logits.sigmoid()
    return 1 - 2 * (p * mask).sum((1, 2, 3)) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)))


def contrastive(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)), reduction="none")


@pytest.mark.parametrize(("loss", "why"), [
    (weighted, r"the loss gives shape \[\] for 6 records"),
    (lambda logits, label: F.cross_entropy(logits, label, reduction="sum"), r"the loss gives shape \[\] for 6 records"),
    (lambda logits, label: logits * label[:, None], r"the loss gives shape \[6, 2\]"),
    (weighted_by_record, "the loss mixes the records of a batch"),
    (contrastive, "the loss mixes the records of a batch"),
    (lambda logits, label: losses(logits, label) - losses(logits, label).mean(), "the loss mixes the records of a batch"),
    (lambda logits, label: losses(logits, label.flip(0)), "the loss mixes the records of a batch"),
])  # fmt: skip
def test_a_loss_that_is_not_one_value_for_each_record_alone_is_refused(loss: Callable[[Tensor, Tensor], Tensor], why: str):
    with pytest.raises(PlanRefused, match=why):
        preflight(Net(nn.Linear(WIDTH, 2)), loss, like())


def masks() -> Records:
    return like(1, 8, 8, label=torch.zeros(1, 1, 8, 8))


def segmenter() -> Net:
    return Net(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))


def test_dice_over_the_batch_is_refused_and_dice_of_each_record_is_not():
    with pytest.raises(PlanRefused, match="the loss gives shape"):
        preflight(segmenter(), dice, masks())
    with pytest.raises(PlanRefused, match="the loss mixes"):
        preflight(segmenter(), lambda logits, mask: dice(logits, mask).expand(len(mask)), masks())
    model = segmenter()
    preflight(model, dice_of_each, masks())
    assert engine_of(model, dice_of_each, masks()).in_one_pass


# --- what passes ----------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Drops by a function of its own, out of reach for anybody who would switch it off."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("layer", [
    nn.LayerNorm(5),
    nn.Dropout(0.5),
    nn.AlphaDropout(0.5),
    nn.Softmax(1),
    Noisy(),
    Does(lambda x: x / x.norm(dim=1, keepdim=True)),
    parametrizations.weight_norm(nn.Linear(5, 5)),
])  # fmt: skip
def test_layers_that_look_at_one_record_pass(layer: nn.Module):
    preflight(around(layer), losses, like())


@pytest.mark.parametrize("layer", [nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.Dropout2d(0.5), nn.LocalResponseNorm(2)])
def test_layers_of_images_that_look_at_one_record_pass(layer: nn.Module):
    preflight(Net(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(4 * 36, 2)), losses, like(1, 8, 8))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_shipped_task_passes_on_its_blank_records(name: str):
    task = TASKS[name]
    model = task.model({}, seed=0)
    refuse_coupled(model)
    refuse_entangled(model, task.loss, task.blank(1))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_blank_records_are_nobodys_and_shaped_like_real_ones(name: str):
    task = TASKS[name]
    blank = task.blank(3)
    assert blank.patient.tolist() == [0, 1, 2]
    assert len(blank.label) == 3
    kinds = {"tokens": {torch.int64}, "label": {torch.int64, torch.float32}}
    for field, t in {"label": blank.label, **blank.fields}.items():
        assert t.dtype in kinds.get(field, {torch.float32})
        assert len(t) == 3
        assert not t.any()
    assert len(task.blank(0)) == 0


def test_a_network_is_looked_at_once_and_a_round_finds_its_engine_ready(monkeypatch: pytest.MonkeyPatch):
    task = TASKS["heart-disease"]
    model = task.model({}, seed=0)
    preflight(model, task.loss, task.blank(1))
    monkeypatch.setattr(Engine, "on", never)
    monkeypatch.setattr("wardround.client.dp.proof.stand_in", never)
    preflight(model, task.loss, task.blank(2))
    clipped_sum(model, task.loss, trainable(model), task.blank(20), clip_norm=1.0)


def never(*_: object) -> None:
    raise AssertionError("the network was looked at again")


# --- at a hospital --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(scenario: Callable[..., Scenario]) -> Scenario:
    return scenario(rounds=4)


def trained(hospital: Hospital, prepared: Scenario) -> None:
    weights = trainable(TASKS[prepared.study.plan.task].model(prepared.study.plan.model, 7))
    hospital.train(prepared.study, OrderFacts(prepared.study.digest, "run", 1, 1, ""), weights)


def test_a_hospital_refuses_an_entangled_network_before_its_ledger_and_its_records(
    small: Scenario, monkeypatch: pytest.MonkeyPatch
):
    features = TASKS["heart-disease"].blank(0).fields["table"].shape[1]
    monkeypatch.setattr(house, "open_records", never)
    monkeypatch.setattr(house, "working_model", lambda *_: Centred(nn.Linear(features, 2)))
    with closing(Hospital(small.sites["va"])) as hospital:
        with pytest.raises(PlanRefused, match="mixes the records of a batch"):
            trained(hospital, small)
        assert hospital.ledger.accounts() == []
        present = hospital.present(small.study, RollCall(small.study.digest, "run"))
        assert "mixes the records of a batch" in present.refusal


def test_how_gradients_are_taken_is_settled_before_a_ledger_entry_is_made(small: Scenario, monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []
    honest = Engine.on
    with closing(Hospital(small.sites["va"])) as hospital:
        monkeypatch.setattr(house, "working_model", lambda *_: model)
        monkeypatch.setattr(Engine, "on", lambda *given: made.append(len(hospital.ledger.accounts())) or honest(*given))
        model = TASKS["heart-disease"].model(small.study.plan.model, seed=0)
        trained(hospital, small)
        assert made == [0]
        assert len(hospital.ledger.accounts()) == 1


def test_a_study_without_privacy_needs_no_engine(scenario: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch):
    plain = scenario(rounds=2, without_privacy=True)
    monkeypatch.setattr(house, "preflight", never)
    with closing(Hospital(plain.sites["va"])) as hospital:
        trained(hospital, plain)
