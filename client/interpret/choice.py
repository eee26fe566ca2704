"""Which records are shown: the same ones every time, chosen by what the model says of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wardround.client.interpret.answers import Answers


@dataclass(frozen=True)
class Chosen:
    """One record to show: its position, and why it was chosen."""

    position: int
    why: str


def choose(found: Answers, label: Tensor, count: int) -> list[Chosen]:
    """At most `count` records, one of each kind in turn: certain and right, certain and wrong, least certain.

    Where the label is no class: smallest error, largest error, middling error. Of equals the first comes first.
    """
    if found.target == "class":
        right = found.answer == label
        queues = {
            "among the most certain answers that are right": _order(-found.certainty, right),
            "among the most certain answers that are wrong": _order(-found.certainty, ~right),
            "among the least certain answers": _order(found.certainty),
        }
    else:
        queues = {
            "among the smallest errors": _order(found.loss),
            "among the largest errors": _order(-found.loss),
            "a middling error": _order((found.loss - found.loss.median()).abs()),
        }
    taken: dict[int, Chosen] = {}
    while len(taken) < min(count, len(label)):
        for why, queue in queues.items():
            position = next((p for p in queue if p not in taken), None)
            if position is not None and len(taken) < count:
                taken[position] = Chosen(position, why)
    return list(taken.values())


def _order(key: Tensor, among: Tensor | None = None) -> list[int]:
    """Positions by rising `key`; those flagged in `among` alone."""
    order = torch.argsort(key, stable=True)
    return (order if among is None else order[among[order]]).tolist()
