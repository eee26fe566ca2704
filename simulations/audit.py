"""A privacy audit in one run: made-up patients join the private path by secret coins, and the auditor guesses who did.

Steinke, Nasr & Jagielski 2023, "Privacy Auditing with One (1) Training Run", https://arxiv.org/abs/2305.08846. Guesses that
are right too often show that a patient can lose more than the claimed epsilon; guesses that are not prove nothing.

What runs is the site's own `private_update`: its coins, its clipping, its noise. Only the network is chosen for the purpose,
a line without bias whose loss is its output, so that the gradient of a record is the record itself. The auditor is as strong
as the guarantee allows: it sees every round's update, knows every record, and chose the canaries. What it is not told is who
of them is in, and whom the site's coins drew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.client.dp import Coins, OsCoins
from wardround.client.training.supervised import private_update
from wardround.common.plan import LocalPlan, PrivacyPlan
from wardround.common.privacy import calibrate
from wardround.common.tasks import ArraySchema, Records, Task
from wardround.common.weights import trainable

Verdict = Literal["consistent", "violated"]

# the share of all canaries guessed to be in, and as many guessed to be out: fixed before any score is seen
_GUESSED = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.45)
_ORDINARY, _DIRECTIONS = 200, 16  # patients beside the canaries, and the directions that are theirs alone


@dataclass(frozen=True)
class Canaries:
    """Made-up patients, each with an own direction that no other patient's gradient touches.

    Attributes:
        count: how many; an own coin decides for each whether it is in at all.
        records: how many equal records each of them has.
        length: gradient of each record, in clip norms; the clipping has to hold the patient to 1.
    """

    count: int = 1000
    records: int = 1
    length: float = 1.0


@dataclass(frozen=True)
class AuditResult:
    """What one audit found.

    Attributes:
        claimed: the epsilon that was promised, at `delta` (add-or-remove).
        at_least: the true epsilon at `delta` is no smaller, at `confidence`.
        canaries: how many patients were guessed about.
    """

    claimed: float
    delta: float
    at_least: float
    canaries: int
    confidence: float

    @property
    def verdict(self) -> Verdict:
        """`violated` where the lower bound is beyond the claim; `consistent` does not mean proven."""
        return "violated" if self.at_least > self.claimed else "consistent"


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """An upper bound on the chance of `correct` or more right `guesses` against any (epsilon, delta)-private algorithm.

    Steinke et al. 2023, section 5 and appendix D. W is binomial with `guesses` tries and chance e^epsilon / (1 + e^epsilon):

        P[W >= correct]  +  2 canaries delta max_i P[correct - i <= W < correct] / i

    Raises:
        ValueError: not 0 <= correct <= guesses <= canaries, or a negative epsilon or delta.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right of {guesses} guesses about {canaries} canaries cannot be")
    if epsilon < 0 or delta < 0:
        raise ValueError("epsilon and delta are at least 0")
    chance = _binomial(guesses, epsilon)
    tail = math.fsum(chance[correct:])
    slack = 0.0
    if delta and correct:
        slack = float((np.cumsum(chance[correct - 1 :: -1]) / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * slack)


def _binomial(tries: int, epsilon: float) -> NDArray[np.float64]:
    # chances of 0 .. tries successes; in logarithms, since few of them are near 1 and most are far below any float
    right, wrong = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    successes = np.arange(tries + 1)
    factorial = np.array([math.lgamma(n + 1) for n in successes])
    logs = factorial[-1] - factorial - factorial[::-1] + successes * right + successes[::-1] * wrong
    chances: NDArray[np.float64] = np.exp(logs)
    return chances


def epsilon_at_least(member: NDArray[np.bool_], score: NDArray[np.float64], *, delta: float, confidence: float = 0.95) -> float:
    """A lower bound on epsilon, at `confidence`, from how well scores tell canaries that were in from those left out.

    The highest scores are guessed to be in, as many of the lowest to be out. Numbers of guesses come from a fixed list, and
    each has its share of the allowed error (Bonferroni), so the best of them may be taken.

    Args:
        member: (canaries,) bool, independent fair coins: who was in.
        score: (canaries,), higher for whoever seems to be in; computed without `member`.
        delta: of the claim that is audited.
        confidence: how often, at least, the bound holds.

    Raises:
        ValueError: shapes differ, a score is not a number, or there are too few canaries to guess about any.
    """
    if member.shape != score.shape or member.ndim != 1 or np.isnan(score).any():
        raise ValueError("every canary has one coin and one score that is a number")
    canaries = len(member)
    sides = sorted({round(share * canaries) for share in _GUESSED} - {0})
    if not sides:
        raise ValueError(f"{canaries} canaries are too few for an audit")
    order = np.argsort(score, kind="stable")
    error = (1 - confidence) / len(sides)
    best = 0.0
    for side in sides:
        correct = int(member[order[-side:]].sum() + (~member[order[:side]]).sum())
        best = max(best, _largest_refuted(canaries, 2 * side, correct, delta, error))
    return best


def _largest_refuted(canaries: int, guesses: int, correct: int, delta: float, error: float) -> float:
    # 0 where nothing is refuted; else from below, so that the answer itself is refuted
    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) <= error

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def audit(
    privacy: PrivacyPlan,
    *,
    rounds: int,
    canaries: Canaries = Canaries(),
    membership: np.random.Generator | None = None,
    coins_for: Callable[[int], Coins] = lambda round: OsCoins(),
    confidence: float = 0.95,
) -> AuditResult:
    """Train `rounds` noised steps on canaries and ordinary patients, and bound epsilon from below.

    Ordinary patients have random records in directions of their own. All they add to the sum is orthogonal to every canary,
    so the auditor, who may know them, has nothing to subtract. The score of a canary is how far the model moved along its
    direction, over all rounds.

    Args:
        privacy: the claim, and what the site does to keep it; without a noise multiplier of its own it is calibrated to
            `rounds` steps.
        rounds: how many updates the site sends, one local step each.
        canaries: the patients that are guessed about.
        membership: decides who is in; fresh from the operating system when left out. Independent of the site's coins.
        coins_for: the site's coins of a round; only tests hand in others than the operating system's.
        confidence: of the lower bound.
    """
    noise_multiplier = privacy.noise_multiplier
    if noise_multiplier is None:
        noise_multiplier = calibrate(privacy.epsilon, privacy.delta, privacy.sampling_rate, rounds)
    member = (membership or np.random.default_rng()).random(canaries.count) < 0.5
    records = _canary_records(canaries, member, privacy.clip_norm) + _ordinary_records(canaries, privacy.clip_norm)
    task = _task(canaries.count + _DIRECTIONS)
    model = task.model({}, seed=0)
    weights = trainable(model)
    for round in range(1, rounds + 1):
        update = private_update(
            task, model, weights, records,
            local=LocalPlan(steps=1, learning_rate=1.0), privacy=privacy, noise_multiplier=noise_multiplier,
            declared_patients=_ORDINARY + canaries.count, coins=coins_for(round),
        )  # fmt: skip
        weights = {name: weights[name] + update[name] for name in weights}
    (line,) = weights.values()  # from zero, against the gradients
    score = -line[0, : canaries.count].double().numpy()
    at_least = epsilon_at_least(member, score, delta=privacy.delta, confidence=confidence)
    return AuditResult(privacy.epsilon, privacy.delta, at_least, canaries.count, confidence)


