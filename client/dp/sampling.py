"""Who takes part in a step: every patient by an own secret coin (Poisson sampling)."""

from __future__ import annotations

import torch
from torch import Tensor

from wardround.client.dp.coins import Coins


def draw(patient: Tensor, *, rate: float, at_most: int, coins: Coins) -> Tensor:
    """Indices of the records in this step, grouped by patient; possibly none.

    Each patient is in with probability `rate`, independently; of a patient with more than `at_most` records, a random
    `at_most` of them. The size of a batch is itself private: nothing downstream may divide by it.

    Args:
        patient: (records,) int64, numbering patients 0, 1, ...
        rate: the plan's sampling rate, in (0, 1].
        at_most: the plan's records_per_patient.
        coins: the secret source.
    """
    count = int(patient.max()) + 1 if len(patient) else 0
    chosen = coins.uniform(count) < rate
    index = torch.nonzero(chosen[patient]).squeeze(1)
    if not len(index):
        return index
    shuffled = index[torch.argsort(coins.uniform(len(index)))]
    grouped = shuffled[torch.argsort(patient[shuffled], stable=True)]
    owner = patient[grouped]
    _, size = torch.unique_consecutive(owner, return_counts=True)
    place = torch.arange(len(grouped)) - (size.cumsum(0) - size).repeat_interleave(size)
    return grouped[place < at_most]
