"""What a study costs a patient: epsilon of a history of noised steps, and the noise for a wanted epsilon.

Two accountants, for two questions:

* `spent` and `calibrate` use privacy-loss distributions (PLD; Koskela et al. 2020, https://arxiv.org/abs/1906.03049,
  as built in Google's dp-accounting). Tight, and right for a plan whose parameters were all fixed in advance.
* `filtered` uses Renyi accounting (Mironov, Talwar & Zhang 2019, https://arxiv.org/abs/1908.10530). Looser, but it may
  be used as a *filter*: later studies may be chosen after seeing the models of earlier ones (Feldman & Zrnic 2021,
  https://arxiv.org/abs/2008.11193). The ledger's gate asks this one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from wardround.common.errors import ConfigError

Adjacency = Literal["add-or-remove", "replace-one"]

# whole orders only: the series for fractional ones does not always converge, and a missing order only loosens the bound
_ORDERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 256)
_LEAST_NOISE, _MOST_NOISE = 1e-2, 1e9  # less hides nothing, more is counted as this much; beyond, the accountants overflow
_HOPELESS = 1000.0  # epsilon; beyond it the exact number means nothing, and privacy-loss distributions take minutes


@dataclass(frozen=True)
class NoisedSteps:
    """`steps` sums over Poisson-sampled patients, each with Gaussian noise.

    Attributes:
        sampling_rate: probability that a patient takes part in a step, in (0, 1].
        noise_multiplier: standard deviation of the noise over the clip norm (sigma).
        steps: how many such sums were or may be released.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int


@dataclass(frozen=True)
class Cost:
    """What one study releases about a patient of a site, by which side of its split the patient is on.

    Whether a patient is set aside follows from that patient alone, and nobody is on both sides. So a study costs a patient
    one of the two and never their sum (parallel composition; McSherry 2009, https://doi.org/10.1145/1559845.1559850).

    Attributes:
        training: of the patients trained on.
        aside: of the patients set aside for validation; empty where no look is noised.
    """

    training: tuple[NoisedSteps, ...]
    aside: tuple[NoisedSteps, ...] = ()

    def epsilon(self, delta: float, adjacency: Adjacency = "add-or-remove") -> float:
        """What the study costs the patient who pays more, as `spent` counts."""
        found = max(spent(side, delta, adjacency) for side in (self.training, self.aside))
        if adjacency == "replace-one" and _merged(self.aside):  # one goes on this side, another comes on that one
            found = max(found, spent((*self.training, *self.aside), delta))
        return found


def spent(history: Iterable[NoisedSteps], delta: float, adjacency: Adjacency = "add-or-remove") -> float:
    """Epsilon of `history` at `delta`, by composing privacy-loss distributions (an upper bound).

    `add-or-remove` compares a world with the patient to a world without; `replace-one` swaps the patient for another
    one and is about twice as large. What would cost more than a thousand is infinite.

    >>> round(spent([NoisedSteps(0.25, 3.6533, 100)], 1e-5), 2)
    3.0
    >>> round(spent([NoisedSteps(0.25, 3.6533, 100)], 1e-5, "replace-one"), 1)
    6.3
    >>> spent([], 1e-5)
    0.0
    """
    return _spent(_merged(history), delta, adjacency)


def filtered(history: Iterable[NoisedSteps | Cost], delta: float) -> float:
    """Epsilon of `history` at `delta`, by a Renyi filter: holds also when later steps were chosen adaptively.

    A patient may be on one side in one study and on the other in the next, so of each `Cost` the dearer side counts, at each
    Renyi order.

    >>> round(filtered([NoisedSteps(0.25, 3.6533, 100)], 1e-5), 2)
    3.74
    """
    for_all: list[NoisedSteps] = []
    split: Counter[tuple[tuple[NoisedSteps, ...], tuple[NoisedSteps, ...]]] = Counter()
    for part in history:
        if isinstance(part, NoisedSteps):
            for_all.append(part)
        elif aside := _merged(part.aside):
            split[_merged(part.training), aside] += 1
        else:
            for_all += part.training
    return _filtered(_merged(for_all), tuple(sorted(split.items(), key=repr)), delta)


