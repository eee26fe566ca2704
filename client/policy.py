"""What a hospital allows. The file lives at the site and outranks every plan: the coordinator can only ask for less.

Deny by default: a task that is not named, or a study without privacy, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints, field_validator

from wardround.common.config import Config
from wardround.common.errors import PlanRefused
from wardround.common.plan import Count, Name, Positive, StudyPlan, two_digits

_HOURS = r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$"


@dataclass(frozen=True)
class Rule:
    """One rule of a site, in words, and how a plan breaks it; "" where it keeps it."""

    wants: str
    refusal: str


class SitePolicy(Config):
    """The [allow] section of a site file: the limits no plan can loosen."""

    tasks: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    studies: Annotated[tuple[Name, ...], Field(strict=False)] = ()  # run without a signed approval, whatever their text says
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
        reasons = [rule.refusal for rule in self.rules(plan, site, declared_patients) if rule.refusal]
        if reasons:
            raise PlanRefused(f"{site} does not take part: " + "; ".join(reasons))

    def rules(self, plan: StudyPlan, site: str, declared_patients: int | None) -> list[Rule]:
        """Every rule and whether `plan` keeps it."""
        return [*self._about_the_study(plan, site, declared_patients), *self._about_privacy(plan)]

    def _about_the_study(self, plan: StudyPlan, site: str, declared_patients: int | None) -> Iterator[Rule]:
        patients = plan.sites.get(site)
        yield Rule(
            "the task is one of " + (", ".join(self.tasks) or "none"),
            "" if plan.task in self.tasks else f"task {plan.task} is not allowed here",
        )
        yield Rule("the plan names this site", "" if patients is not None else "the plan does not name this site")
        if patients is not None and declared_patients is not None:
            differs = f"the plan counts {patients} patients here, this site declares {declared_patients}"
            yield Rule(f"it counts {declared_patients} patients here", differs if patients != declared_patients else "")
        yield Rule(
            f"a round has at least {self.min_sites} sites",
            f"a round of {plan.min_sites} sites is smaller than the {self.min_sites} this site wants"
            if plan.min_sites < self.min_sites
            else "",
        )
        yield Rule(
            f"it counts at least {self.min_patients} patients here",
            f"{patients} patients are fewer than the {self.min_patients} this site wants"
            if patients is not None and patients < self.min_patients
            else "",
        )
        yield Rule(
            f"it has at most {self.rounds} rounds",
            f"{plan.rounds} rounds are more than the {self.rounds} allowed" if plan.rounds > self.rounds else "",
        )

    def _about_privacy(self, plan: StudyPlan) -> Iterator[Rule]:
        private = plan.privacy
        if private is None:
            refusal = "" if self.without_privacy else "the plan has no [privacy], and this site wants it"
            yield Rule("a study without privacy is allowed" if self.without_privacy else "the plan has [privacy]", refusal)
            return
        if self.epsilon_per_study is None or self.epsilon_lifetime is None:
            yield Rule("this site has set a privacy budget", "this site has set no privacy budget")
            return
        yield Rule(
            f"epsilon is at most {self.epsilon_per_study:g}",
            f"epsilon {private.epsilon:g} is more than the {self.epsilon_per_study:g} allowed for a study"
            if private.epsilon > self.epsilon_per_study
            else "",
        )
        yield Rule(
            f"delta is at most {self.delta:g}",
            f"delta {private.delta:g} is more than the {self.delta:g} allowed" if private.delta > self.delta else "",
        )


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
    """The [compute] section: what training may use, and when."""

    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1  # of a processor, when this site serves a network
    memory_gib: Positive | None = None  # that the process may take; beyond it an order fails, and the process goes on
    gpu_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of a GPU's memory
    hours: Annotated[str, StringConstraints(pattern=_HOURS)] | None = None  # such as "20:00-06:00", in the machine's own time

    def apply(self) -> None:
        """Keep this process within these limits; imports torch."""
        import resource

        import torch

        torch.set_num_threads(self.threads)
        if self.memory_gib is not None:
            most = int(self.memory_gib * 2**30)
            resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        if self.gpu_share < 1 and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(self.gpu_share)

    def closed_for(self, now: datetime) -> float:
        """Seconds until training may begin; 0 within the hours.

        >>> Compute(hours="20:00-06:00").closed_for(datetime(2026, 11, 21, 19, 30))
        1800.0
        """
        if self.hours is None:
            return 0.0
        opens, closes = (int(text[:2]) * 60 + int(text[3:]) for text in self.hours.split("-"))
        minute = now.hour * 60 + now.minute + now.second / 60
        is_open = opens <= minute < closes if opens < closes else minute >= opens or minute < closes
        return 0.0 if is_open else (opens - minute) % (24 * 60) * 60


class Network(Config):
    """The [network] section: how the coordinator is reached; calls go out, and none come in."""

    coordinator: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.-]+:\d{1,5}$")] | None = None  # left out: as enrolled
    proxy: Annotated[str, StringConstraints(pattern=r"^https?://[A-Za-z0-9.-]+:\d{1,5}$")] | None = (
        None  # an HTTP proxy to go through
    )


class SiteConfig(Config):
    """One hospital's file. It stays at the hospital; a refusal names the limit that a plan breaks, nothing else of it."""

    site: Name
    state: Annotated[Path, Field(strict=False)] = Path("state")  # ledger and log
    allow: SitePolicy = SitePolicy()
    data: dict[Name, DataSource] = Field(default_factory=dict)
    compute: Compute = Compute()
    network: Network = Network()

    def rules(self, plan: StudyPlan) -> list[Rule]:
        """Every rule of this site but for its patients' budget, which the ledger keeps, and whether `plan` keeps it."""
        source = self.data.get(plan.task)
        return [*self.allow.rules(plan, self.site, source.declared_patients if source else None), *self.own_rules(plan)]

    def own_rules(self, plan: StudyPlan) -> Iterator[Rule]:
        """What follows from the rest of the file: records to train on, and a model that is not too large."""
        from wardround.common.tasks import task_of

        has_data, most = plan.task in self.data, self.allow.parameters
        yield Rule("this site has data for the task", "" if has_data else f"it has no data for task {plan.task}")
        size = task_of(plan).size(plan.model)
        larger = f"a model of {size:,} numbers is larger than the {most:,} allowed"
        yield Rule(f"the model has at most {most:,} numbers", larger if size > most else "")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a site file; relative paths in it start at its own folder."""
        config = super().load(path)
        home = path.resolve().parent
        data = {task: source.at(home) for task, source in config.data.items()}
        return config.model_copy(update={"state": home / config.state, "data": data})
