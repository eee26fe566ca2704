"""Texts: how words become numbers without a list of the words that patients' texts hold.

A vocabulary counted from the texts would itself be a figure about patients, and would have to be agreed on by all sites.
Here a word's number is a hash of its letters, the same everywhere and for ever: the hashing trick of Weinberger et al. 2009,
https://arxiv.org/abs/0902.2206. Words that share a number are taken for each other.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from wardround.common.tasks.base import Records, blank, numbered, unfit
from wardround.common.tasks.labels import Names, numbers

_WORD = re.compile(r"[^\W_]+")  # letters and digits of any script


def words(text: str) -> list[str]:
    r"""The words of a text in order: runs of letters and digits, in small letters, after Unicode NFKC.

    >>> words("No acute  cardio-pulmonary\nDISEASE.")
    ['no', 'acute', 'cardio', 'pulmonary', 'disease']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


@lru_cache(maxsize=1 << 16)
def bucket(word: str, buckets: int) -> int:
    """The number of a word, 1 .. buckets: its BLAKE2b hash of 8 bytes (RFC 7693), big-endian, modulo `buckets`, plus 1.

    >>> bucket("effusion", 2000)
    1123
    """
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") % buckets + 1


@dataclass(frozen=True)
class TextSchema:
    """The first `length` words of one text a record, in one field `tokens`, (length,) int64; 0 after the last word.

    Attributes:
        length: words; what is beyond is cut off.
        buckets: words become 1 .. buckets, see `bucket`. Under privacy each row of an embedding is noised whether its word
            occurs or not, so a few thousand are better than a full language.
        labels: how each class may be written, class 0 first.
        columns: the file's columns, in this order where it has no header.
        label: which of them is the label; the others are texts, read one after the other.
    """

    length: int
    buckets: int
    labels: Names
    columns: tuple[str, ...] = ("text", "label")
    label: str = "label"

    @property
    def classes(self) -> int:
        """Labels are 0 .. classes - 1."""
        return len(self.labels)

    @property
    def codes(self) -> int:
        """How many different codes there are, padding included."""
        return self.buckets + 1

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that are texts."""
        return tuple(name for name in self.columns if name != self.label)

    def blank(self, count: int) -> Records:
        """See `Schema.blank`."""
        return blank(count, tokens=(self.length,))

    def encode(self, texts: Sequence[str], label: Sequence[str], patient: Sequence[str]) -> Records:
        """Texts, labels as written and a patient id per record -> `Records` with one field `tokens`.

        Raises:
            DataRefused: a text without words, or a label that the task does not have.
        """
        tokens = np.zeros((len(texts), self.length), dtype=np.int64)
        for row, text in zip(tokens, texts, strict=True):
            found = [bucket(word, self.buckets) for word in words(text)[: self.length]]
            row[: len(found)] = found
        wrong = tokens[:, 0] == 0
        if wrong.any():
            raise unfit(f"column {' + '.join(self.texts)}", wrong, "have no words")
        return Records({"tokens": torch.from_numpy(tokens)}, numbers(label, self.labels, self.label), numbered(patient))
