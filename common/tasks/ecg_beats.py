"""Five kinds of heart beat, from the 140 values of one beat's electrocardiogram.

The shape of the ECG5000 data set (Dau et al. 2019, https://doi.org/10.1109/JAS.2019.1911747; cut from record chf07 of the BIDMC
congestive heart failure database, https://doi.org/10.13026/C29G60). All of its beats are ONE patient's, so there a beat stands
in for a patient, and a private study protects a beat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from wardround.common.errors import ConfigError
from wardround.common.models import MODELS
from wardround.common.tasks.arrays import ArraySchema
from wardround.common.tasks.base import Task

LENGTH = 140
STRIDE = 5  # values that a recurrent network reads at once

# each beat has mean 0 and deviation 1 before it comes here, so +-12 is beyond what 140 values can reach
SCHEMA = ArraySchema({"signal": (1, LENGTH)}, classes=5, low=-12, high=12)


class BeatRNN(nn.Module):
    """A network of `series` that reads a beat five values at a time.  `signal` (batch, 1, 140) -> logits (batch, 5)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, signal: Tensor) -> Tensor:
        """See above."""
        logits: Tensor = self.network(series=signal.reshape(len(signal), LENGTH // STRIDE, STRIDE))
        return logits


def _build(options: Mapping[str, Any]) -> nn.Module:
    rest = dict(options)
    network = rest.pop("network", "cnn")
    if network == "cnn":
        return MODELS["sequence-cnn"](rest, channels=1, classes=SCHEMA.classes)
    if network == "rnn":
        return BeatRNN(MODELS["series-rnn"](rest, inputs=STRIDE, table=0, classes=SCHEMA.classes))
    raise ConfigError(f"model.network: {network!r}; there are: cnn, rnn")


ecg_beats = Task(
    name="ecg-beats",
    title="Five kinds of heart beat",
    schema=SCHEMA,
    build=_build,
    headline="accuracy",
    metrics=("accuracy", "balanced_accuracy", "log_loss"),
)
