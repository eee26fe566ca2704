"""A plan promises only what it can keep, and is named by its exact text."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.errors import ConfigError
from wardround.common.plan import SignedText, StudyPlan, two_digits
from wardround.common.privacy import NoisedSteps, spent

PRIVATE = {"epsilon": 3.0, "delta": 1e-5}


def plan(**keys: object) -> StudyPlan:
    table = {"name": "study", "task": "heart-disease", "rounds": 10, "min_sites": 3, "sites": {"a": 200, "b": 82, "c": 130}}
    return StudyPlan.build(table | keys, source="a test")


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no rounds": ({"rounds": 0}, r"rounds: .* greater than or equal to 1 \(got 0\)"),
    "10^9 rounds": ({"rounds": 10**9}, r"rounds: .* less than or equal to 100000"),
    "epsilon 0": ({"privacy": PRIVATE | {"epsilon": 0.0}}, r"privacy\.epsilon: .* greater than 0"),
    "epsilon below 0": ({"privacy": PRIVATE | {"epsilon": -1.0}}, r"privacy\.epsilon: .* greater than 0"),
    "epsilon of 1000": ({"privacy": PRIVATE | {"epsilon": 1000.0}}, r"privacy\.epsilon: .* less than or equal to 100"),
    "no epsilon": ({"privacy": {}}, r"privacy\.epsilon: is missing"),
    "delta 0": ({"privacy": PRIVATE | {"delta": 0.0}}, r"privacy\.delta"),
    "delta for nobody": ({"privacy": PRIVATE | {"delta": 1e-300}}, r"privacy\.delta"),
    "delta of a tenth": ({"privacy": PRIVATE | {"delta": 0.1}}, r"privacy\.delta"),
    "delta too likely for the largest": (
        {"privacy": PRIVATE | {"delta": 1e-3}, "sites": {"a": 50, "b": 60, "c": 110}},
        "too likely a failure for a site of 110",
    ),
    "sampling above 1": ({"privacy": PRIVATE | {"sampling_rate": 1.5}}, r"privacy\.sampling_rate"),
    "no clipping": ({"privacy": PRIVATE | {"clip_norm": 0.0}}, r"privacy\.clip_norm"),
    "another unit": ({"privacy": PRIVATE | {"unit": "record"}}, r"privacy\.unit"),
    "noise that costs more": (
        {"privacy": PRIVATE | {"noise_multiplier": 0.5}},
        r"10 rounds x 1 attempts .* beyond the budget of 3",
    ),
    "attempts beyond the budget": (
        {"privacy": PRIVATE | {"noise_multiplier": 1.1, "max_attempts": 10}},
        r"10 rounds x 10 attempts .* beyond the budget of 3",
    ),
    "noise 1e-300": ({"privacy": PRIVATE | {"noise_multiplier": 1e-300}}, r"privacy\.noise_multiplier"),
    "noise 1e200": ({"privacy": PRIVATE | {"noise_multiplier": 1e200}}, r"privacy\.noise_multiplier"),
    "10^10 steps": ({"rounds": 100_000, "local": {"steps": 10_000}, "privacy": PRIVATE | {"max_attempts": 10}}, "10000000000"),
    "balanced sampler": (
        {"privacy": PRIVATE, "local": {"sampler": "balanced"}},
        r"local\.sampler: 'balanced' draws some patients",
    ),
    "batches with privacy": ({"privacy": PRIVATE, "local": {"batch_size": 8}}, r"local\.batch_size: with \[privacy\]"),
    "no noise in counts": (
        {"privacy": PRIVATE | {"counts_noise": 0.0}, "loss": {"class_weights": "counted"}},
        r"privacy\.counts_noise: .* greater than or equal to 0\.5",
    ),
    "counts dearer than the study": (
        {"privacy": PRIVATE | {"epsilon": 0.2}, "loss": {"class_shares": "counted"}},
        r"privacy\.counts_noise: counting classes at noise 10 costs epsilon 0\.34",
    ),
    "noise of counts that nobody takes": (
        {"privacy": PRIVATE | {"counts_noise": 5.0}},
        r"privacy\.counts_noise: does nothing unless",
    ),
    "a cap of weights that are not counted": (
        {"loss": {"class_weights": [1.0, 2.0], "most_weight": 5.0}},
        r"loss\.most_weight: does nothing unless",
    ),
    "weights by another word": ({"loss": {"class_weights": "balanced"}}, r"loss\.class_weights.*: input should be 'counted'"),
    "noise that the counts make too dear": (
        {"privacy": PRIVATE | {"noise_multiplier": 1.6, "counts_noise": 1.9}, "loss": {"class_weights": "counted"}},
        r"privacy\.noise_multiplier: .* beyond the budget of 3",
    ),
    "proximal with one step": ({"local": {"proximal": 0.1}}, r"local\.proximal: does nothing when local\.steps = 1"),
    "more sites than there are": ({"min_sites": 4}, "min_sites: 4 sites are wanted in a round, but the plan names 3"),
    "no sites": ({"sites": {}, "min_sites": 1}, "sites: dictionary should have at least 1 item"),
    "a site of nobody": ({"sites": {"a": 200, "b": 0, "c": 130}}, r"sites\.b: .* greater than or equal to 1"),
    "a clip norm that float32 cannot hold": (
        {"privacy": PRIVATE | {"clip_norm": 1e-30}},
        r"privacy\.clip_norm: .* greater than or equal to 0\.000001",
    ),
    "trim of a mean": ({"trim": 0.2}, "trim: does nothing with combine = 'mean'"),
    "weights of a median": ({"combine": "median", "weighting": "equal"}, "weighting: does nothing with combine = 'median'"),
    "momentum of sgd": ({"step": {"momentum": 0.5}}, r"step\.momentum: does nothing with rule = 'sgd'"),
    "second momentum of momentum": (
        {"step": {"rule": "momentum", "second_momentum": 0.5}},
        r"step\.second_momentum: does nothing with rule = 'momentum'",
    ),
    "a hundred layers": ({"model": {"hidden": [1] * 100}}, "model.hidden"),
    "an exact number of patients": ({"sites": {"a": 203, "b": 82, "c": 130}}, r"sites\.a: 203 tells more .* \(such as 200\)"),
    "a secure sum": ({"secure_sum": True}, "secure_sum: this release of wardround has no secure sum"),
    "a median of a secure sum": ({"secure_sum": True, "combine": "median"}, "combine: 'median' needs every site's own update"),
    "a median of two": ({"combine": "median", "min_sites": 2}, "combine: 'median' of fewer than 3 updates protects nobody"),
    "trim of half": ({"combine": "trimmed-mean", "trim": 0.5}, "trim: .* less than 0.5"),
    "a title that moves the cursor": ({"title": "\x1b[2J"}, "title: string should match"),
    "a title that reads backwards": ({"title": "\u202eyduts"}, "title: string should match"),
    "a long title": ({"title": "x" * 201}, "title: string should have at most 200"),
}


@pytest.mark.parametrize(("keys", "why"), REFUSED.values(), ids=REFUSED)
def test_a_plan_that_cannot_be_kept_is_refused_quickly_and_says_why(keys: dict[str, object], why: str):
    start = time.process_time()
    with pytest.raises(ConfigError, match=why):
        plan(**keys)
    assert time.process_time() - start < 5


def test_all_contradictions_are_told_together():
    with pytest.raises(ConfigError) as refused:
        plan(min_sites=9, secure_sum=True, local={"proximal": 1.0, "sampler": "balanced"}, privacy=PRIVATE, sites={"a": 123})
    for key in ("min_sites", "secure_sum", "local.proximal", "local.sampler", "sites.a"):
        assert f"  {key}: " in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        "..",
        ".",
        "a\0",
        "a\n",
        "a" * 65,
        "x" * 300,
        "Va",
        "-va",
        "va-",
        "a b",
        "vа",
        "a_b",
        "a.b",
        "../../etc/passwd",
    ],
)
def test_a_site_is_called_something_that_cannot_be_mistaken(name: str):
    with pytest.raises(ConfigError, match="string should match"):
        plan(sites={"a": 200, "b": 82, name: 130})


@pytest.mark.parametrize("name", ["a", "7", "st-olav", "site-001", "a" * 64])
def test_an_honest_name_is_a_name(name: str):
    assert name in plan(sites={"x": 200, "y": 82, name: 130}).sites


@given(st.integers(1, 10**9))
@settings(deadline=None)
def test_two_digits_are_two_digits(count: int):
    rounded = two_digits(count)
    assert len(str(rounded).rstrip("0")) <= 2
    assert two_digits(rounded) == rounded
    assert abs(rounded - count) <= count * 0.05


@given(st.lists(st.integers(1, 10**6).map(two_digits), min_size=1, max_size=50), st.sampled_from(["declared", "equal"]))
@settings(max_examples=50, deadline=None)
def test_weights_are_public_and_add_up_to_one(sizes: list[int], weighting: str):
    found = plan(sites={f"s{n}": size for n, size in enumerate(sizes)}, min_sites=1, weighting=weighting).weights()
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)
    assert all(weight > 0 for weight in found.values())
    if weighting == "declared":
        assert [w * sum(sizes) for w in found.values()] == pytest.approx(sizes)


def test_the_noise_pays_for_every_attempt_at_every_step_of_every_round():
    private = plan(privacy=PRIVATE | {"max_attempts": 2, "sampling_rate": 0.5}, local={"steps": 3})
    steps = private.noised_steps(private.noise_multiplier())
    assert steps.steps == 10 * 2 * 3
    assert 2.9 < spent([steps], 1e-5) <= 3.0


def test_the_noise_of_training_leaves_room_for_the_counts_that_the_same_patients_pay():
    counted = plan(privacy=PRIVATE, loss={"class_weights": "counted", "class_shares": "counted"})
    training, counts = counted.cost().training
    assert counts == NoisedSteps(1.0, 10.0, 1)  # one question, however many keys want it
    assert training.noise_multiplier > plan(privacy=PRIVATE).noise_multiplier()
    assert 2.9 < spent([training, counts], 1e-5) <= 3.0
    with_looks = plan(privacy=PRIVATE, validation={"every": 3})
    assert with_looks.noise_multiplier() == plan(privacy=PRIVATE).noise_multiplier()  # other patients pay for looks
    assert 2.9 < spent(with_looks.cost().aside, 1e-5) <= 3.0


@given(st.integers(1, 60), st.integers(1, 70))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_as_many_looks_are_paid_for_as_rounds_are_looked_at(rounds: int, every: int):
    known = plan(rounds=rounds, validation={"every": every})
    assert known.looks == sum(known.looks_after(round) for round in range(1, rounds + 1))
    assert plan(rounds=rounds).looks == 0


def test_a_plan_without_privacy_has_no_noise_to_ask_for():
    with pytest.raises(ConfigError, match=r"study study has no \[privacy\] section"):
        plan().noise_multiplier()


# ---- identity


def test_a_study_is_its_exact_text(study_file: Path, tmp_path: Path):
    text = study_file.read_text()
    known = SignedText.load(study_file)
    assert known.digest == hashlib.sha256(text.encode()).hexdigest()
    assert SignedText.received(text).digest == known.digest
    for other in (
        text + "\n",
        text.replace("#", "# ", 1),
        text.replace("\n", "\r\n"),
        text.replace("rounds = 100", "rounds = 99"),
    ):
        path = tmp_path / "other.toml"
        path.write_bytes(other.encode())
        changed = SignedText.load(path)
        assert changed.digest != known.digest
        assert changed.text == other


def test_a_byte_order_mark_is_no_part_of_the_text(study_file: Path, tmp_path: Path):
    path = tmp_path / "marked.toml"
    path.write_bytes(b"\xef\xbb\xbf" + study_file.read_bytes())
    assert SignedText.load(path).digest == SignedText.load(study_file).digest
