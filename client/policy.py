"""What a hospital allows. The file lives at the site and outranks every plan: the coordinator can only ask for less.

Deny by default: a task that is not named, or a study without privacy, is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints, field_validator

from wardround.common.config import Config
from wardround.common.errors import PlanRefused
from wardround.common.plan import Count, Name, Positive, StudyPlan, two_digits


class SitePolicy(Config):
    """The [allow] section of a site file: the limits no plan can loosen."""

    tasks: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    epsilon_per_study: Positive | None = None  # left out: no private study is admitted
    epsilon_lifetime: Positive | None = None  # over all studies on one cohort of patients
    delta: Annotated[float, Field(gt=0, le=1e-3)] = 1e-5
    without_privacy: bool = False
    min_sites: Count = 2
    min_patients: Count = 20  # as declared in the plan: the real number must not decide anything that others see
    rounds: Count = 1000
    min_evaluated: Count = 10  # patients that a look must sum up, where a plan has [validation]; fewer say nothing
    parameters: Count = 100_000_000  # the largest model; one is built here as soon as a plan is admitted

    def admit(self, plan: StudyPlan, site: str, declared_patients: int | None) -> None:
        """Return if this hospital takes part in `plan`.

        Raises:
            PlanRefused: with every reason at once.
        """
        reasons = [*self._about_the_study(plan, site, declared_patients), *self._about_privacy(plan)]
        if reasons:
            raise PlanRefused(f"{site} does not take part: " + "; ".join(reasons))

    def _about_the_study(self, plan: StudyPlan, site: str, declared_patients: int | None) -> list[str]:
        reasons = []
        if plan.task not in self.tasks:
            reasons.append(f"task {plan.task} is not allowed here")
        if site not in plan.sites:
            reasons.append("the plan does not name this site")
        elif declared_patients is not None and plan.sites[site] != declared_patients:
            reasons.append(f"the plan counts {plan.sites[site]} patients here, this site declares {declared_patients}")
        if plan.min_sites < self.min_sites:
            reasons.append(f"a round of {plan.min_sites} sites is smaller than the {self.min_sites} this site wants")
        if plan.sites.get(site, self.min_patients) < self.min_patients:
            reasons.append(f"{plan.sites[site]} patients are fewer than the {self.min_patients} this site wants")
        if plan.rounds > self.rounds:
            reasons.append(f"{plan.rounds} rounds are more than the {self.rounds} allowed")
        return reasons

    def _about_privacy(self, plan: StudyPlan) -> list[str]:
        private = plan.privacy
        if private is None:
            return [] if self.without_privacy else ["the plan has no [privacy], and this site wants it"]
        if self.epsilon_per_study is None or self.epsilon_lifetime is None:
            return ["this site has set no privacy budget"]
        reasons = []
        if private.epsilon > self.epsilon_per_study:
            reasons.append(f"epsilon {private.epsilon:g} is more than the {self.epsilon_per_study:g} allowed for a study")
        if private.delta > self.delta:
            reasons.append(f"delta {private.delta:g} is more than the {self.delta:g} allowed")
        return reasons


class DataSource(Config):
    """Where the records of one task are, and whose they are."""

    loader: Name
    path: Annotated[Path, Field(strict=False)]
    cohort: Name = "patients"  # data sets that share patients share a cohort, and so a budget
    declared_patients: Count | None = None  # the public size; plans must agree with it
    patient_column: Annotated[str, StringConstraints(min_length=1)] | None = None  # left out: one record a patient
    header: bool = True  # of a table: the first line names the columns
    labels: Annotated[Path | None, Field(strict=False)] = None  # of files without labels: the table that has them
    file_column: str = "file"  # of `labels`: which file a line is about
    label_column: str = "label"  # of `labels`
    unreadable: Annotated[int, Field(ge=0)] = 0  # so many unreadable files are passed over; one more is a refusal
    allow_identifiers: Annotated[tuple[str, ...], Field(strict=False)] = ()  # DICOM keywords that may stay in the headers
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of patients never trained on
    holdout_seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("declared_patients")
    @classmethod
    def _coarse(cls, count: int | None) -> int | None:
        if count is not None and count != two_digits(count):
            raise ValueError(f"{count} tells more than it must; declare two significant digits (such as {two_digits(count)})")
        return count

    def at(self, home: Path) -> Self:
        """The same source, with relative paths taken from `home`."""
        labels = None if self.labels is None else home / self.labels
        return self.model_copy(update={"path": home / self.path, "labels": labels})


class Compute(Config):
    """The [compute] section: what training may use."""

    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"


class SiteConfig(Config):
    """One hospital's file. It stays at the hospital; a refusal names the limit that a plan breaks, nothing else of it."""

    site: Name
    state: Annotated[Path, Field(strict=False)] = Path("state")  # ledger and log
    allow: SitePolicy = SitePolicy()
    data: dict[Name, DataSource] = Field(default_factory=dict)
    compute: Compute = Compute()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a site file; relative paths in it start at its own folder."""
        config = super().load(path)
        home = path.resolve().parent
        data = {task: source.at(home) for task, source in config.data.items()}
        return config.model_copy(update={"state": home / config.state, "data": data})
