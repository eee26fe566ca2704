"""Networks in the field's own names, safe under per-patient clipping: nothing in them couples records of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from wardround.common.errors import ConfigError
from wardround.common.models.cnn import cnn, resnet18, three_conv_cnn, two_conv_cnn
from wardround.common.models.dcgan import discriminator, generator
from wardround.common.models.detector import detector
from wardround.common.models.fusion import fusion, sequence_rnn, series_rnn, text_rnn
from wardround.common.models.mlp import mlp
from wardround.common.models.published import published
from wardround.common.models.sequence_cnn import sequence_cnn
from wardround.common.models.standardised import ws_cnn
from wardround.common.models.transformer import transformer
from wardround.common.models.unet import unet
from wardround.common.registry import registry


@dataclass(frozen=True)
class Architecture:
    """A registered network."""

    name: str
    build: Callable[..., nn.Module]

    def __call__(self, options: Mapping[str, Any], **fixed: Any) -> nn.Module:
        """Build it from the plan's options and what the task fixes.

        Raises:
            ConfigError: an option the network does not have, or that is not the plan's to choose.
        """
        if taken := sorted(options.keys() & fixed.keys()):
            raise ConfigError(f"model.{taken[0]}: follows from the task's data; leave it out")
        try:
            return self.build(**options, **fixed)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise ConfigError(f"model.{self.name}: {error}") from None


MODELS = registry(
    Architecture("mlp", mlp),
    Architecture("cnn", cnn),
    Architecture("two-conv-cnn", two_conv_cnn),
    Architecture("three-conv-cnn", three_conv_cnn),
    Architecture("ws-cnn", ws_cnn),
    Architecture("resnet18", resnet18),
    Architecture("torchvision", published),
    Architecture("text-rnn", text_rnn),
    Architecture("sequence-rnn", sequence_rnn),
    Architecture("sequence-cnn", sequence_cnn),
    Architecture("series-rnn", series_rnn),
    Architecture("transformer", transformer),
    Architecture("fusion", fusion),
    Architecture("unet", unet),
    Architecture("detector", detector),
    Architecture("dcgan-generator", generator),
    Architecture("dcgan-discriminator", discriminator),
)
