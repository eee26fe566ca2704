"""Many updates into one. A mean is added up as updates arrive; the robust rules need them side by side."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from wardround.common.plan import StudyPlan
from wardround.common.weights import Shapes, Weights


class Combiner(Protocol):
    """Collects the updates of one round."""

    def add(self, update: Weights, weight: float) -> None:
        """Take one site's update; `weight` is its public weight in the plan."""

    def result(self) -> Weights:
        """The combined update; needs at least one."""


class WeightedMean:
    """Sum of weight x update over the sum of weights, in memory for one model however many sites there are."""

    def __init__(self, shapes: Shapes) -> None:
        self._sum = {name: torch.zeros(shape) for name, shape in shapes.of.items()}
        self._weight = 0.0

    def add(self, update: Weights, weight: float) -> None:
        """Fold one update in."""
        torch._foreach_add_(list(self._sum.values()), [update[name] for name in self._sum], alpha=weight)
        self._weight += weight

    def result(self) -> Weights:
        """The mean over those who answered."""
        torch._foreach_div_(list(self._sum.values()), self._weight)
        return self._sum


class Median:
    """The median of each coordinate (Yin et al. 2018, https://arxiv.org/abs/1803.01498); public weights play no part."""

    def __init__(self, shapes: Shapes) -> None:
        self._names = list(shapes.of)
        self._updates: list[Weights] = []

    def add(self, update: Weights, weight: float) -> None:
        """Keep one update: a copy, because a grid may use the memory of a reply again."""
        self._updates.append({name: tensor.clone() for name, tensor in update.items()})

    def result(self) -> Weights:
        """Coordinate by coordinate; between two middle values, their mean."""
        return {name: _middle(self._stacked(name)) for name in self._names}

    def _stacked(self, name: str) -> Tensor:
        return torch.stack([update[name] for update in self._updates]).sort(0).values


class TrimmedMean(Median):
    """The mean of each coordinate without the `trim` share at either end (at least one value when trim is above zero)."""

    def __init__(self, shapes: Shapes, trim: float) -> None:
        super().__init__(shapes)
        self._trim = trim

    def result(self) -> Weights:
        """Coordinate by coordinate; never trims all values away."""
        count = len(self._updates)
        cut = min(max(1, int(self._trim * count)), (count - 1) // 2)
        return {name: self._stacked(name)[cut : count - cut].mean(0) for name in self._names}


def combiner(plan: StudyPlan, shapes: Shapes) -> Combiner:
    """The plan's rule, empty."""
    if plan.combine == "mean":
        return WeightedMean(shapes)
    return Median(shapes) if plan.combine == "median" else TrimmedMean(shapes, plan.trim)


def _middle(ordered: Tensor) -> Tensor:
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
