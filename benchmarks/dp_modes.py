"""The ways to train a network with privacy, each as one call: `make(network, mode, batch)` gives a step to repeat.

A step is one logical batch: so many physical batches forward and backward, then noise and the optimiser once. Plain SGD
accumulates the same physical batches. `difference` tells how far a mode's clipped sum is from that of single records
differentiated alone, so that nothing fast but wrong is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleExpandedWeights, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from benchmarks.networks import Batch, Network
from wardround.client.dp.optimizer import PatientOptimizer

Backward = Callable[[Batch], None]


@dataclass(frozen=True)
class Settings:
    """What all modes share. `noise` is the standard deviation in units of `clip`; `batches` are physical ones a step."""

    noise: float = 1.0
    clip: float = 1.0
    learning_rate: float = 1e-3
    batches: int = 1

    def sgd(self, model: nn.Module) -> torch.optim.Optimizer:
        """Plain SGD over all parameters."""
        return torch.optim.SGD(model.parameters(), lr=self.learning_rate)

    def private(self, batch: Batch) -> dict[str, float | int | str]:
        """What every private optimiser is told."""
        return {
            "noise_multiplier": self.noise,
            "max_grad_norm": self.clip,
            "expected_batch_size": self.batches * len(batch),
            "loss_reduction": "mean",
        }


@dataclass(frozen=True)
class Step:
    """Call it to train one step; `model` has torch's own names."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    take: Callable[[], None]

    def __call__(self) -> None:
        """Train one step."""
        self.take()


def _plain(network: Network, model: nn.Module, batch: Batch, settings: Settings) -> Step:
    optimizer, loss = settings.sgd(model), network.loss()

    def take() -> None:
        optimizer.zero_grad()
        for _ in range(settings.batches):
            (loss(model(batch.x), batch.y) / settings.batches).backward()
        optimizer.step()

    return Step(model, optimizer, take)


def _ours(network: Network, model: nn.Module, batch: Batch, settings: Settings) -> Step:
    optimizer = PatientOptimizer(settings.sgd(model), model=model, **settings.private(batch))
    return _private(network, model, model, optimizer, batch, settings)


def _hooks(network: Network, model: nn.Module, batch: Batch, settings: Settings) -> Step:
    return _sampled(GradSampleModule(model), network, model, batch, settings)


def _functorch(network: Network, model: nn.Module, batch: Batch, settings: Settings) -> Step:
    return _sampled(GradSampleModule(model, force_functorch=True), network, model, batch, settings)


def _expanded(network: Network, model: nn.Module, batch: Batch, settings: Settings) -> Step:
    return _sampled(GradSampleModuleExpandedWeights(model), network, model, batch, settings)


def _sampled(wrapped: nn.Module, network: Network, model: nn.Module, batch: Batch, settings: Settings) -> Step:
    optimizer = DPOptimizer(settings.sgd(wrapped), **settings.private(batch))
    return _private(network, model, wrapped, optimizer, batch, settings)


def _ghost(network: Network, model: nn.Module, batch: Batch, settings: Settings) -> Step:
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=settings.clip)
    optimizer = DPOptimizerFastGradientClipping(settings.sgd(wrapped), **settings.private(batch))
    loss = DPLossFastGradientClipping(wrapped, optimizer, network.loss())
    return _private(network, model, wrapped, optimizer, batch, settings, loss)


