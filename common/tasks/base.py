"""A task: what one record looks like, which network reads it, and what is a good answer.

A record is a mapping of named fields, and a model's `forward` takes those names. Whatever a schema knows about values
(centre, scale, plausible range) is a public constant, written down before any patient was looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from wardround.common.errors import DataRefused
from wardround.common.metrics import Judged, Scores

Loss = Callable[[Tensor, Tensor], Tensor]
Chance = Callable[[int], Tensor]  # so many uniform float64 numbers in [0, 1)


@dataclass(frozen=True)
class Records:
    """Records of one site, in memory.

    Attributes:
        fields: named tensors, each (records, ...).
        label: (records, ...): the class, int64; or a mask, boxes, whatever the task's loss compares with.
        patient: (records,) int64, numbering the patients 0, 1, ... in order of first appearance.
    """

    fields: Mapping[str, Tensor]
    label: Tensor
    patient: Tensor

    def __len__(self) -> int:
        return len(self.label)

    @property
    def patients(self) -> int:
        """How many different patients there are."""
        return int(self.patient.max()) + 1 if len(self) else 0

    def take(self, index: Tensor) -> Records:
        """The records at `index`, patients numbered anew."""
        _, patient = torch.unique(self.patient[index], return_inverse=True)
        return Records({k: v[index] for k, v in self.fields.items()}, self.label[index], patient)

    def to(self, device: torch.device) -> Records:
        """The same records on `device`."""
        fields = {name: tensor.to(device) for name, tensor in self.fields.items()}
        return Records(fields, self.label.to(device), self.patient.to(device))

    def of_patients(self, chosen: Tensor) -> Records:
        """All records of the patients flagged in `chosen`, (patients,) bool."""
        return self.take(torch.nonzero(chosen[self.patient]).squeeze(1))

    def __add__(self, other: Records) -> Records:
        """Both, taken as different patients."""
        return Records(
            {k: torch.cat([v, other.fields[k]]) for k, v in self.fields.items()},
            torch.cat([self.label, other.label]),
            torch.cat([self.patient, other.patient + self.patients]),
        )


class Schema(Protocol):
    """What one record looks like. How files become such records is a method of each kind of schema."""

    def blank(self, count: int) -> Records:
        """`count` records of nobody: all zeros, in the shapes and dtypes of real ones, each a patient of its own."""
        ...

    @property
    def classes(self) -> int:
        """Labels are 0 .. classes - 1; 0 where a label is no class."""
        ...


def blank(
    count: int, label: tuple[int, ...] = (), label_dtype: torch.dtype = torch.int64, /, **fields: tuple[int, ...]
) -> Records:
    """Zeros for `Schema.blank`: fields by the shape of one record's entry. A field called `tokens` is int64, others float32."""
    kinds = {"tokens": torch.int64}
    empty = {name: torch.zeros(count, *shape, dtype=kinds.get(name, torch.float32)) for name, shape in fields.items()}
    return Records(empty, torch.zeros(count, *label, dtype=label_dtype), torch.arange(count))


def unfit(what: str, wrong: NDArray[np.bool_], why: str) -> DataRefused:
    """The refusal of records that do not fit the schema."""
    # even a count is a figure about patients, so it stays in the detail
    return DataRefused(f"{what} does not fit the task's schema", detail=f"{int(wrong.sum())} records {why}")


def numbered(patient: Sequence[str]) -> Tensor:
    """Patients 0, 1, ... in order of first appearance, for each record: (records,) int64."""
    number: dict[str, int] = {}
    return torch.tensor([number.setdefault(owner, len(number)) for owner in patient], dtype=torch.int64)


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """(records, classes) and (records,) -> (records,)."""
    return F.cross_entropy(logits, label, reduction="none")


def class_scores(logits: Tensor, label: Tensor) -> Scores:
    """What a classifier's logits say, beside the truth."""
    return Scores(logits.double().softmax(1).numpy(), label.numpy())


