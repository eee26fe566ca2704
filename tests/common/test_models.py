"""The networks of the tasks: what they take and give, how many numbers learn, and what they refuse."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from task_nets import CASES, LARGE, Case
from wardround.common.errors import ConfigError
from wardround.common.models import MODELS
from wardround.common.models.cnn import MaxPool
from wardround.common.models.recurrent import CELLS, Recurrent
from wardround.common.models.standardised import StandardisedConv

EACH = [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in LARGE)]
WITH_TOKENS = [case for case in CASES if "tokens" in case.fields]


# --- what they take and give ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_network_gives_one_finite_answer_for_each_record(case: Case):
    records = case.records(2)
    output = case.build()(**records.fields)
    assert output.shape == (2, *case.output)
    assert bool(output.isfinite().all())
    losses = case.loss(output, records.label)
    assert losses.shape == (2,)
    assert bool(losses.isfinite().all())


@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_record_does_not_see_its_neighbour(case: Case):
    model, records = case.build().eval(), case.records(3)
    before = model(**records.fields)
    changed = {name: t.clone() for name, t in records.fields.items()}
    for t in changed.values():
        t[1:] = t[1:].flip(0) * 2 if t.is_floating_point() else t[1:].flip(0) + (t[1:] == 0).long()
    after = model(**changed)
    torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after[1:], before[1:])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_few_steps_lower_the_loss(case: Case):
    model, records = case.build(), case.records(4)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=0.02)
    seen = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = case.loss(model(**records.fields), records.label).mean()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert min(seen[-3:]) < 0.98 * seen[0]


# --- how many numbers learn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "options", "count"), [
    ("cnn", {}, 205_890),
    ("two-conv-cnn", {}, 545_098),
    ("three-conv-cnn", {}, 2_152_258),
    ("text-rnn", {}, 2_626_564),
    ("text-rnn", {"cell": "lstm"}, 2_824_708),
    ("text-rnn", {"cell": "gru"}, 2_758_660),
    ("text-rnn", {"bidirectional": True}, 2_725_892),
    ("dcgan-generator", {}, 1_068_931),
    ("dcgan-discriminator", {}, 663_361),
    ("ws-cnn", {}, 23_538),
    ("sequence-cnn", {}, 19_653),
    ("unet", {"side": 28}, 117_393),
    ("detector", {"side": 64}, 122_165),
])  # fmt: skip
def test_a_network_has_as_many_numbers_as_its_page_says(network: str, options: dict[str, object], count: int):
    with torch.device("meta"):
        model = MODELS[network](options)
    assert sum(p.numel() for p in model.parameters()) == count
    if not options.keys() & {"cell", "bidirectional"}:
        assert f"{count:,} parameters" in str(MODELS[network].build.__doc__)


def test_the_documents_networks_have_the_layers_that_were_drawn():
    three = MODELS["three-conv-cnn"]({})
    assert [(c.in_channels, c.out_channels) for c in three.modules() if isinstance(c, nn.Conv2d)] == [
        (3, 32),
        (32, 64),
        (64, 128),
    ]
    assert [(f.in_features, f.out_features) for f in three.modules() if isinstance(f, nn.Linear)] == [(2048, 1000), (1000, 10)]
    two = MODELS["two-conv-cnn"]({})
    assert [(f.in_features, f.out_features) for f in two.modules() if isinstance(f, nn.Linear)] == [(4096, 128), (128, 10)]


# --- what they refuse -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "options", "why"), [
    ("cnn", {"widht": 3}, "widht"),
    ("cnn", {"side": 3}, "side is 3"),
    ("cnn", {"channels": 0}, "channels is 0"),
    ("cnn", {"dropout": 1.5}, "dropout"),
    ("cnn", {"dropout": "much"}, "much"),
    ("three-conv-cnn", {"side": 7}, "side is 7"),
    ("text-rnn", {"cell": "elman"}, "cell is 'elman'; there are: rnn, lstm, gru"),
    ("text-rnn", {"cell": ["gru"]}, "list"),
    ("text-rnn", {"pool": "last"}, "pool is 'last'; there are: mean, attention, places"),
    ("text-rnn", {"pool": "places"}, "which is for sequences of one length"),
    ("text-rnn", {"layers": 0}, "layers is 0"),
    ("text-rnn", {"layers": 10_000_000}, "layers is 10000000; at most 64"),
    ("transformer", {"length": 4, "inputs": 3, "layers": 65}, "layers is 65; at most 64"),
    ("unet", {"side": 64, "depth": 65}, "depth is 65; at most 64"),
    ("text-rnn", {"hidden": 2.5}, "hidden is 2.5"),
    ("text-rnn", {"hidden": True}, "hidden is True"),
    ("sequence-rnn", {}, "vocabulary"),
    ("series-rnn", {"inputs": 6, "table": -1}, "table is -1"),
    ("series-rnn", {"inputs": 6, "classes": 0}, "classes is 0"),
    ("transformer", {"length": 4}, "one of vocabulary"),
    ("transformer", {"length": 4, "inputs": 3, "vocabulary": 3}, "one of vocabulary"),
    ("transformer", {"length": 4, "inputs": 3, "heads": 5}, "width is 32"),
    ("fusion", {}, "no field is read"),
    ("sequence-cnn", {"widths": []}, "widths is 0"),
    ("sequence-cnn", {"kernel": 0}, "kernel is 0"),
    ("unet", {"side": 30}, "cannot be halved 2 times"),
    ("unet", {"side": 32, "depth": 0}, "depth is 0"),
    ("detector", {"side": 40}, "a multiple of 16"),
    ("dcgan-generator", {"side": 30}, "side is 30"),
    ("dcgan-discriminator", {"side": 8}, "side is 8"),
    ("dcgan-discriminator", {"kinds": -1}, "kinds is -1"),
    ("ws-cnn", {"width": 0}, "width is 0"),
    ("torchvision", {"name": "resnet19"}, "no classifier called 'resnet19'"),
    ("torchvision", {"name": "fasterrcnn_resnet50_fpn"}, "no classifier"),
    ("torchvision", {"name": "resnet18", "channels": 2}, "channels is 2"),
    ("torchvision", {"name": "resnet18", "train": "tail"}, "train is 'tail'"),
    ("torchvision", {"name": "resnet18", "dropout": 0.1}, "dropout"),
    ("torchvision", {"name": "resnet18", "weights": "a.pt"}, "weights"),
])  # fmt: skip
def test_a_wrong_option_is_refused_by_its_name(network: str, options: dict[str, object], why: str):
    with pytest.raises(ConfigError, match=f"model.{network}: .*{why}"):
        MODELS[network](options)


def test_what_the_task_fixes_is_not_the_plans_to_choose():
    with pytest.raises(ConfigError, match=r"model\.side: follows from the task's data"):
        MODELS["unet"]({"side": 64}, side=28)


def test_fields_that_nobody_reads_are_refused():
    model = MODELS["fusion"]({}, features=5, inputs=6)
    with pytest.raises(TypeError, match=r"the network reads \['series', 'table'\]"):
        model(table=torch.zeros(1, 5))


# --- padding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in WITH_TOKENS if case.options.get("pool") != "places"], ids=str)
def test_padding_does_not_change_the_answer(case: Case):
    longer = {"length": 12} if case.network == "transformer" else {}
    model = case.build(**longer)
    fields = case.records(3).fields
    tokens = fields["tokens"].clamp(min=1)
    tokens[1, 5:] = 0
    padded = F.pad(tokens, (0, 4))
    found = model(**{**fields, "tokens": padded})
    torch.testing.assert_close(found, model(**{**fields, "tokens": tokens}), rtol=1e-5, atol=1e-6)
    alone = {name: t[1:2] for name, t in fields.items()} | {"tokens": tokens[1:2, :5]}
    torch.testing.assert_close(found[1:2], model(**alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", WITH_TOKENS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_record_of_padding_alone_gets_an_answer_and_teaches_no_token(case: Case, training: bool):
    model = case.build().train(training)
    fields = case.records(2).fields
    fields = {**fields, "tokens": torch.zeros_like(fields["tokens"])}
    with torch.no_grad():
        assert bool(model(**fields).isfinite().all())
    case.loss(model(**fields), torch.tensor([0, 1])).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    assert not any(bool(g.any()) for name, g in gradients.items() if "embedding" in name)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_masked_record_gives_what_torchs_packed_sequences_give(cell: str, layers: int):
    torch.manual_seed(3)
    ours = Recurrent(4, hidden=5, layers=layers, cell=cell, bidirectional=True)
    theirs = CELLS[cell](4, 5, num_layers=layers, bidirectional=True, batch_first=True)
    for number, ways in enumerate(ours.layers):
        for way, suffix in zip(ways, ("", "_reverse"), strict=True):
            for name, p in way.named_parameters():
                theirs.get_parameter(f"{name[:-1]}{number}{suffix}").data.copy_(p)
    x, end = torch.randn(3, 7, 4), torch.tensor([7, 1, 4])
    packed = pack_padded_sequence(x, end, batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(theirs(packed)[0], batch_first=True)
    there = torch.arange(7) < end[:, None]
    torch.testing.assert_close(ours(x, end)[there], expected[there])


# --- parts ----------------------------------------------------------------------------------------------------------------


def test_a_pool_with_the_channels_last_is_torchs_own():
    x = torch.randn(3, 4, 7, 7, requires_grad=True)
    ours, theirs = MaxPool(2)(x), nn.MaxPool2d(2)(x)
    assert torch.equal(ours, theirs)
    weight = torch.randn_like(theirs)
    (a,), (b,) = (torch.autograd.grad((y * weight).sum(), x) for y in (ours, theirs))
    assert torch.equal(a, b)


def test_a_standardised_convolution_is_one_with_mean_0_and_variance_1_over_fan_in():
    torch.manual_seed(4)
    layer = StandardisedConv(3, 5)
    x = torch.randn(2, 3, 6, 6)
    weight = layer.weight[0].detach()
    flat = weight.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True) / 27**0.5
    torch.testing.assert_close(layer(x), F.conv2d(x, flat.view_as(weight), padding=1), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(3).add_(0.5)
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-4)


def test_a_generators_images_are_between_minus_1_and_1_and_of_the_kind_that_was_asked_for():
    model = MODELS["dcgan-generator"]({"channels": 1, "side": 28, "width": 4, "z": 6, "kinds": 3})
    noise = torch.randn(2, 6)
    zero, one = (model(noise=noise, kind=torch.full((2,), kind)) for kind in (0, 1))
    assert float(zero.detach().abs().max()) <= 1
    assert not torch.allclose(zero, one)


# --- published networks ---------------------------------------------------------------------------------------------------


def test_networks_are_registered_without_torchvision():
    code = "import sys, wardround.common.models; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("name", "head", "block"), [
    ("resnet18", "fc", "layer4.1"),
    ("densenet121", "classifier", "features.denseblock4"),
    ("mobilenet_v3_small", "classifier", "features.12"),
    ("convnext_tiny", "classifier", "features.7.2"),
    ("vit_b_16", "heads", "encoder.layers.encoder_layer_11"),
])  # fmt: skip
def test_only_the_end_of_a_published_network_learns_where_that_is_wanted(name: str, head: str, block: str):
    for train, start in (("all", ""), ("head", head), ("last-block", block)):
        with torch.device("meta"):
            model = MODELS["torchvision"]({"name": name, "train": train})
        learns = [own.removeprefix("network.") for own, p in model.named_parameters() if p.requires_grad]
        frozen = [own.removeprefix("network.") for own, p in model.named_parameters() if not p.requires_grad]
        assert learns[0].startswith(start)
        assert not any(own.startswith((head, block) if train == "last-block" else head) for own in frozen)
        assert bool(frozen) == (train != "all")


def test_what_does_not_learn_is_the_same_for_every_seed():
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(MODELS["torchvision"]({"name": "squeezenet1_1", "train": "head"}))
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if not one.requires_grad:
            assert torch.equal(one, other), name
        elif one.dim() > 1:
            assert not torch.equal(one, other), name


def test_a_grey_image_is_read_as_a_colour_image_of_three_equal_channels():
    model = MODELS["torchvision"]({"name": "squeezenet1_1"}).eval()
    grey: Tensor = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(model(image=grey), model(image=grey.repeat(1, 3, 1, 1)))


def test_regnet_can_be_counted_without_its_memory():
    with torch.device("meta"):
        assert sum(p.numel() for p in MODELS["torchvision"]({"name": "regnet_x_400mf"}).parameters()) > 5_000_000
