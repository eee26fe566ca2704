"""Sequences of letters, such as DNA: what the letters are, and how a sequence becomes codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wardround.common.tasks.base import Records, blank, numbered, unfit
from wardround.common.tasks.labels import Names, numbers


@dataclass(frozen=True)
class SequenceSchema:
    """One sequence of `length` letters a record, in one field `tokens`, (length,) int64.

    A letter's code is its place in `alphabet`, from 1; every letter of `unknown` gets the code after those. 0 is padding,
    which a sequence of full length never holds. Small letters mean the same as capitals.

    Attributes:
        length: letters of every sequence; another length is a mistake of file or window.
        alphabet: the letters that mean something.
        unknown: letters that a reader writes where it could not tell, such as IUPAC's N.
        labels: how each class may be written, class 0 first.
        sequence, label: the file's columns, in this order where it has no header.
    """

    length: int
    alphabet: str
    unknown: str
    labels: Names
    sequence: str = "sequence"
    label: str = "label"

    @property
    def classes(self) -> int:
        """Labels are 0 .. classes - 1."""
        return len(self.labels)

    @property
    def codes(self) -> int:
        """How many different codes there are, padding included."""
        return len(self.alphabet) + 1 + bool(self.unknown)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a file without a header."""
        return self.sequence, self.label

    def blank(self, count: int) -> Records:
        """See `Schema.blank`."""
        return blank(count, tokens=(self.length,))

    def encode(self, sequences: Sequence[str], label: Sequence[str], patient: Sequence[str]) -> Records:
        """Sequences, labels as written and a patient id per record -> `Records` with one field `tokens`.

        Raises:
            DataRefused: a sequence of another length, a letter or a label that the task does not have.
        """
        wrong = np.array([len(sequence) != self.length for sequence in sequences], dtype=bool)
        if wrong.any():
            raise unfit(f"column {self.sequence}", wrong, f"are not {self.length} letters long")
        code = np.full(256, -1, dtype=np.int64)
        for letter, number in self._codes().items():
            code[[ord(letter.upper()), ord(letter.lower())]] = number
        # a letter beyond ASCII becomes "?", which no alphabet has
        letters = "".join(sequences).encode("ascii", errors="replace")
        tokens = code[np.frombuffer(letters, dtype=np.uint8)].reshape(len(sequences), self.length)
        strange = np.asarray((tokens < 0).any(axis=1))
        if strange.any():
            raise unfit(f"column {self.sequence}", strange, f"hold a letter that is not one of {self.alphabet + self.unknown}")
        return Records({"tokens": torch.from_numpy(tokens)}, numbers(label, self.labels, self.label), numbered(patient))

    def _codes(self) -> dict[str, int]:
        known = {letter: number for number, letter in enumerate(self.alphabet, start=1)}
        return known | dict.fromkeys(self.unknown, len(self.alphabet) + 1)
