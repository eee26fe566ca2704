"""Words left out of texts: each word by a number of its own, never a whole text, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wardround.common.errors import ConfigError
from wardround.common.models import MODELS
from wardround.common.tasks import TASKS, Records
from wardround.common.tasks.word_augment import fewer_words

LEFT_OUT = 0.7  # as the promise says
NEWS = TASKS["news-topics"]
SMALL = {"vocabulary": 12, "embedding": 3, "hidden": 4, "layers": 1}

repeatable = settings(derandomize=True, deadline=None, max_examples=50)


def texts(*tokens: list[int]) -> Records:
    count = len(tokens)
    beside = torch.arange(2.0 * count).view(count, 2)
    return Records({"tokens": torch.tensor(tokens), "table": beside}, torch.arange(count) % 3, torch.arange(count) // 2)


def given_numbers(*numbers: float):
    def chance(count: int) -> Tensor:
        assert count == len(numbers)
        return torch.tensor(numbers, dtype=torch.float64)

    return chance


def seeded(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda count: torch.rand(count, generator=generator, dtype=torch.float64)


def left(records: Records) -> list[list[int]]:
    found: list[list[int]] = records.fields["tokens"].tolist()
    return found


some_texts = st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=1, max_size=5)


# --- the law --------------------------------------------------------------------------------------------------------------


def test_a_word_stays_where_its_own_number_is_not_below_the_chance():
    numbers = (0.69, 0.7, 0.0, 0.99, 0.71, 0.2)
    assert left(fewer_words(texts([4, 5, 6], [7, 8, 9]), given_numbers(*numbers))) == [[0, 5, 0], [7, 8, 0]]


@given(some_texts, st.integers(0, 2**32))
@repeatable
def test_nothing_but_words_changes_and_none_moves(tokens: list[list[int]], seed: int):
    records = texts(*tokens)
    before = records.fields["tokens"].clone()
    after = fewer_words(records, seeded(seed))
    found = after.fields["tokens"]
    assert found.dtype == torch.int64
    assert found.shape == before.shape
    assert bool(((found == before) | (found == 0)).all())
    assert torch.equal(records.fields["tokens"], before)
    assert after.fields["table"] is records.fields["table"]
    assert after.label is records.label
    assert after.patient is records.patient


@given(some_texts, st.integers(0, 2**32))
@repeatable
def test_a_text_that_has_words_keeps_one(tokens: list[list[int]], seed: int):
    low = seeded(seed)
    found = fewer_words(texts(*tokens), lambda count: low(count) * LEFT_OUT / 2)  # each number says: leave it out
    assert [sum(token != 0 for token in text) for text in left(found)] == [int(any(text)) for text in tokens]


@given(some_texts, st.integers(0, 2**32), st.integers(0, 4), st.integers(0, 5))
@repeatable
def test_a_words_number_decides_on_no_other_text(tokens: list[list[int]], seed: int, text: int, place: int):
    text %= len(tokens)
    numbers = seeded(seed)(6 * len(tokens))
    other = numbers.clone()
    other[6 * text + place] = 1 - other[6 * text + place]
    first, second = (left(fewer_words(texts(*tokens), lambda _, drawn=drawn: drawn)) for drawn in (numbers, other))
    assert [t for n, t in enumerate(first) if n != text] == [t for n, t in enumerate(second) if n != text]


def test_about_three_words_in_ten_stay():
    found = fewer_words(texts(*[[1] * 50] * 200), seeded(1)).fields["tokens"]
    assert found.double().mean().item() == pytest.approx(1 - LEFT_OUT, abs=0.02)


# --- in a study -----------------------------------------------------------------------------------------------------------


def test_the_views_of_a_text_are_each_left_out_anew_and_belong_to_its_patient():
    records = NEWS.blank(3)
    records.fields["tokens"][:] = torch.arange(1, 49)
    views = NEWS.views(records, 2, seeded(2))
    assert views.patient.tolist() == [0, 0, 1, 1, 2, 2]
    assert len({tuple(text) for text in left(views)}) == 6


def test_without_views_texts_are_whole():
    records = NEWS.blank(2)
    assert NEWS.views(records, None, seeded(3)) is records


# --- the network that reads them ------------------------------------------------------------------------------------------


def logits(tokens: list[int], seed: int = 0, **options: object) -> Tensor:
    torch.manual_seed(seed)
    return MODELS["text-rnn"]({**SMALL, **options})(tokens=torch.tensor([tokens])).detach()


def test_a_spread_scales_the_first_embeddings_and_nothing_else():
    torch.manual_seed(0)
    whole = MODELS["text-rnn"](SMALL).state_dict()
    torch.manual_seed(0)
    small = MODELS["text-rnn"]({**SMALL, "spread": 0.25}).state_dict()
    assert [name for name in whole if not torch.equal(whole[name], small[name])] == ["readers.tokens.embedding.weight"]
    assert torch.equal(small["readers.tokens.embedding.weight"], 0.25 * whole["readers.tokens.embedding.weight"])


def test_a_bag_is_read_whatever_the_order_and_over_the_root_of_its_words():
    torch.manual_seed(0)
    network = MODELS["text-rnn"]({**SMALL, "bag": True})
    reader = network.readers["tokens"]
    with torch.no_grad():
        found = reader(torch.tensor([[5, 0, 7, 7, 0], [7, 5, 7, 0, 0], [0, 0, 0, 0, 0]]))[:, 4:]
        rows = reader.embedding.weight
    assert torch.allclose(found[0], (rows[5] + 2 * rows[7]) / 3**0.5)
    assert torch.allclose(found[1], found[0])
    assert not bool(found[2].any())


@pytest.mark.parametrize("bag", [False, True])
def test_padding_behind_a_text_changes_nothing(bag: bool):
    assert torch.allclose(logits([3, 4, 5], bag=bag), logits([3, 4, 5, 0, 0, 0], bag=bag))


@pytest.mark.parametrize("spread", [-0.1, 1.5, float("nan"), "small"])
def test_a_spread_beyond_0_to_1_is_refused(spread: object):
    with pytest.raises(ConfigError, match="text-rnn"):
        MODELS["text-rnn"]({**SMALL, "spread": spread})