def _private(
    network: Network,
    model: nn.Module,
    called: nn.Module,
    optimizer: DPOptimizer,
    batch: Batch,
    settings: Settings,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Step:
    """The loop is Opacus' own contract in every private mode; all but the last physical batch skip noise and step."""
    measure = network.loss() if loss is None else loss

    def take() -> None:
        for left in reversed(range(settings.batches)):
            optimizer.signal_skip_step(left > 0)
            optimizer.zero_grad()
            measure(called(batch.x), batch.y).backward()
            optimizer.step()

    return Step(model, optimizer, take)


@dataclass(frozen=True)
class Mode:
    """One way to train. `by_opacus`: it may need the network rewritten, and is what ours is compared with."""

    name: str
    title: str
    build: Callable[[Network, nn.Module, Batch, Settings], Step]
    by_opacus: bool = False
    noise: float = 1.0


MODES = {
    mode.name: mode
    for mode in (
        Mode("sgd", "plain SGD", _plain),
        Mode("ours", "wardround", _ours),
        Mode("ours-noiseless", "wardround without noise", _ours, noise=0.0),
        Mode("hooks", "Opacus hooks", _hooks, by_opacus=True),
        Mode("functorch", "Opacus functorch", _functorch, by_opacus=True),
        Mode("ew", "Opacus expanded weights", _expanded, by_opacus=True),
        Mode("ghost", "Opacus ghost", _ghost, by_opacus=True),
    )
}


def make(
    network: Network,
    mode: str,
    batch: Batch,
    *,
    batches: int = 1,
    model: nn.Module | None = None,
    settings: Settings | None = None,
) -> Step:
    """A step of `network` that trains on `batch` in the way `mode`.

    Args:
        network: which network.
        mode: a name of `MODES`.
        batch: one physical batch; used for all of them.
        batches: physical batches in the logical one.
        model: the network to train, which is changed; by default one as it is, not rewritten for Opacus.
        settings: instead of noise 1, clip norm 1 and `batches`.

    Raises:
        Exception: whatever the mode raises on a network it does not support, here or at the first step.
    """
    chosen = MODES[mode]
    settings = settings or Settings(noise=chosen.noise, batches=batches)
    trained = network.model() if model is None else model
    return chosen.build(network, trained.to(batch.x.device).train(), batch, settings)


@lru_cache(maxsize=1)
def expected(network: Network, size: int) -> tuple[float, dict[str, Tensor]]:
    """A clip norm that touches about half of `size` records, and the sum over records of min(1, clip norm / |g|) g.

    Each record is differentiated alone, by plain autograd in float64 (Abadi et al. 2016, https://arxiv.org/abs/1607.00133).
    """
    batch, model, loss = network.batch(size).to("cpu", floating=torch.float64), network.model().double(), network.loss()
    names, weights = zip(*model.named_parameters(), strict=True)

    def alone(record: int) -> tuple[Tensor, ...]:
        at = slice(record, record + 1)
        return torch.autograd.grad(loss(model(batch.x[at]), batch.y[at]), weights)

    lengths = [_length(alone(record)) for record in range(size)]  # differentiated twice: all at once would not fit
    clip = statistics.median(lengths)
    total = [torch.zeros_like(w) for w in weights]
    for record, length in enumerate(lengths):
        for into, g in zip(total, alone(record), strict=True):
            into.add_(g, alpha=min(1.0, clip / length))
    return clip, dict(zip(names, total, strict=True))


def difference(
    network: Network,
    mode: str,
    *,
    size: int | None = None,
    dtype: torch.dtype = torch.float32,
    rewritten: bool = False,
    batches: int = 1,
    device: str = "cpu",
) -> float:
    """How far the clipped sum of a noiseless private step is from the one it should be, relative to its length.

    Args:
        network: which network.
        mode: a private name of `MODES`.
        size: records in the batch; by default as many as are timed.
        dtype: of weights and records.
        rewritten: train the network rewritten for Opacus.
        batches: physical batches in the step.
        device: where to train.

    Raises:
        Exception: whatever the mode raises.
    """
    size = size or network.batch_size
    clip, wanted = expected(network, size)
    model = (network.for_opacus() if rewritten else network.model()).to(dtype)
    before = {name: w.to(torch.float64, copy=True) for name, w in model.state_dict().items()}
    settings = Settings(noise=0.0, clip=clip, learning_rate=1.0, batches=batches)
    make(network, mode, network.batch(size).to(device, floating=dtype), model=model, settings=settings)()
    after = {name: w.to("cpu", torch.float64) for name, w in model.state_dict().items()}
    off = [size * (before[name] - after[name]) - w for name, w in wanted.items()]  # the step is the sum over `size`
    return _length(off) / _length(wanted.values())


def _length(gradient: Iterable[Tensor]) -> float:
    return float(torch.stack([g.norm() for g in gradient]).norm())