@dataclass(frozen=True)
class Makes:
    """What there is to say of a network that makes pictures. Each function is given the network and its weights.

    Attributes:
        part: of the network, what makes the pictures. It alone is handed out when a study ends; the rest stays in checkpoints.
        reader: -> a network trained on its pictures alone, which reads records in its place, and the weights of that one.
        sheet: -> pictures (count, channels, side, side) in [0, 1] and the name of each, for the report.
        compared: training records, test records -> sentences on how like its pictures are to them.
        measured_every: rounds between two measurements of a simulation, since a reader takes seconds to train.
    """

    part: str
    reader: Callable[[nn.Module, Mapping[str, Tensor]], tuple[nn.Module, Mapping[str, Tensor]]]
    sheet: Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, list[str]]]
    compared: Callable[[nn.Module, Mapping[str, Tensor], Records, Records], list[str]]
    measured_every: int = 1


class _Unfilled(TorchFunctionMode):
    """Sizes need no first weights; drawing them without memory would have torch import its compiler, for many seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Task:
    """One clinical question, ready to be trained anywhere.

    Attributes:
        schema: what one record looks like.
        build: a fresh network from the plan's [model] options.
        loss: outputs of a batch and its labels -> one value per record (batch,); the engine sums.
        judge: outputs and labels -> what the metrics are computed from.
        augment: records changed at random, each by numbers of its own; None where the task knows no such change.
        learner: how a site learns it, a name of `wardround.client.training`.
        private_part: the part of a network that records go through in training; all of it but for adversaries.
        makes: how a network is judged whose work is pictures in place of answers; None for any other.
        headline: the metric people ask for first.
    """

    name: str
    title: str
    schema: Schema
    build: Callable[[Mapping[str, Any]], nn.Module]
    loss: Loss = cross_entropy
    judge: Callable[[Tensor, Tensor], Judged] = class_scores
    augment: Callable[[Records, Chance], Records] | None = None
    learner: str = "supervised"
    private_part: Callable[[nn.Module], nn.Module] = lambda network: network
    makes: Makes | None = None
    headline: str = "auroc"
    metrics: tuple[str, ...] = ("auroc", "accuracy", "log_loss")

    def size(self, options: Mapping[str, Any]) -> int:
        """How many numbers the network of these options has, frozen ones too, counted without taking their memory."""
        with torch.device("meta"), _Unfilled():
            return sum(p.numel() for p in self.build(options).parameters())

    def released(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is handed out of a trained model: all of it, but of one that makes pictures the maker."""
        part = "" if self.makes is None else f"{self.makes.part}."
        return {name: tensor for name, tensor in weights.items() if name.startswith(part)}

    def blank(self, count: int) -> Records:
        """`count` records of nobody."""
        return self.schema.blank(count)

    def model(self, options: Mapping[str, Any], seed: int) -> nn.Module:
        """A network whose first weights follow from `seed` alone; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(options)

    def views(self, records: Records, count: int | None, chance: Chance) -> Records:
        """`count` changed copies of each record, of the same patient and behind each other; None leaves all as it is.

        The mean over a patient's views is one gradient of that patient, so they cost no privacy (De et al. 2022,
        https://arxiv.org/abs/2204.13650, "augmentation multiplicity").
        """
        if count is None or self.augment is None or not len(records):
            return records
        return self.augment(
            records.take(torch.arange(len(records), device=records.label.device).repeat_interleave(count)), chance
        )

    def scores(self, model: nn.Module, weights: Mapping[str, Tensor], records: Records) -> Judged:
        """What `model` with `weights` says of `records`, beside the truth; without dropout, in chunks of 1,024."""
        if self.makes is not None:
            model, weights = self.makes.reader(model, weights)
        learning, parts = model.training, []
        model.eval()
        with torch.no_grad():
            for start in range(0, max(1, len(records)), 1024):
                chunk = {name: tensor[start : start + 1024] for name, tensor in records.fields.items()}
                outputs = torch.func.functional_call(model, dict(weights), args=(), kwargs=chunk)
                parts.append(self.judge(outputs, records.label[start : start + 1024]))
        model.train(learning)
        return reduce(add, parts)
