"""Which network a plan chooses for a task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from wardround.common.models import MODELS
from wardround.common.registry import look_up


def one_of(first: str, *others: str, **fixed: Any) -> Callable[[Mapping[str, Any]], nn.Module]:
    """A task's `build`: the plan's `model.network` out of these, the first by default.

    `fixed` follows from the task's data, and a network is given what it asks for of it.

    Raises (when built):
        ConfigError: another network, or options the network does not have.
    """
    known = {name: MODELS[name] for name in (first, *others)}

    def build(options: Mapping[str, Any]) -> nn.Module:
        chosen = dict(options)
        network = look_up("network of this task", str(chosen.pop("network", first)), known)
        asked = inspect.signature(network.build).parameters
        return network(chosen, **{name: value for name, value in fixed.items() if name in asked})

    return build
