"""The sum of clipped patient gradients: one patient, whatever the records say, moves it by at most the clip norm."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from wardround.client.dp.engine import engine_of
from wardround.common.tasks import Records
from wardround.common.tasks.base import Loss


def clipped_sum(
    model: nn.Module,
    loss: Loss,
    weights: Mapping[str, Tensor],
    batch: Records,
    *,
    clip_norm: float,
    records_per_patient: int | None = None,
) -> dict[str, Tensor]:
    """Sum over patients of min(1, clip_norm / |g|) g, where g is the mean gradient of one patient's records.

    Abadi et al. 2016, https://arxiv.org/abs/1607.00133, with the patient in place of the record. A network of known layers
    is differentiated in one pass (see `taps`), any other record by record; both were compared on made-up records first. A
    patient whose gradient is not finite counts as zero. An empty batch gives zeros.

    Args:
        model: the network; its own parameters are not touched.
        loss: outputs and labels of a batch -> one value for each record, (batch,).
        weights: the trainable tensors to differentiate at.
        batch: any records; those of one patient stay together.
        clip_norm: bound on the joint L2 norm of one patient's gradient. A hair of it, `headroom`, is left for rounding.
        records_per_patient: a public bound on how many records a patient has in `batch`; None for as many as are computed at
            once.

    Returns:
        One tensor for each of `weights`, of its dtype or float64.

    Raises:
        ValueError: a patient has more records than the bound.
    """
    return engine_of(model, loss, batch).clipped_sum(
        weights, batch, clip_norm=clip_norm, records_per_patient=records_per_patient
    )
