"""Convolutions of one, two and three dimensions, and their transposes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wardround.client.dp.taps.base import Tap
from wardround.client.dp.taps.kept import Built, Groups, Joined, Kept
from wardround.client.dp.taps.patches import OuterOfPatches, Passed, Windows

# torch's own functions by dimensions: unlike the operator underneath, autocast knows all of them on every device
_CONVOLVE: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_SPREAD: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class ConvolutionTap(Tap):
    """A convolution is linear over patches: a record's gradient is the sum over places of outer products."""

    transposed = False

    def forward(self, x: Tensor, *size: object) -> Tensor:
        """See `Tap`. Padding that is not plain zeros on both sides alike is done before, by torch itself."""
        layer = self.layer
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        elif not self._is_even:
            x = F.pad(x, layer._reversed_padding_repeated_twice)
        return super().forward(x)

    @property
    def _padding(self) -> tuple[int, ...]:
        """What is left to the convolution itself, on both sides alike."""
        layer = self.layer
        if layer.padding_mode != "zeros" or not self._is_even:
            return (0,) * len(layer.kernel_size)
        return self._sides if isinstance(layer.padding, str) else tuple(layer.padding)

    @property
    def _sides(self) -> tuple[int, ...]:
        return tuple(reversed(self.layer._reversed_padding_repeated_twice[::2]))

    @property
    def _is_even(self) -> bool:
        """Whether as much is padded before as behind; an even kernel that keeps the size is not."""
        both = self.layer._reversed_padding_repeated_twice
        return bool(both[::2] == both[1::2])

    def _backward(self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
        layer = self.layer
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            g, x, weight, None, layer.stride, self._padding, layer.dilation, self.transposed, layer.output_padding,
            layer.groups, wanted,
        )  # fmt: skip
        return found

    def act(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Tap`."""
        layer = self.layer
        weight, bias = (*weights, None)[:2]
        convolve = _CONVOLVE[len(layer.kernel_size) - 1]
        y: Tensor = convolve(x, weight, bias, layer.stride, self._padding, layer.dilation, layer.groups)
        return y, ()

    def keep(self, x: Tensor, g: Tensor, again: Sequence[Tensor], groups: Groups) -> Kept:
        """See `Tap`."""
        parts: list[Kept] = []
        if "weight" in self.learns:
            passed = self._passed(x, g)
            parts.append(OuterOfPatches(passed, groups) if passed.stays_outer else passed.built(groups))
        if "bias" in self.learns:
            parts.append(Built({"bias": groups.mean(g.flatten(2).sum(2))}))
        return parts[0] if len(parts) == 1 else Joined(parts)

    def _passed(self, x: Tensor, g: Tensor) -> Passed:
        seen, met = (g, x) if self.transposed else (x, g)
        layer = self.layer
        windows = Windows(layer.kernel_size, layer.stride, self._padding, layer.dilation, tuple(met.shape[2:]))
        return Passed(seen, met, windows, layer.groups)

    def pull_back(self, x: Tensor, g: Tensor, weights: Sequence[Tensor], again: Sequence[Tensor]) -> Tensor:
        """See `Tap`."""
        return self._backward(g, x, weights[0], (True, False, False))[0]


class TransposedConvolutionTap(ConvolutionTap):
    """The transpose: its kernel sees the gradient of the output, and meets the input."""

    transposed = True

    @classmethod
    def takes(cls, layer: nn.Module) -> bool:
        """See `Tap`."""
        return getattr(layer, "padding_mode", "") == "zeros"

    def forward(self, x: Tensor, *size: object) -> Tensor:
        """See `Tap`.

        Raises:
            ValueError: an output size is asked for, which the layer was not built with.
        """
        if any(one is not None for one in size):
            raise ValueError("output_size is not known to the private engine; set output_padding instead")
        return super().forward(x)

    def act(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Tap`."""
        layer = self.layer
        weight, bias = (*weights, None)[:2]
        spread = _SPREAD[len(layer.kernel_size) - 1]
        y: Tensor = spread(x, weight, bias, layer.stride, self._padding, layer.output_padding, layer.groups, layer.dilation)
        return y, ()
