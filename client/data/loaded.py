"""What a loader found in a site's files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from wardround.common.tasks import Records


@dataclass(frozen=True)
class Loaded:
    """Records, and what the files say about them.

    Attributes:
        records: encoded by the task's schema.
        owner: the patient's id for each record; None where each record is a patient.
        held_out: (records,) bool, which are never trained on; None where the files have no such split.
    """

    records: Records
    owner: list[str] | None = None
    held_out: Tensor | None = None

    def take(self, index: Tensor) -> Self:
        """The records at `index`, patients numbered anew."""
        owner = None if self.owner is None else [self.owner[i] for i in index.tolist()]
        held_out = None if self.held_out is None else self.held_out[index]
        return replace(self, records=self.records.take(index), owner=owner, held_out=held_out)

    def __add__(self, other: Loaded) -> Loaded:
        """Both, taken as different patients; what only one of them says about its records is lost."""
        owner = held_out = None
        if self.owner is not None and other.owner is not None:
            owner = [f"0/{name}" for name in self.owner] + [f"1/{name}" for name in other.owner]
        if self.held_out is not None and other.held_out is not None:
            held_out = torch.cat([self.held_out, other.held_out])
        return Loaded(self.records + other.records, owner, held_out)
