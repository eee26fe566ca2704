"""What a site tells of its patients besides updates: how they fall into classes, and how a model does on those set aside.

Each is the sum of one vector a patient, of L2 length at most 1, so one patient more or less moves it by at most 1, and noise
of deviation `noise_multiplier` makes it a Gaussian release at that multiplier (Dwork & Roth 2014, appendix A). Vectors are cut
to multiples of 2^-20, so that their sum in float64 is exact, whatever its order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.client.dp import Coins, add_noise
from wardround.common.tasks import Records, Task
from wardround.common.tasks.looks import NoisedLook

Floats = NDArray[np.float64]

_GRID = 2.0**20
_CHUNK = 1024  # records at a time


def class_vectors(records: Records, classes: int) -> Floats:
    """(patients, classes): the share of each patient's records in each class; each row adds up to 1, so it is no longer."""
    patient, label = records.patient.cpu().numpy(), records.label.cpu().numpy()
    counted: Floats = np.zeros((records.patients, classes))
    np.add.at(counted, (patient, label), 1.0)
    counted /= counted.sum(axis=1, keepdims=True)
    return counted


def loss_vectors(look: NoisedLook, task: Task, model: nn.Module, weights: Mapping[str, Tensor], records: Records) -> Floats:
    """(patients, 2): what each patient adds to a look at `model` with `weights`, without dropout."""
    learning, parts = model.training, [torch.zeros(0)]
    model.eval()
    with torch.no_grad():
        for start in range(0, len(records), _CHUNK):
            chunk = {name: tensor[start : start + _CHUNK] for name, tensor in records.fields.items()}
            outputs = torch.func.functional_call(model, dict(weights), args=(), kwargs=chunk)
            parts.append(task.loss(outputs, records.label[start : start + _CHUNK]).cpu())
    model.train(learning)
    patient = records.patient.cpu().numpy()
    of_each = np.bincount(patient, minlength=records.patients)
    with np.errstate(invalid="ignore"):  # infinity less infinity is no number, and counts as the cap
        total = np.bincount(patient, weights=torch.cat(parts).double().numpy(), minlength=records.patients)
    return look.vectors(total / of_each)


def summed(vectors: Floats, *, noise_multiplier: float = 0.0, coins: Coins | None = None) -> bytes:
    """The sum over patients plus noise, as it travels; (patients, n) of rows no longer than 1 -> n float64, little-endian.

    Without coins it is exact, for studies without privacy.

    Raises:
        ValueError: coins, and no noise to make of them.
    """
    total = torch.from_numpy((np.floor(vectors * _GRID) / _GRID).sum(axis=0))
    if coins is not None:
        if not noise_multiplier > 0:
            raise ValueError(f"noise cannot have multiplier {noise_multiplier}")
        total = add_noise(total, deviation=noise_multiplier, coins=coins).double()
    return total.numpy().astype("<f8").tobytes()
