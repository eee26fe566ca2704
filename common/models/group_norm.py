"""Published networks made fit for private training: BatchNorm out, GroupNorm in."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

_GROUPS = 32  # Wu and He 2018, https://arxiv.org/abs/1803.08494
_AT_LEAST = 8  # channels in a group where a channel may be a single number


def with_group_norm(model: nn.Module) -> nn.Module:
    """`model` with every BatchNorm replaced by `nn.GroupNorm(gcd(32, channels), channels)`, in place.

    A batch statistic couples patients: each patient's output, and so each gradient, depends on who else was drawn, and no
    clipping bounds one patient's share any more; the running averages would learn from patients without noise. A GroupNorm
    looks at one record alone.

    Names stay as they were (`layer1.0.bn1.weight` is now a GroupNorm's), and so do device, dtype, mode, whether there is a
    scale at all, and whether it learns. Scales start at 1 and shifts at 0, because numbers learned for the statistics of
    batches mean nothing for those of groups. It is another function than before: replace where the network is built, before
    round 0, or sites and coordinator compute different things with the same weights.

    A BatchNorm1d may stand behind a linear layer, where a channel is one number, and a group of one channel is then always
    zero; so it gets fewer groups where they would have fewer than 8 channels.

    Raises:
        ValueError: a lazy BatchNorm, whose channels are not known yet.
    """
    made: dict[int, nn.Module] = {}  # a layer that stands in two places stays one layer

    def instead(layer: nn.Module) -> nn.Module:
        if id(layer) not in made:
            made[id(layer)] = _group_norm(layer) if isinstance(layer, _BatchNorm) else layer
        return made[id(layer)]

    for holder in list(model.modules()):
        for name, layer in holder._modules.items():
            if layer is not None:
                holder._modules[name] = instead(layer)
    return instead(model)


def _group_norm(layer: _BatchNorm) -> nn.GroupNorm:
    channels = layer.num_features
    if isinstance(layer, _LazyNormBase) and not channels:
        raise ValueError("a lazy BatchNorm does not know its channels; run the network once before")
    groups = math.gcd(_GROUPS, channels)
    if isinstance(layer, nn.BatchNorm1d):
        groups = math.gcd(groups, max(1, channels // _AT_LEAST))
    tensor = next((t for t in (layer.weight, layer.running_mean) if t is not None), None)
    kind = {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
    norm = nn.GroupNorm(groups, channels, affine=layer.affine, **kind)  # type: ignore[arg-type]
    for name, p in norm.named_parameters():
        p.requires_grad_(getattr(layer, name).requires_grad)
    return norm.train(layer.training)
