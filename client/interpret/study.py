"""What is explained: a plan, the model it gave, and the held-out records of one hospital."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from wardround.client.data import held_out_patients, load
from wardround.client.data.lines import read_columns
from wardround.client.policy import DataSource, SiteConfig
from wardround.common.config import suggest
from wardround.common.errors import ConfigError
from wardround.common.plan import SignedText
from wardround.common.start import sent
from wardround.common.tasks import Records, Task, task_of
from wardround.common.tasks.text import TextSchema, bucket, words
from wardround.common.weights import Shapes, Weights


@dataclass(frozen=True)
class Files:
    """The three files an explanation needs."""

    site: Path
    plan: Path
    model: Path

    @classmethod
    def of_run(cls, run: Path, site: str | None) -> Files:
        """Those of a simulated hospital in a run folder; the plan's first one if none is named.

        Raises:
            ConfigError: no run folder, no such hospital, or a study that has not ended.
        """
        plan, model = run / "plan.toml", run / "model.safetensors"
        if not plan.is_file():
            raise ConfigError(f"{run} is no run folder: it has no plan.toml")
        sites = list(SignedText.load(plan).plan.sites)
        if site is not None and site not in sites:
            raise ConfigError(f"--site {site}: the plan does not name this site{suggest(site, sites)}")
        if not model.is_file():
            raise ConfigError(f"{run} has no model.safetensors: its study has not ended, see wardround simulate --resume")
        return cls(run / "sites" / (site or sites[0]) / "site.toml", plan, model)


@dataclass(frozen=True)
class Opened:
    """What was read from `Files`.

    Attributes:
        records: held out, never trained on.
        number: (records,) int64, the place of each in the hospital's own files, from 1.
        owner: the patient's id for each record; None where each record is a patient.
        words: of each record whose words are known, in order; empty where the loader gives none.
    """

    study: SignedText
    site: SiteConfig
    task: Task
    weights: Weights
    records: Records
    number: Tensor
    owner: list[str] | None
    words: list[list[str]]


def open_study(files: Files) -> Opened:
    """Read and check all three files; the records last.

    Raises:
        ConfigError: a file is wrong, the model is not the plan's, or no record is held out.
        DataRefused: the records do not fit the task.
    """
    study, site = SignedText.load(files.plan), SiteConfig.load(files.site)
    task = task_of(study.plan)
    source = site.data.get(study.plan.task)
    if source is None:
        raise ConfigError(f"{files.site}: has no [data.{study.plan.task}]")
    shapes = Shapes.like(sent(task.model(study.plan.model, study.plan.seed), study.plan.model))
    weights = read_model(files.model, study, shapes)
    loaded = load(source, task)
    held_out = torch.nonzero(held_out_patients(loaded, source)[loaded.records.patient]).squeeze(1)
    if not len(held_out):
        raise ConfigError(
            f"{files.site}: data.{study.plan.task} holds no record out (holdout = {source.holdout:g}); of records that were "
            "trained on, an explanation would show how they were learnt by heart"
        )
    own = loaded.take(held_out)
    return Opened(study, site, task, weights, own.records, held_out + 1, own.owner, _words(source, task, own.records, held_out))


def read_model(path: Path, study: SignedText, shapes: Shapes) -> Weights:
    """The tensors of a released model.

    Raises:
        ConfigError: no such file, another study's model, or tensors that are not the network's.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            metadata = file.metadata() or {}
    except Exception as error:  # no file or a damaged one, in safetensors' own words
        raise ConfigError(f"{path} cannot be read as a model: {error}") from None
    if metadata.get("study") != study.digest:
        raise ConfigError(f"{path}: is of study {metadata.get('study', 'without a name')}, the plan is {study.digest}")
    found = Shapes.like(weights).of
    for name in sorted(found.keys() | shapes.of.keys()):
        if found.get(name) != shapes.of.get(name):
            raise ConfigError(
                f"{path}: tensor {name} has {_shape(found, name)}, the plan's network wants {_shape(shapes.of, name)}"
            )
    unreal = [name for name, t in weights.items() if not t.is_floating_point() or not bool(t.isfinite().all())]
    if unreal:
        raise ConfigError(f"{path}: tensor {unreal[0]} holds something that is no number")
    return weights


def _shape(of: object, name: str) -> str:
    assert isinstance(of, dict)
    return f"shape {list(of[name])}" if name in of else "no such tensor"


def _words(source: DataSource, task: Task, records: Records, position: Tensor) -> list[list[str]]:
    """The words behind the tokens: records only keep a hash of each, so they are read anew from the hospital's own file."""
    schema = task.schema
    if source.loader != "text" or not isinstance(schema, TextSchema):
        return []
    columns = read_columns(source, schema.columns)
    found = []
    for row, at in enumerate(position.tolist()):
        text = "\n".join(columns[name][at][1] for name in schema.texts)
        found.append(words(text)[: schema.length])
        codes = [bucket(word, schema.buckets) for word in found[-1]]
        if codes != records.fields["tokens"][row, : len(codes)].tolist():
            return []  # the file is no longer what was read a moment ago
    return found