class _Line(nn.Module):
    """`values` (records, width) -> (records, 1), a sum weighted by what learns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.line = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.line.weight)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.line(values)
        return found


def _task(width: int) -> Task:
    return Task(
        name="audit",
        title="Whose gradient is the record itself",
        schema=ArraySchema({"values": (width,)}, classes=2, low=-math.inf, high=math.inf),
        build=lambda options: _Line(width),
        loss=lambda logits, label: logits.squeeze(1),
    )


def _canary_records(canaries: Canaries, member: NDArray[np.bool_], clip_norm: float) -> Records:
    chosen = torch.from_numpy(np.flatnonzero(member)).repeat_interleave(canaries.records)
    values = torch.zeros(len(chosen), canaries.count + _DIRECTIONS)
    values[torch.arange(len(chosen)), chosen] = canaries.length * clip_norm
    patient = torch.arange(int(member.sum())).repeat_interleave(canaries.records)
    return Records({"values": values}, torch.zeros(len(chosen), dtype=torch.int64), patient)


def _ordinary_records(canaries: Canaries, clip_norm: float) -> Records:
    values = torch.zeros(_ORDINARY, canaries.count + _DIRECTIONS)
    values[:, canaries.count :] = clip_norm * torch.randn(_ORDINARY, _DIRECTIONS, generator=torch.Generator().manual_seed(0))
    return Records({"values": values}, torch.zeros(_ORDINARY, dtype=torch.int64), torch.arange(_ORDINARY))
