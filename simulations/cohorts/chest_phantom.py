"""Synthetic chest films of four hospitals that do not exist, drawn anew for every run from a public seed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from wardround.client.data.loaded import Loaded
from wardround.common.tasks import Task
from wardround.common.tasks.images import ImageSchema
from wardround.simulations.cohorts.base import Cohort, Gathered
from wardround.simulations.phantom import Films, films

_SEED = 0


def _read(patients: Mapping[str, int], folder: Path, task: Task) -> Gathered:
    schema = task.schema
    assert isinstance(schema, ImageSchema)
    drawn = {site: films(site, count, seed=_SEED, side=schema.side) for site, count in patients.items()}
    owner = [patient for site in drawn.values() for patient in site.patient]
    image = torch.stack([schema.prepare(film) for site in drawn.values() for film in site.image])
    label = torch.cat([_target(schema, site) for site in drawn.values()])
    home = [name for name, site in drawn.items() for _ in site.patient]
    return Gathered(Loaded(schema.encode(image, label, owner), owner), home)


def _target(schema: ImageSchema, found: Films) -> Tensor:
    # a lesion lies in a lung, so the sum is a class for each pixel: elsewhere, lung, lesion
    target = {"class": found.label, "mask": found.lung + found.mask, "boxes": found.boxes}[schema.target]
    return torch.from_numpy(target).to(schema.label_dtype)


def _cohort(name: str, **patients: int) -> Cohort:
    return Cohort(
        name=name,
        origin="Synthetic films, drawn by wardround from a seed; nobody's.",
        files=(),
        read=partial(_read, patients),
    )


chest_phantom = _cohort("chest-phantom", alder=400, birch=320, cedar=280, dogwood=200)
chest_phantom_segmentation = _cohort("chest-phantom-segmentation", alder=160, birch=120, cedar=120, dogwood=80)
chest_phantom_detection = _cohort("chest-phantom-detection", alder=400, birch=320, cedar=280, dogwood=200)