@lru_cache(maxsize=256)
def calibrate(epsilon: float, delta: float, sampling_rate: float, steps: int, beside: tuple[NoisedSteps, ...] = ()) -> float:
    """The smallest noise multiplier with which `steps` steps cost at most `epsilon` at `delta` (add-or-remove).

    `beside` is what else the same patients pay, at noise of its own.

    >>> round(calibrate(3.0, 1e-5, 0.25, 100), 2)
    3.65

    Raises:
        ConfigError: no noise is enough; the accountant cannot see chances as small as this delta or epsilon.
    """
    low, high = 0.0, 1.0
    while not _affordable((NoisedSteps(sampling_rate, high, steps), *beside), epsilon, delta):
        if high > _MOST_NOISE:
            raise ConfigError(f"no noise keeps epsilon {epsilon:g} at delta {delta:g} over {steps} steps; allow more of either")
        low, high = high, high * 2
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if _affordable((NoisedSteps(sampling_rate, middle, steps), *beside), epsilon, delta):
            high = middle
        else:
            low = middle
    return high


def _affordable(history: tuple[NoisedSteps, ...], epsilon: float, delta: float) -> bool:
    # the Renyi bound costs nothing and settles what is hopeless, where privacy-loss distributions are large and slow
    if filtered(history, delta) > 3 * epsilon + 3:
        return False
    return spent(history, delta) <= epsilon


def _merged(history: Iterable[NoisedSteps]) -> tuple[NoisedSteps, ...]:
    # equal steps compose as one self-composition; one by one, 64 of them take seconds
    counted: Counter[tuple[float, float]] = Counter()
    for part in history:
        counted[part.sampling_rate, min(part.noise_multiplier, _MOST_NOISE)] += part.steps
    return tuple(NoisedSteps(q, sigma, steps) for (q, sigma), steps in sorted(counted.items()) if steps)


@lru_cache(maxsize=4096)
def _spent(history: tuple[NoisedSteps, ...], delta: float, adjacency: Adjacency) -> float:
    if not history:
        return 0.0
    if not _filtered(history, (), delta) <= _HOPELESS:
        return math.inf
    from dp_accounting import NeighboringRelation, pld

    relation = {
        "add-or-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace-one": NeighboringRelation.REPLACE_ONE,
    }[adjacency]
    accountant = pld.PLDAccountant(relation, value_discretization_interval=1e-3)
    for part in history:
        accountant.compose(_event(part))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=4096)
def _filtered(
    history: tuple[NoisedSteps, ...],
    split: tuple[tuple[tuple[tuple[NoisedSteps, ...], tuple[NoisedSteps, ...]], int], ...],
    delta: float,
) -> float:
    if not history and not split:
        return 0.0
    everything = [*history, *(part for sides, _ in split for side in sides for part in side)]
    if not all(part.noise_multiplier >= _LEAST_NOISE for part in everything):
        return math.inf
    from dp_accounting import rdp

    curve = _curve(history)
    for (training, aside), times in split:
        curve = curve + times * np.maximum(_curve(training), _curve(aside))
    # which order decides may depend on how the studies went, so each order has its share of delta (a union bound)
    return float(rdp.compute_epsilon(_ORDERS, curve, delta / len(_ORDERS))[0])


@lru_cache(maxsize=1024)
def _curve(history: tuple[NoisedSteps, ...]) -> Any:
    """Renyi divergence at each of `_ORDERS`."""
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(orders=_ORDERS)
    for part in history:
        accountant.compose(_event(part))
    return accountant._rdp  # the accountant tells its curve nobody else


def _event(part: NoisedSteps) -> Any:
    from dp_accounting import dp_event

    gaussian = dp_event.GaussianDpEvent(part.noise_multiplier)
    sampled = gaussian if part.sampling_rate == 1 else dp_event.PoissonSampledDpEvent(part.sampling_rate, gaussian)
    return dp_event.SelfComposedDpEvent(sampled, part.steps)
