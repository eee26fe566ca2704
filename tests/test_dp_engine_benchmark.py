"""What the benchmark of private training times is private training: every mode's clipped sum is that of single records."""

from __future__ import annotations

import pytest
import torch

from benchmarks.dp_engine import Row, usable, verdicts
from benchmarks.dp_modes import MODES, Settings, difference, expected, make
from benchmarks.networks import NETWORKS

RECORDS = 3
OURS = [name for name in MODES if name.startswith("ours")]
OPACUS = [name for name, mode in MODES.items() if mode.by_opacus]
LARGE = ("resnet", "rnn")  # where three records take seconds
EVERY_NETWORK = [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in NETWORKS]
REFUSED = {("unet", "ew")}


def off(network: str, mode: str, **how: object) -> float:
    return difference(NETWORKS[network], mode, size=RECORDS, dtype=torch.float64, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("network", EVERY_NETWORK)
def test_our_clipped_sum_is_that_of_single_records(network: str, batches: int):
    assert off(network, "ours", batches=batches) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus' hooks warn where they fire
@pytest.mark.parametrize("mode", OPACUS)
@pytest.mark.parametrize("network", NETWORKS)
def test_what_ours_is_compared_with_computes_the_same(network: str, mode: str):
    if (network, mode) in REFUSED:
        with pytest.raises(RuntimeError):
            off(network, mode)
        return
    rewritten = NETWORKS[network].rewritten is not None
    assert max(off(network, mode, rewritten=rewritten, batches=batches) for batches in (1, 2)) < 1e-4


def test_the_sum_to_compare_with_is_clipped_for_some_records_and_not_for_others():
    clip, total = expected(NETWORKS["cnn"], RECORDS)
    length = float(torch.stack([g.norm() for g in total.values()]).norm())
    assert 0 < length < RECORDS * clip


def test_a_mode_that_gives_another_sum_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    class Unclipped(Settings):
        def private(self, batch):  # type: ignore[no-untyped-def]
            return {**super().private(batch), "max_grad_norm": 2 * self.clip}

    monkeypatch.setattr("benchmarks.dp_modes.Settings", Unclipped)
    found = usable(NETWORKS["cnn"], "ours", "cpu")
    assert not found.works
    assert "wrong" in found.note


@pytest.mark.slow
def test_a_mode_that_raises_is_reported_in_its_own_words():
    found = usable(NETWORKS["unet"], "ew", "cpu")
    assert not found.works
    assert found.note.startswith("raises: Expanded Weights")


@pytest.mark.parametrize("mode", ["sgd", *OURS])
def test_a_step_changes_every_parameter(mode: str):
    network = NETWORKS["dcgan"]
    step = make(network, mode, network.batch(RECORDS), batches=2)
    before = {name: w.clone() for name, w in step.model.state_dict().items()}
    step()
    assert all(not torch.equal(w, before[name]) for name, w in step.model.state_dict().items())
    assert before.keys() == network.model().state_dict().keys()


def test_a_target_without_a_figure_is_neither_met_nor_missed():
    network = NETWORKS["cnn"]
    assert {verdict.met for verdict in verdicts(network, [], None)} == {None}
    ours = Row("cnn", "ours", works=True, note="", one_ratio=network.one + 0.1, eight_ratio=network.eight)
    assert [verdict.met for verdict in verdicts(network, [ours], network.faster)] == [False, True, None, True]
