"""The study plan: what every site and the coordinator agree on, before a record is opened.

A plan is one TOML text, identified by the SHA-256 of its bytes, so what is approved is what is run. It names registered
things only and never code. Everything the privacy guarantee rests on (rates, sizes, norms) is a public constant in it.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, StringConstraints, Tag, field_validator, model_validator

from wardround.common.config import Config, read_text
from wardround.common.errors import ConfigError
from wardround.common.metrics import METRICS
from wardround.common.privacy import Cost, NoisedSteps, calibrate, filtered, spent

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$")]
Probability = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
_Weight = Annotated[float, Field(ge=1e-3, le=1e3)]
_Share = Annotated[float, Field(ge=1e-6, le=1)]
Line = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\p{Cc}\p{Cf}]*$")]  # it is printed on terminals

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MOST_NOISED_STEPS = 1_000_000  # their cost takes seconds to work out; more is a mistake or an attack


class LocalPlan(Config):
    """What a site does with the model in one round.

    With one step a site sends its (noised) mean gradient: FedSGD. With more it sends how far its model moved: FedAvg.
    """

    steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    learning_rate: Positive = 1.0
    batch_size: Count | Literal["all"] = "all"  # without privacy; with it, privacy.sampling_rate draws the batch
    sampler: Literal["uniform", "balanced"] = "uniform"
    proximal: Annotated[float, Field(ge=0)] = 0.0  # mu of FedProx: pulls the local model towards the round's
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    l1: Annotated[float, Field(ge=0)] = 0.0  # pulls every number of the model towards 0 by this much, whatever its size
    views: Annotated[int, Field(ge=1, le=64)] | None = None  # randomly changed copies that stand for each record of a step


_Weights = Annotated[tuple[_Weight, ...], Field(strict=False, max_length=1000), Tag("numbers")]
_Shares = Annotated[tuple[_Share, ...], Field(strict=False, max_length=1000), Tag("numbers")]
_Counted = Annotated[Literal["counted"], Tag("counted")]


def _kind(given: object) -> str:
    return "counted" if isinstance(given, str) else "numbers"


class LossPlan(Config):
    """How much an error counts, where classes are rare.

    Every number is a public constant, or "counted": each site is asked once, before the first round, how its training
    patients fall into classes. With [privacy] what it answers is noised and charged.
    """

    class_weights: Annotated[_Weights | _Counted, Discriminator(_kind)] | None = None  # of each class
    most_weight: Annotated[float, Field(ge=1, le=1e3)] = 10.0  # of counted weights: no class weighs more
    focal: Annotated[float, Field(ge=0, le=10)] = 0.0  # gamma: how much less an easy record counts
    class_shares: Annotated[_Shares | _Counted, Discriminator(_kind)] | None = None  # logit adjustment

    @field_validator("class_shares")
    @classmethod
    def _whole(cls, shares: tuple[float, ...] | str | None) -> tuple[float, ...] | str | None:
        if isinstance(shares, tuple) and abs(math.fsum(shares) - 1) > 1e-3:
            raise ValueError(f"shares of all classes add up to 1, these to {math.fsum(shares):g}")
        return shares

    @property
    def counts(self) -> bool:
        """Whether sites are asked how their patients fall into classes."""
        return "counted" in (self.class_weights, self.class_shares)


class StepPlan(Config):
    """What the coordinator does with the combined update: the server optimisers of Reddi et al. 2021."""

    rule: Literal["sgd", "momentum", "adam", "yogi"] = "sgd"
    learning_rate: Positive = 1.0
    decay_to: Probability = 1.0  # the learning rate falls in a straight line to this share of itself by the last round
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    second_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    epsilon: Positive = 1e-3  # the adaptivity floor of adam and yogi; no relation to privacy
    average_last: Annotated[float, Field(ge=0, lt=1)] = 0.0  # the released model is the mean over this last share of rounds


class ValidationPlan(Config):
    """Looks at patients of every site who are never trained on: which model is released, and when a study is over early.

    Without [privacy] a look is the exact sums of a metric. With it, a look is one noised sum of losses, charged to the
    patients set aside, and nothing but the mean loss is seen.
    """

    share: Annotated[float, Field(gt=0, le=0.5)] = 0.2  # chance of each training patient, by its own hash, to be set aside
    every: Annotated[int, Field(ge=1, le=100_000)] = 5  # rounds between two looks; the last round is looked at in any case
    metric: str | None = None  # a registered one; left out: the task's headline
    patience: Count | None = None  # so many looks in a row without a new best end the study; left out: never
    keep: Literal["best", "last"] = "best"  # the model to release
    cap: Annotated[float, Field(ge=1e-3, le=1e3)] = 2.0  # with [privacy]: the most that one patient's mean loss counts

    @field_validator("metric")
    @classmethod
    def _registered(cls, name: str | None) -> str | None:
        if name is not None and name not in METRICS:
            raise ValueError(f"there is no metric {name!r}; known: {', '.join(METRICS)}")
        return name


class PrivacyPlan(Config):
    """The guarantee, per patient and hospital; every number in it is public.

    Each step draws patients by independent coins (`sampling_rate`), takes at most `records_per_patient` records of each,
    clips each patient's mean gradient to `clip_norm`, and adds Gaussian noise at the site.
    """

    unit: Literal["patient"] = "patient"
    epsilon: Annotated[float, Field(gt=0, le=100)]
    delta: Annotated[float, Field(ge=1e-12, le=1e-3)] = 1e-5
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0  # beyond, float32 gradients cannot be told apart
    sampling_rate: Probability = 0.25
    records_per_patient: Annotated[int, Field(ge=1, le=1024)] = 8
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 1  # how often a round may be trained anew; counted in epsilon
    noise_multiplier: Annotated[float, Field(ge=0.1, le=1e6)] | None = None  # normally left out: calibrated to the study
    counts_noise: Annotated[float, Field(ge=0.5, le=1e6)] = 10.0  # multiplier for counted classes; one patient is 1
    noise: Literal["local"] = "local"  # each site adds the whole noise itself


class StudyPlan(Config):
    """A study: one task, its sites, and how a round goes."""

    name: Name
    task: Name
    title: Line = ""
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    min_sites: Count = 2
    min_approvals: Annotated[int, Field(ge=0)] = 0  # so many sites must have signed their yes before a round is ordered
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # of the first model and of batches without privacy; never of noise
    deadline_seconds: Annotated[float, Field(gt=0, le=7 * 24 * 3600)] = 3600.0
    lost_rounds: Annotated[int, Field(ge=1, le=1000)] = 3  # so many rounds in a row without enough sites end the study
    sites: Annotated[dict[Name, Count], Field(min_length=1, max_length=100_000)]  # site = declared patients
    weighting: Literal["declared", "equal"] = "declared"
    combine: Literal["mean", "median", "trimmed-mean"] = "mean"
    trim: Annotated[float, Field(gt=0, lt=0.5)] = 0.1  # of trimmed-mean: the share cut off at each end
    secure_sum: bool = False
    update_numbers: Literal["float32", "float16"] = "float32"  # as what an update travels; rounded after the noise
    model: dict[str, bool | int | float | str | Annotated[list[int], Field(max_length=64)]] = Field(default_factory=dict)
    local: LocalPlan = LocalPlan()
    loss: LossPlan = LossPlan()
    step: StepPlan = StepPlan()
    validation: ValidationPlan | None = None
    privacy: PrivacyPlan | None = None

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        problems = [*self._contradictions(), *self._unkeepable_promises()]
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    def _contradictions(self) -> list[str]:
        problems = []
        if self.min_sites > len(self.sites):
            problems.append(f"min_sites: {self.min_sites} sites are wanted in a round, but the plan names {len(self.sites)}")
        if self.min_approvals > len(self.sites):
            problems.append(f"min_approvals: {self.min_approvals} sites are to approve, but the plan names {len(self.sites)}")
        if self.combine != "mean" and self.secure_sum:
            problems.append(f"combine: {self.combine!r} needs every site's own update, which secure_sum = true hides")
        elif self.secure_sum:
            problems.append("secure_sum: this release of wardround has no secure sum yet, so it cannot be promised")
        if self.combine != "mean" and self.min_sites < 3:
            problems.append(f"combine: {self.combine!r} of fewer than 3 updates protects nobody; min_sites must be 3 or more")
        problems += [f"{key}: does nothing {when}; leave it out" for key, when in self._idle_keys()]
        problems += self._about_start()
        if self.local.proximal and self.local.steps == 1:
            problems.append("local.proximal: does nothing when local.steps = 1; leave it out or take more steps")
        for site, patients in self.sites.items():
            if patients != two_digits(patients):
                problems.append(
                    f"sites.{site}: {patients} tells more than it must; declare two significant digits "
                    f"(such as {two_digits(patients)})"
                )
        return problems

    def _idle_keys(self) -> list[tuple[str, str]]:
        """Keys that somebody wrote down and nobody would read."""
        idle = []
        if self.combine != "trimmed-mean" and "trim" in self.model_fields_set:
            idle.append(("trim", f"with combine = {self.combine!r}"))
        if self.combine != "mean" and "weighting" in self.model_fields_set:
            idle.append(("weighting", f"with combine = {self.combine!r}, where every site counts alike"))
        read = {"sgd": set(), "momentum": {"momentum"}}.get(self.step.rule, {"momentum", "second_momentum", "epsilon"})
        unread = {"momentum", "second_momentum", "epsilon"} - read
        idle += [(f"step.{key}", f"with rule = {self.step.rule!r}") for key in sorted(unread & self.step.model_fields_set)]
        if self.loss.class_weights != "counted" and "most_weight" in self.loss.model_fields_set:
            idle.append(("loss.most_weight", "unless loss.class_weights = 'counted'"))
        if self.privacy is not None and not self.loss.counts and "counts_noise" in self.privacy.model_fields_set:
            idle.append(("privacy.counts_noise", "unless a key of [loss] is 'counted'"))
        if self.privacy is None and self.validation is not None and "cap" in self.validation.model_fields_set:
            idle.append(("validation.cap", "without [privacy], where no loss is clipped"))
        return idle

    def _about_start(self) -> list[str]:
        """Of model.weights, the public ones that training starts from, and model.frozen, those of them that do not learn."""
        given = {key: self.model[key] for key in ("weights", "frozen") if key in self.model}
        problems = [
            f"model.{key}: {value!r} is no digest; 'sha256:' and 64 hex digits are wanted"
            for key, value in given.items()
            if not (isinstance(value, str) and _DIGEST.fullmatch(value))
        ]
        partly = self.model.get("train", "all") != "all"
        if "frozen" in given and not ("weights" in given and partly):
            problems.append(
                "model.frozen: does nothing without model.weights and a train of 'head' or 'last-block'; leave it out"
            )
        if "weights" in given and partly and "frozen" not in given:
            problems.append(
                f"model.frozen: is missing; with train = {self.model['train']!r} hospitals take what does not learn by its "
                "digest. Without model.weights, wardround check --weights FILE says both"
            )
        return problems

    def _unkeepable_promises(self) -> list[str]:
        private = self.privacy
        if private is None:
            return []
        problems = []
        if self.validation is not None and self.validation.metric is not None:
            problems.append(
                "validation.metric: with [privacy] a look sees the mean loss and nothing else; leave the metric out"
            )
        if self.local.sampler != "uniform":
            problems.append(
                f"local.sampler: {self.local.sampler!r} draws some patients more often than privacy.sampling_rate says, "
                "so the epsilon would not hold; with [privacy] it must be 'uniform'"
            )
        if self.local.batch_size != "all":
            problems.append("local.batch_size: with [privacy] a batch is drawn by privacy.sampling_rate; leave batch_size out")
        largest = max(self.sites.values())
        if private.delta * 10 * largest > 1:
            problems.append(
                f"privacy.delta: {private.delta:g} is too likely a failure for a site of {largest} patients; "
                f"at most 1/(10 x patients) = {1 / (10 * largest):.1g}"
            )
        steps = self.noised_steps(1.0).steps
        if steps > _MOST_NOISED_STEPS:
            problems.append(
                f"privacy: {self.rounds} rounds x {private.max_attempts} attempts x {self.local.steps} local steps are {steps} "
                f"noised steps; at most {_MOST_NOISED_STEPS} can be accounted for"
            )
        elif (counts := spent(self._counting(), private.delta)) >= private.epsilon:
            problems.append(
                f"privacy.counts_noise: counting classes at noise {private.counts_noise:g} costs epsilon {counts:.2f}, and the "
                f"whole study has {private.epsilon:g}; more noise is needed"
            )
        elif private.noise_multiplier is not None:
            whole = [self.noised_steps(private.noise_multiplier), *self._counting()]
            cost = filtered(whole, private.delta)  # quick, and enough to see what is hopeless
            if cost <= 3 * private.epsilon + 3:
                cost = spent(whole, private.delta)
            if cost > private.epsilon:
                problems.append(
                    f"privacy.noise_multiplier: {self.rounds} rounds x {private.max_attempts} attempts at noise "
                    f"{private.noise_multiplier:g} cost epsilon {cost:.2f}, beyond the budget of {private.epsilon:g}; "
                    "leave noise_multiplier out to have it calibrated"
                )
        return problems

    def noised_steps(self, noise_multiplier: float) -> NoisedSteps:
        """All noised sums a site may ever release under this plan, spare attempts included.

        Raises:
            ConfigError: the plan has no [privacy].
        """
        private = self.private()
        steps = self.rounds * private.max_attempts * self.local.steps
        return NoisedSteps(private.sampling_rate, noise_multiplier, steps)

    def cost(self) -> Cost:
        """All that a site may ever release of a patient under this plan: of one trained on, and of one set aside.

        Raises:
            ConfigError: the plan has no [privacy].
        """
        return Cost((self.noised_steps(self.noise_multiplier()), *self._counting()), self._looking())

    def counts_query(self) -> NoisedSteps | None:
        """The one noised count of classes; None where nothing is counted or nothing is noised."""
        return next(iter(self._counting()), None)

    def looks_query(self) -> NoisedSteps | None:
        """All noised looks at patients set aside, calibrated to the plan's epsilon; None where no look is noised."""
        return next(iter(self._looking()), None)

    def _counting(self) -> tuple[NoisedSteps, ...]:
        if self.privacy is None or not self.loss.counts:
            return ()
        return (NoisedSteps(1.0, self.privacy.counts_noise, 1),)

    def _looking(self) -> tuple[NoisedSteps, ...]:
        if self.privacy is None or self.validation is None:
            return ()
        return (NoisedSteps(1.0, calibrate(self.privacy.epsilon, self.privacy.delta, 1.0, self.looks), self.looks),)

    @property
    def looks(self) -> int:
        """How many looks at patients set aside are planned."""
        return 0 if self.validation is None else -(-self.rounds // self.validation.every)

    def noise_multiplier(self) -> float:
        """Sigma: the plan's own, or calibrated once to the whole study, counted classes included."""
        private = self.private()
        if private.noise_multiplier is not None:
            return private.noise_multiplier
        steps = self.noised_steps(1.0).steps
        return calibrate(private.epsilon, private.delta, private.sampling_rate, steps, self._counting())

    def looks_after(self, round: int) -> bool:
        """Whether the validation patients are looked at after `round`, counted from 1."""
        return self.validation is not None and (round % self.validation.every == 0 or round == self.rounds)

    def private(self) -> PrivacyPlan:
        """The [privacy] section; raises `ConfigError` where there is none."""
        if self.privacy is None:
            raise ConfigError(f"study {self.name} has no [privacy] section")
        return self.privacy

    def weights(self) -> dict[str, float]:
        """The public weight of each site; they add up to 1."""
        raw = {site: float(patients) if self.weighting == "declared" else 1.0 for site, patients in self.sites.items()}
        total = math.fsum(raw.values())
        return {site: value / total for site, value in raw.items()}


@dataclass(frozen=True)
class SignedText:
    """A plan together with the exact text it was read from."""

    plan: StudyPlan
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text, in hex: the study's identity."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a study file; raises `ConfigError` with every problem in it."""
        text = read_text(path)
        return cls(StudyPlan.parse(text, source=str(path)), text)

    @classmethod
    def received(cls, text: object) -> Self:
        """The plan as it came over the wire; raises `ConfigError` when it is none."""
        if not isinstance(text, str) or not text:
            raise ConfigError("no study plan came with the run (run config key 'plan')")
        return cls(StudyPlan.parse(text, source="the study plan"), text)


def two_digits(count: int) -> int:
    """`count` rounded to two significant digits.

    >>> [two_digits(n) for n in (7, 82, 196, 1234)]
    [7, 82, 200, 1200]
    """
    digits = max(0, len(str(count)) - 2)
    return round(count, -digits)
