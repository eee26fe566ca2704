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
from wardround.common.models.partial import partly
from wardround.common.models.published import published
from wardround.common.models.sequence_cnn import sequence_cnn
from wardround.common.models.standardised import ws_cnn
from wardround.common.models.transformer import transformer
from wardround.common.models.unet import unet
from wardround.common.registry import registry

_OF_START = {"weights", "frozen"}  # what a plan says of the first numbers, whatever the network: see `common.start`


@dataclass(frozen=True)
class Architecture:
    """A registered network. Where it has `parts`, the option `train` says which of them learn."""

    name: str
    build: Callable[..., nn.Module]
    parts: bool = False

    def __call__(self, options: Mapping[str, Any], **fixed: Any) -> nn.Module:
        """Build it from the plan's options and what the task fixes.

        Raises:
            ConfigError: an option the network does not have, or that is not the plan's to choose.
        """
        if taken := sorted(options.keys() & fixed.keys()):
            raise ConfigError(f"model.{taken[0]}: follows from the task's data; leave it out")
        own = {key: value for key, value in options.items() if not (key in _OF_START and str(value).startswith("sha256:"))}
        try:
            if self.parts:
                train = own.pop("train", "all")
                return partly(lambda: self.build(**own, **fixed), train)
            return self.build(**own, **fixed)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise ConfigError(f"model.{self.name}: {error}") from None


MODELS = registry(
    Architecture("mlp", mlp),
    Architecture("cnn", cnn, parts=True),
    Architecture("two-conv-cnn", two_conv_cnn, parts=True),
    Architecture("three-conv-cnn", three_conv_cnn, parts=True),
    Architecture("ws-cnn", ws_cnn, parts=True),
    Architecture("resnet18", resnet18, parts=True),
    Architecture("torchvision", published, parts=True),
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
