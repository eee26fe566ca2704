"""Records that were read, checked and encoded before: one safetensors file, ready in milliseconds.

    field.<name>, label, patient, held_out (where there is a split)      metadata: owner, a JSON list (where there is one)

A simulation deals records out to its hospitals in this form. It holds patients' values, so it stays where the records are.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from wardround.client.data.loaded import Loaded
from wardround.client.policy import DataSource
from wardround.common.errors import DataRefused
from wardround.common.tasks import Records, Task
from wardround.common.tasks.base import Schema

_FIELD = "field."


def save_prepared(path: Path, loaded: Loaded) -> None:
    """Write what a loader found to `path`."""
    records = loaded.records
    tensors = {f"{_FIELD}{name}": t for name, t in records.fields.items()}
    tensors |= {"label": records.label, "patient": records.patient}
    if loaded.held_out is not None:
        tensors["held_out"] = loaded.held_out
    metadata = {} if loaded.owner is None else {"owner": json.dumps(loaded.owner)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)


def load_prepared(source: DataSource, task: Task) -> Loaded:
    """Read what `save_prepared` wrote.

    Raises:
        DataRefused: the file cannot be read, or holds records of another task; the detail names the file.
    """
    try:
        with safetensors.safe_open(str(source.path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            metadata = file.metadata() or {}
        owner = json.loads(metadata["owner"]) if "owner" in metadata else None
    except Exception as error:  # the file's own damage, in safetensors' or JSON's words
        raise DataRefused("the prepared records cannot be read", detail=f"{source.path}: {error}") from None
    like = task.blank(1)
    wanted = {f"{_FIELD}{name}": t for name, t in like.fields.items()} | {"label": like.label, "patient": like.patient}
    count = len(tensors.get("patient", ()))
    kept = {name: t for name, t in tensors.items() if name != "held_out"}
    if kept.keys() != wanted.keys() or any(
        t.shape != (count, *wanted[name].shape[1:]) or t.dtype != wanted[name].dtype for name, t in kept.items()
    ):
        raise DataRefused("the prepared records are those of another task", detail=f"{source.path} is not of task {task.name}")
    records = Records({name: tensors[f"{_FIELD}{name}"] for name in like.fields}, tensors["label"], tensors["patient"])
    held_out = tensors.get("held_out")
    if problem := _problem(records, owner, held_out) or _out_of_range(records, task.schema):
        raise DataRefused("the prepared records contradict themselves", detail=f"{source.path}: {problem}")
    return Loaded(records, owner, held_out)


def _problem(records: Records, owner: object, held_out: torch.Tensor | None) -> str:
    numbers = [t for t in (*records.fields.values(), records.label) if t.is_floating_point()]
    _, number = torch.unique(records.patient, return_inverse=True)
    if not len(records):
        return "there is none"
    if not all(bool(t.isfinite().all()) for t in numbers):
        return "a value is no number"
    if not torch.equal(number, records.patient):
        return "patients are not numbered 0, 1, ..."
    if held_out is not None and (held_out.shape != records.patient.shape or held_out.dtype != torch.bool):
        return "held_out is not one flag for each record"
    if owner is not None and not (isinstance(owner, list) and all(isinstance(o, str) and o for o in owner)):
        return "owners are not texts"
    if isinstance(owner, list):
        pairs = set(zip(owner, records.patient.tolist(), strict=False))
        if not len(pairs) == len(set(owner)) == records.patients or len(owner) != len(records):
            return "owners and patients do not agree"
    return ""


def _out_of_range(records: Records, schema: Schema) -> str:
    codes = getattr(schema, "codes", None)  # of sequences and texts; beyond them an embedding has no row
    whole = [field for field in records.fields.values() if not field.is_floating_point()]
    if any(bool((field < 0).any()) or (codes and bool((field >= codes).any())) for field in whole):
        return f"a token is not one of 0 to {codes - 1}" if codes else "a token is negative"
    if schema.classes and not bool(((records.label >= 0) & (records.label < schema.classes)).all()):
        return f"a label is not one of 0 to {schema.classes - 1}"
    if records.label.is_floating_point() and not bool(((records.label >= 0) & (records.label <= 1)).all()):
        return "a label is not within 0 to 1"
    return ""
