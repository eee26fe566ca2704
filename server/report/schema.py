"""What report.json holds, key by key; docs/report.md says the same in words.

Within version 1 a key keeps its name, type, unit and meaning; keys may be added. A figure that is not defined, such as
the AUROC of a hospital where nobody is ill, is null and never NaN.
"""

from __future__ import annotations

import base64
import hashlib
import math
import tomllib
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

VERSION: Literal["wardround-report/1"] = "wardround-report/1"


def _undefined_is_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_undefined_is_none)]
Size = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # a list is welcome too


class Part(BaseModel):
    """A frozen, strict piece of a report: no unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Study(Part):
    """Which study this is."""

    name: str
    title: str
    task: str
    digest: str  # SHA-256 of `plan`, in hex
    run: str
    rounds: Count  # planned
    plan: str  # the whole text, TOML


class Outcome(Part):
    """How it ended."""

    status: Literal["completed", "completed early", "stopped"]
    reason: str
    rounds_done: Count


class Figure(Part):
    """One metric of one model on one set of test patients, with its 95 % interval where there is one."""

    value: Number
    low: Number = None
    high: Number = None


Figures = dict[str, Figure]  # by metric


class SiteResults(Part):
    """The same models, judged on the test patients of one hospital."""

    test_patients: Count
    federated: Figures
    local: Figures
    pooled: Figures


class Results(Part):
    """Every model judged on the test patients of all hospitals, and hospital by hospital."""

    federated: Figures
    pooled: Figures
    local: dict[str, Figures]
    by_site: dict[str, SiteResults]


class SitePrivacy(Part):
    """What this study cost a patient of one hospital."""

    epsilon: Size  # add-or-remove
    epsilon_replace_one: Size
    delta: Size
    unit: Literal["patient"]
    planned: Size
    noise_multiplier: Size
    sampling_rate: Size
    clip_norm: Size
    epsilon_training: Size | None = None  # of the patients trained on
    epsilon_aside: Size | None = None  # of the patients set aside; None where no look is noised
    counts_noise_multiplier: Size | None = None  # of counted classes; None where nothing is counted
    looks_noise_multiplier: Size | None = None
    looks: Count = 0
    looks_planned: Count = 0
    steps: Count
    steps_planned: Count
    lifetime_charged: Size | None
    lifetime_limit: Size | None
    ledger_head: str


class RoundFacts(Part):
    """What happened in one round."""

    round: Count
    attempt: Count
    seconds: Size
    sites: Names  # whose update counted
    dropped: dict[str, str]
    lost: bool
    update_norm: Number
    metrics: dict[str, Number]
    validation: Number = None  # of the patients set aside; None where nobody looked
    not_validated: dict[str, str] = Field(default_factory=dict)
    epsilon: dict[str, Size]


class Validation(Part):
    """What was looked at on the patients that hospitals set aside, and what it decided."""

    metric: str
    share: Size
    looks: Count  # with a value
    best_round: Count | None
    best: Number
    keep: Literal["best", "last"]
    cap: Size | None = None  # with [privacy]: the most that one patient's mean loss counts
    deviation: Size | None = None  # with [privacy]: of the noise in one figure, for as many patients as the plan declares


class ClassCounts(Part):
    """How many training patients of each class there are, as the coordinator was told before the first round."""

    sites: Names  # that answered
    missing: dict[str, str]
    counts: Annotated[tuple[float, ...], Field(strict=False)]
    deviation: Size  # of the noise in each count; 0 without [privacy]
    shares: Annotated[tuple[Size, ...], Field(strict=False)]
    weights: Annotated[tuple[Size, ...], Field(strict=False)] | None


class SiteFacts(Part):
    """One hospital of the plan."""

    declared_patients: Count
    test_patients: Count | None


class Spread(Part):
    """One metric over several repetitions."""

    mean: Number
    sd: Number
    values: Annotated[tuple[Number, ...], Field(strict=False)]


class Seeds(Part):
    """The whole study repeated with other seeds."""

    values: Annotated[tuple[int, ...], Field(strict=False)]
    federated: dict[str, Spread]
    pooled: dict[str, Spread]
    local: dict[str, dict[str, Spread]]


class Sheet(Part):
    """Pictures that the released model makes, of nobody; only where making pictures is its work."""

    names: Names  # of each picture: what it is meant to show
    side: Annotated[int, Field(ge=1, le=512)]
    channels: Literal[1, 3]
    pixels: str  # base64: a byte for each value, (pictures, side, side, channels)

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        try:
            found = len(base64.b64decode(self.pixels, validate=True))
        except ValueError:
            raise ValueError("pixels: not base64") from None
        wanted = len(self.names) * self.side**2 * self.channels
        if not wanted or found != wanted:
            raise ValueError(f"pixels: {found} bytes for {len(self.names)} pictures, which want {wanted}")
        return self


class Seconds(Part):
    """How long it took, by the wall clock."""

    total: Size
    training: Size
    baselines: Size


class Report(Part):
    """A whole report. Refuses to be built where its parts contradict each other."""

    # populate_by_name, because `schema` is a method of every pydantic model
    model_config = ConfigDict(populate_by_name=True)

    version: Literal["wardround-report/1"] = Field(default=VERSION, alias="schema")
    study: Study
    outcome: Outcome
    headline: str  # the metric people ask for first
    results: Results
    privacy: dict[str, SitePrivacy]
    rounds: Annotated[tuple[RoundFacts, ...], Field(strict=False)]
    sites: dict[str, SiteFacts]
    seeds: Seeds | None
    validation: Validation | None = None
    class_counts: ClassCounts | None = None
    seconds: Seconds
    versions: dict[str, str]
    notes: Names
    sheet: Sheet | None = None

    @property
    def private(self) -> bool:
        """Whether the plan asks for differential privacy; the plan decides, also when nothing was spent yet."""
        return "privacy" in tomllib.loads(self.study.plan)

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        study, outcome = self.study, self.outcome
        if hashlib.sha256(study.plan.encode()).hexdigest() != study.digest:
            raise ValueError("study.digest is not the SHA-256 of study.plan")
        try:
            private = self.private
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"study.plan is not TOML: {error}") from None
        if self.privacy and not private:
            raise ValueError("privacy: costs are given, but the plan has no [privacy] section")
        if outcome.rounds_done > study.rounds:
            raise ValueError(f"outcome.rounds_done: {outcome.rounds_done} of {study.rounds} rounds")
        if outcome.status == "completed" and outcome.rounds_done < study.rounds:
            raise ValueError(f"outcome.status: completed after {outcome.rounds_done} of {study.rounds} rounds")
        if outcome.status == "completed early":
            if "patience" not in tomllib.loads(study.plan).get("validation", {}) or self.validation is None:
                raise ValueError("outcome.status: completed early, but the plan has no validation.patience")
            if outcome.rounds_done == study.rounds:
                raise ValueError(f"outcome.status: completed early after all {study.rounds} rounds")
        if outcome.status != "completed" and not outcome.reason:
            raise ValueError(f"outcome.reason: a study that {outcome.status} says why")
        return self
