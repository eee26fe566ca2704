"""Networks in the field's own names, safe under per-patient clipping: nothing in them couples records of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from wardround.common.errors import ConfigError
from wardround.common.models.cnn import cnn, resnet18
from wardround.common.models.mlp import mlp
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


MODELS = registry(Architecture("mlp", mlp), Architecture("cnn", cnn), Architecture("resnet18", resnet18))
