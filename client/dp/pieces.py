"""A batch in pieces whose shapes are public.

The shape of a piece decides which kernels round how, and a model chosen for it could turn the last bit of one patient's
gradient into another patient's presence. So a piece has one of a few `sizes`, in which a record's numbers are the same bits,
and is filled up with blank records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wardround.client.dp.sizes import Sizes
from wardround.common.tasks import Records


@dataclass(frozen=True)
class Piece:
    """Whole patients, numbered 0, 1, ..., then blank records, each a patient of its own that counts for nothing."""

    records: Records
    counts: Tensor  # (patients,) bool: False for the blank ones


def pieces(batch: Records, sizes: Sizes, *, at_most: int) -> Iterator[Piece]:
    """`batch` grouped by patient in pieces of `sizes`; a patient cut in two would be clipped twice.

    Raises:
        ValueError: a patient has more than `at_most` records, which are no more than the largest piece.
    """
    if not len(batch):
        return
    for part in whole_patients(batch.patient, at_most=at_most, together=sizes.largest):
        yield filled(batch.take(part), sizes.fit(len(part)))


def whole_patients(patient: Tensor, *, at_most: int, together: int) -> list[Tensor]:
    """Indices into `patient`, (records,), grouped by patient, in parts of up to `together`; one empty part for no records.

    Raises:
        ValueError: a patient has more than `at_most` records, which are no more than `together`.
    """
    order = torch.argsort(patient, stable=True)
    parts = [0]
    for count in torch.unique_consecutive(patient[order], return_counts=True)[1].tolist():
        if count > at_most:
            raise ValueError(f"a patient has more than {at_most} records in one batch")
        if parts[-1] + count > together:
            parts.append(0)
        parts[-1] += count
    return list(torch.split(order, parts))


def filled(records: Records, size: int) -> Piece:
    """`records` and as many blank ones as make `size`."""
    missing, patients, device = size - len(records), records.patients, records.patient.device
    counts = torch.arange(patients + missing, device=device) < patients
    if not missing:
        return Piece(records, counts)
    fields = {name: torch.cat([t, t.new_zeros(missing, *t.shape[1:])]) for name, t in records.fields.items()}
    label = torch.cat([records.label, records.label.new_zeros(missing, *records.label.shape[1:])])
    patient = torch.cat([records.patient, torch.arange(patients, patients + missing, device=device)])
    return Piece(Records(fields, label, patient), counts)
