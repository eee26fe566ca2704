"""Sequences and texts: a code means the same at every site, and what does not fit is refused."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wardround.common.errors import DataRefused
from wardround.common.tasks.sequences import SequenceSchema
from wardround.common.tasks.text import TextSchema, bucket, words

DNA = SequenceSchema(length=4, alphabet="ACGT", unknown="NR", labels=(("EI",), ("N", "neither")))
TEXT = TextSchema(length=5, buckets=50, labels=(("normal", "0"), ("abnormal", "1")), columns=("title", "label", "body"))

repeatable = settings(derandomize=True, deadline=None, max_examples=50)


def codes(*sequences: str) -> list[list[int]]:
    return DNA.encode(sequences, ["EI"] * len(sequences), [str(n) for n in range(len(sequences))]).fields["tokens"].tolist()


# --- sequences ------------------------------------------------------------------------------------------------------------


def test_a_letter_is_its_place_in_the_alphabet_and_all_unknown_ones_are_one():
    assert codes("ACGT", "NRAA", "acgn") == [[1, 2, 3, 4], [5, 5, 1, 1], [1, 2, 3, 5]]
    assert DNA.codes == 6


@given(st.lists(st.text("ACGTNRacgtnr", min_size=4, max_size=4), min_size=1, max_size=5))
@repeatable
def test_every_sequence_of_the_alphabet_has_codes_below_the_vocabulary(sequences: list[str]):
    found = torch.tensor(codes(*sequences))
    assert found.shape == (len(sequences), 4)
    assert bool(((found > 0) & (found < DNA.codes)).all())


@given(st.text(min_size=4, max_size=4).filter(lambda text: set(text) - set("ACGTNRacgtnr")))
@repeatable
def test_another_letter_is_refused_without_being_quoted(sequence: str):
    with pytest.raises(DataRefused) as error:
        codes("ACGT", sequence)
    assert str(error.value) == "column sequence does not fit the task's schema"
    assert "1 records hold a letter" in error.value.detail


@pytest.mark.parametrize("sequence", ["", "ACG", "ACGTA"])
def test_another_length_is_refused(sequence: str):
    with pytest.raises(DataRefused) as error:
        codes("ACGT", sequence)
    assert "1 records are not 4 letters long" in error.value.detail


@pytest.mark.parametrize("label", ["", "ei", "2", "IE"])
def test_a_label_that_is_no_class_is_refused_without_being_quoted(label: str):
    with pytest.raises(DataRefused) as error:
        DNA.encode(["ACGT", "ACGT"], ["EI", label], ["a", "b"])
    assert str(error.value) == "label label does not fit the task's schema"


def test_a_class_may_be_written_in_more_ways_and_patients_are_numbered():
    records = DNA.encode(["ACGT"] * 3, ["N", "EI", "neither"], ["b", "a", "b"])
    assert records.label.tolist() == [1, 0, 1]
    assert records.patient.tolist() == [0, 1, 0]


@pytest.mark.parametrize("schema", [DNA, TEXT], ids=["sequences", "texts"])
def test_blank_records_are_shaped_like_real_ones(schema: SequenceSchema | TextSchema):
    real = schema.encode(["ACGT", "TTTT"], [schema.labels[0][0]] * 2, ["a", "b"])
    blank = schema.blank(2)
    assert {n: (t.shape, t.dtype) for n, t in blank.fields.items()} == {n: (t.shape, t.dtype) for n, t in real.fields.items()}
    assert (blank.label.shape, blank.label.dtype) == (real.label.shape, real.label.dtype)
    assert not bool(blank.fields["tokens"].any())


# --- texts ----------------------------------------------------------------------------------------------------------------


def tokens(text: str) -> list[int]:
    found: list[int] = TEXT.encode([text], ["normal"], ["a"]).fields["tokens"][0].tolist()
    return found


def test_a_words_number_is_the_published_hash():
    digest = hashlib.blake2b(b"effusion", digest_size=8).digest()
    assert bucket("effusion", 50) == int.from_bytes(digest, "big") % 50 + 1
    assert tokens("Effusion!") == [bucket("effusion", 50), 0, 0, 0, 0]


@given(st.text(), st.integers(1, 10_000))
@repeatable
def test_every_word_has_a_number_that_is_not_padding(word: str, buckets: int):
    assert 1 <= bucket(word, buckets) <= buckets


@given(st.text(max_size=60))
@repeatable
def test_words_have_no_blanks_or_marks_and_stay_words(text: str):
    found = words(text)
    assert all(word and word == word.lower() and not any(c.isspace() or c == "_" for c in word) for word in found)
    assert words(" ".join(found)) == found


@given(
    st.lists(st.sampled_from(["heart", "no", "Effusion", "2", "größer"]), min_size=1, max_size=9), st.sampled_from(" ,;\n_-")
)
@repeatable
def test_a_text_is_its_first_words_in_order_then_padding(written: list[str], between: str):
    expected = [bucket(word.lower(), 50) for word in written[:5]]
    assert tokens(between.join(written)) == expected + [0] * (5 - len(expected))


def test_two_ways_of_writing_a_letter_are_one():
    assert words("re\u0301sume\u0301") == words("r\u00e9sum\u00e9")
    assert words("ＣＴ ﬁlm") == ["ct", "film"]


@pytest.mark.parametrize("text", ["", " ", "...", "_ - \n"])
def test_a_text_without_words_is_refused(text: str):
    with pytest.raises(DataRefused) as error:
        tokens(text)
    assert str(error.value) == "column title + body does not fit the task's schema"
    assert "1 records have no words" in error.value.detail


def test_the_texts_are_all_columns_but_the_label():
    assert TEXT.texts == ("title", "body")
    assert TEXT.codes == 51
