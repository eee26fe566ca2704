"""A metric: one number about predictions, its name, and how people read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from wardround.common.metrics.scores import Floats, Judged


@dataclass(frozen=True)
class Metric:
    """One number about predictions; NaN where it is undefined.

    Attributes:
        name: as plans write it.
        label: as people write it.
        meaning: what it says, in one clause.
        better: which direction is good.
        kind: the predictions it is defined on.
        over: predictions and weights (draws, records) -> (draws,). A weight says how often a record counts, so a bootstrap
            is one call.
        guess: what guessing reaches, where that does not depend on the records.
    """

    name: str
    label: str
    meaning: str
    better: Literal["higher", "lower"]
    kind: type[Any]
    over: Callable[[Any, Floats], Floats] = field(repr=False)
    guess: float | None = None

    def of(self, scores: Judged) -> float:
        """The figure; NaN where it is undefined.

        Raises:
            TypeError: predictions of another kind.
        """
        return float(self.weighted(scores, np.ones((1, len(scores))))[0])

    __call__ = of

    def weighted(self, scores: Judged, weight: Floats) -> Floats:
        """The figure for each row of `weight`, (draws, records) -> (draws,); raises as `of`."""
        if not isinstance(scores, self.kind):
            raise TypeError(f"{self.name} is a figure of {self.kind.__name__}, not of {type(scores).__name__}")
        if not len(scores) or not scores.sound:
            return np.full(len(weight), np.nan)
        return self.over(scores, weight)
