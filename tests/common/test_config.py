"""Whatever stands in a file: a frozen value comes out, or every problem in it, in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.client.policy import SiteConfig
from wardround.common.config import LARGEST_FILE, read_text
from wardround.common.errors import ConfigError
from wardround.common.plan import StudyPlan

PLAN = 'name = "a"\ntask = "heart-disease"\nrounds = 10\n'
SITES = "[sites]\ncork = 200\nva = 130\n"


def problems(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        StudyPlan.parse(text, source="plan.toml")
    return str(refused.value)


def test_every_problem_is_told_at_once_with_its_key():
    told = problems(
        'name = "A study"\nrounds = "ten"\nmin_sits = 3\n[sites]\ncork = 200\n"../etc" = 5\n'
        '[step]\nrule = "adma"\n[locl]\nsteps = 1\n'
    )
    for line in (
        "name: string should match",
        "task: is missing",
        "rounds: input should be a valid integer (got 'ten')",
        "min_sits: no such key (did you mean min_sites?)",
        "sites.../etc",
        "step.rule: input should be 'sgd', 'momentum', 'adam' or 'yogi' (got 'adma')",
        "locl: no such key (did you mean local?)",
    ):
        assert line in told
    assert told.startswith("plan.toml is not a valid StudyPlan:\n")


def test_a_misspelt_key_in_a_section_is_compared_with_that_section():
    assert "privacy.epsilom: no such key (did you mean epsilon?)" in problems(f"{PLAN}{SITES}[privacy]\nepsilom = 3.0")
    assert "step.learning_rat: no such key (did you mean learning_rate?)" in problems(
        f"{PLAN}{SITES}[step]\nlearning_rat = 1.0"
    )
    with pytest.raises(ConfigError, match=r"data\.heart-disease\.pth: no such key"):
        SiteConfig.parse('site = "va"\n[data.heart-disease]\nloader = "table"\npath = "x"\npth = "y"')


@pytest.mark.parametrize(
    "line",
    [
        "rounds = true",
        "rounds = 10.0",
        "rounds = '10'",
        "deadline_seconds = true",
        "deadline_seconds = nan",
        "deadline_seconds = inf",
        "secure_sum = 1",
        "seed = -1",
        "seed = 9223372036854775808",
        "title = 7",
    ],
)
def test_nothing_is_converted_silently(line: str):
    key = line.split(" ")[0]
    text = "\n".join(part for part in PLAN.splitlines() if not part.startswith(f"{key} "))
    assert f"{key}: " in problems(f"{text}\n{line}\n{SITES}")


def test_not_a_number_is_refused_wherever_it_stands():
    for section in (
        "[model]\nwidth = nan",
        "[step]\nlearning_rate = nan",
        "[privacy]\nepsilon = inf",
        "[local]\nproximal = nan",
    ):
        assert "finite" in problems(f"{PLAN}{SITES}{section}")


def test_a_key_given_twice_is_refused():
    assert "is not valid TOML" in problems(f"{PLAN}rounds = 20\n{SITES}")
    assert "is not valid TOML" in problems(f"{PLAN}{SITES}cork = 300\n")


@pytest.mark.parametrize(
    "text", ["a = " + "1" * 5000, "a = " + "[" * 20_000, "a = '\ud800'", "\0", "a = 1e99999\r", "x = 0001-01-01T00:00:00+24:00"]
)
def test_a_text_that_breaks_parsers_is_refused_in_words(text: str):
    assert problems(text).startswith("plan.toml is not ")


def test_an_error_quotes_little_and_nothing_that_moves_a_cursor():
    told = problems(f'{PLAN}title = "{"x" * 100_000}"\n"\\u001b[31m" = 1\n{SITES}"e\\u0000\\r" = 5')
    assert len(told) < 2000
    assert all(line.isprintable() for line in told.splitlines())


@given(st.text(max_size=300))
@settings(max_examples=300, deadline=None)
def test_no_text_raises_anything_but_a_refusal(text: str):
    parsed_or_refused(text)
    parsed_or_refused(f"{PLAN}{text}")


SCRAPS = st.lists(
    st.sampled_from(
        [
            *PLAN.splitlines(),
            *SITES.splitlines(),
            "[privacy]",
            "epsilon = 3.0",
            "delta = 1e-5",
            "[local]",
            "steps = 4",
            "noise_multiplier = 0.1",
            "noise_multiplier = 1e6",
            "sampling_rate = 1e-300",
            "rounds = 100000",
            "[model]",
            "hidden = [1, [2]]",
            "sites = 3",
            "[[sites]]",
            "sites.a = -1",
            "local = []",
            "combine = 'median'",
            "max_attempts = 10",
            "secure_sum = true",
            "x.y.z = {}",
            "= 1",
            "'' = nan",
            "steps = 10000",
        ]
    ),
    max_size=12,
)


@given(SCRAPS)
@settings(max_examples=300, deadline=None)
def test_no_patchwork_of_a_plan_raises_anything_but_a_refusal(lines: list[str]):
    parsed_or_refused("\n".join(lines))
    parsed_or_refused(PLAN + SITES + "\n".join(lines))


def parsed_or_refused(text: str) -> None:
    try:
        assert isinstance(StudyPlan.parse(text), StudyPlan)
    except ConfigError:
        return


# ---- files


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path):
    path = tmp_path / "plan.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (PLAN + SITES).replace("\n", "\r\n").encode())
    assert StudyPlan.load(path).rounds == 10


@pytest.mark.parametrize("content", [b"\xff\xfen\0a\0", b'title = "\xe9"', b"\xc3\x28"], ids=["utf-16", "latin-1", "torn"])
def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "plan.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"plan\.toml is not UTF-8 text"):
        read_text(path)


def test_a_file_of_100_megabytes_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "plan.toml"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    with pytest.raises(ConfigError, match=f"has {100 << 20} bytes; a configuration has at most {LARGEST_FILE}"):
        read_text(path)


def test_a_folder_or_nothing_is_no_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_text(tmp_path / "none.toml")


def test_a_config_does_not_change():
    plan = StudyPlan.parse(PLAN + SITES)
    with pytest.raises(ValueError, match="frozen"):
        plan.rounds = 11  # type: ignore[misc]
