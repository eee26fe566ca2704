"""What a model answers for a record, and the one number of each record that is explained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wardround.common.errors import ConfigError
from wardround.common.tasks import Records, Task
from wardround.common.tasks.images import ImageSchema
from wardround.common.tasks.sequences import SequenceSchema
from wardround.common.tasks.text import TextSchema

Score = Callable[[Tensor], Tensor]  # outputs (batch, ...) -> (batch,), the number that is explained

_AT_ONCE = 64  # records

MEANINGS = {
    "class": "the log-odds of the answer, which say how far the network prefers it to all other classes (0 is even odds)",
    "mask": "the sum of the positive logits of the mask; of its highest pixel where none is positive",
    "boxes": "the sum of the positive logits of the map of centres; of its highest cell where none is positive",
}


@dataclass(frozen=True)
class Answers:
    """What a model says of many records.

    Attributes:
        target: "class", "mask" or "boxes", a key of `MEANINGS`.
        answer: (records,) int64: the class of the highest logit; 0 where the label is no class.
        certainty: (records,) float64: the answer's probability; 0 where the label is no class.
        loss: (records,) float64: the task's own.
    """

    target: str
    answer: Tensor
    certainty: Tensor
    loss: Tensor


def exact_model(model: nn.Module) -> nn.Module:
    """`model` itself in float64 and without dropout: an explanation should not be one of rounding."""
    return model.double().eval()


def exact_records(records: Records) -> Records:
    """The same records with float64 for floating point."""

    def exact(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return Records({name: exact(t) for name, t in records.fields.items()}, exact(records.label), records.patient)


def target_of(task: Task, outputs: Tensor) -> str:
    """What kind of answer `outputs` (batch, ...) are.

    Raises:
        ConfigError: neither logits of classes nor a map of logits; or the network's work is no answer at all.
    """
    if task.makes is not None:
        raise ConfigError(f"task {task.name}: its network makes pictures; it has no answer about a record to explain")
    schema = task.schema
    target = schema.target if isinstance(schema, ImageSchema) else "class"
    dimensions = {"class": 2, "mask": 4, "boxes": 4}[target]
    if outputs.dim() != dimensions or (target == "class" and outputs.shape[1] != max(2, schema.classes)):
        raise ConfigError(
            f"task {task.name}: its network gives {list(outputs.shape[1:])} numbers for a record; explained are logits of "
            "classes, masks and maps of centres"
        )
    return target


def score_of(task: Task, outputs: Tensor) -> Score:
    """The number that is explained for one record, of whose `outputs` (1, ...) the answer is read; see `MEANINGS`.

    Raises:
        ConfigError: as in `target_of`.
    """
    target = target_of(task, outputs)
    if target == "class":
        answer = int(outputs.argmax(1))
        return lambda logits: _log_odds(logits, answer)
    return lambda logits: _marked(_heights(logits, target))


def answers(task: Task, model: nn.Module, records: Records) -> Answers:
    """What `model` says of all `records`, in chunks.

    Raises:
        ConfigError: as in `target_of`.
    """
    target, parts = "", []
    with torch.no_grad():
        for start in range(0, len(records), _AT_ONCE):
            chunk = slice(start, start + _AT_ONCE)
            outputs: Tensor = model(**{name: t[chunk] for name, t in records.fields.items()})
            target = target_of(task, outputs)
            loss = task.loss(outputs, records.label[chunk]).double()
            if target == "class":
                certainty, answer = outputs.softmax(1).max(1)
            else:
                certainty, answer = torch.zeros_like(loss), torch.zeros(len(loss), dtype=torch.int64)
            parts.append((answer, certainty.double(), loss))
    answer, certainty, loss = (torch.cat(column) for column in zip(*parts, strict=True))
    return Answers(target, answer, certainty, loss)


def class_name(task: Task, number: int) -> str:
    """How the task writes a class; by its number where the task has no name for it."""
    schema = task.schema
    if isinstance(schema, ImageSchema) and schema.class_names:
        return schema.class_names[number]
    if isinstance(schema, SequenceSchema | TextSchema):
        return schema.labels[number][0]
    return f"class {number}"


def _log_odds(logits: Tensor, answer: int) -> Tensor:
    """(batch, classes) -> (batch,): log p / (1 - p) of the softmax. A logit alone means nothing: only differences do."""
    others = [number for number in range(logits.shape[1]) if number != answer]
    return logits[:, answer] - logits[:, others].logsumexp(1)


def _heights(outputs: Tensor, target: str) -> Tensor:
    """(batch, channels, rows, columns) -> (batch, rows, columns): positive where something is marked."""
    if target == "boxes":  # the last four channels are sizes and places
        return outputs[:, :-4].amax(1)
    return outputs[:, 0] if outputs.shape[1] == 1 else outputs[:, 1:].amax(1) - outputs[:, 0]


def _marked(heights: Tensor) -> Tensor:
    flat = heights.flatten(1)
    return torch.where((flat > 0).any(1), flat.relu().sum(1), flat.amax(1))
