"""The private engine for anybody's training loop, inside Opacus' own contract."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from torch.utils import _pytree

from wardround.client.dp import proof
from wardround.client.dp.coins import Coins, OsCoins
from wardround.client.dp.engine import MANY, factors, sum_clipped
from wardround.client.dp.noise import add_noise
from wardround.client.dp.pieces import whole_patients
from wardround.client.dp.preflight import refuse_coupled, refuse_entangled
from wardround.client.dp.taps import Groups, Taps, Untappable
from wardround.client.dp.taps.bare import BareTap
from wardround.common.tasks import Records

_COMPILED = "compiled, and the taps would cut its graph at every layer; hand in the module itself"
_WRAPPERS = {
    torch.jit.ScriptModule: "scripted, so its layers cannot be tapped",
    DistributedDataParallel: "wrapped; hand in its `.module`, see DistributedPatientOptimizer",
    FullyShardedDataParallel: "sharded, which is not covered; a device holds all weights",
    DataParallel: "wrapped in DataParallel; use a process for each device, see DistributedPatientOptimizer",
}

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
BatchLoss = Callable[[Any, Tensor], Tensor]


class PatientOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' `DPOptimizer` with wardround's gradients: one pass, clipping by patient, noise of the operating system.

    Steps, hooks, accountants and `BatchMemoryManager` work as with Opacus, and the history is the same. The model is plain
    torch: it is tapped in place, so `model(x)` and `loss.backward()` are all there is to do; names in its state dict stay.

        optimizer = PatientOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, noise_multiplier=1.0,
                                     max_grad_norm=1.0, expected_batch_size=64)
        optimizer.check(x[:1], y[:1], loss)         # proves on made-up records that one pass is exact
        for drawn in batches:                       # indices of whole patients, drawn by Poisson sampling; may be empty
            for part in optimizer.parts(patient[drawn], at_most=32):
                rows = drawn[part]
                if len(rows):
                    loss(model(x[rows]), y[rows]).backward()
                optimizer.step()

    Without `parts` the loop is Opacus' own: `zero_grad`, `patients` where a patient may have several records, forward and
    backward of one physical batch, `step`. A step that raises leaves no sum behind, and neither does a loop that was left.

    Args:
        optimizer: a torch optimizer over parameters of `model`.
        model: the network, not wrapped; every parameter that learns must belong to `optimizer`.
        noise_multiplier: standard deviation of the noise in units of `max_grad_norm`.
        max_grad_norm: bound on the joint L2 norm of one patient's mean gradient.
        expected_batch_size: sampling rate times patients, a public constant; what the sum is divided by.
        loss_reduction: how the loss puts the records of one physical batch together, "mean" or "sum".
        coins: a source of noise other than the operating system's; from code only, for tests.

    Raises:
        Untappable: a layer is tied or has a forward of its own making; with its name.
        PlanRefused: a layer mixes the records of a batch; with its name.
        ValueError: the model is wrapped, a parameter that learns is not the optimizer's, or the other way round, or is
            neither float32 nor float64.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        model: nn.Module,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: int | float | None,
        loss_reduction: str = "mean",
        coins: Coins | None = None,
    ) -> None:
        _refuse_wrapped(model)
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
        )
        self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        if {id(p) for p in self.params} != self._names.keys():
            raise ValueError("the optimizer's parameters are not those of the model that learn")
        for p in self.params:
            if isinstance(p, DTensor) or p.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{self._names[id(p)]} is no plain float32 or float64 tensor; for bfloat16 use autocast")
        self._taps = Taps.on(model)
        refuse_coupled(model)
        self._model = model
        self._coins = coins
        self._watch = _Watch(self._taps)
        self._hooks = [
            model.register_forward_pre_hook(self._watch.before, with_kwargs=True),
            model.register_forward_hook(self._watch.after, always_call=True),
        ]
        self._taps.install()
        self._copied = [name for name, layer in model.named_modules() if _is_copied(layer)]
        self._whose: Tensor | None = None  # patients' ids, one for each record of the coming physical batch
        self._by_patient = False  # whether ids were ever given; they are wanted from then on
        self._met: list[Tensor] = []  # ids in the logical batch so far
        self._summed = 0  # patients in the logical batch so far
        self._sampler: object = None

    # --- before training ------------------------------------------------------------------------------------------------

    def check(self, inputs: Inputs, label: Tensor, loss: BatchLoss) -> None:
        """Prove, in float64 and on made-up records, that one pass gives the gradients of plain autograd record by record.

        Names what neither a layer's type nor a training run shows: a network or a loss in which the records of a batch see
        each other, records that are not the first dimension. Without it, only networks of known layers are trained.

        Args:
            inputs: what the model is called with, a tensor, several, or several by name; the records in front. Only shapes
                and types are looked at, and whole numbers are taken to be 0 or 1.
            label: what the loss is called with, the records in front; made-up ones are 0 or 1, or floats between.
            loss: (the model's output, labels) -> one number, reduced over the records as `loss_reduction` says.

        Raises:
            PlanRefused: the network lets records see each other, or remembers them.
            Untappable: with the first parameter whose gradient differs, or torch's own complaint.
        """
        parameters = inspect.signature(self._model.forward)
        if isinstance(inputs, Mapping):
            fields = dict(inputs)
        else:
            fields = parameters.bind(*([inputs] if isinstance(inputs, Tensor) else inputs)).arguments
        if not all(isinstance(x, Tensor) and x.dim() and len(x) == len(label) for x in fields.values()):
            raise Untappable("not every input is one tensor with as many records in front as there are labels")

        def each(output: Any, label: Tensor) -> Tensor:
            value = loss(output, label)
            if value.dim():
                raise Untappable(f"the loss gives a tensor of shape {list(value.shape)}, not one number")
            return (value if self.loss_reduction == "mean" else value / len(label)).expand(len(label))

        like = Records(fields, label, torch.zeros(len(label), dtype=torch.int64, device=label.device))
        with self.paused():
            refuse_entangled(self._model, _sum_of_outputs, like)
            proof.exact(self._model, each, like)
        self._copied = []
        self._watch.proved = True

    # --- a batch --------------------------------------------------------------------------------------------------------

    def parts(self, patient: Tensor, *, at_most: int) -> Iterator[Tensor]:
        """One logical batch in physical ones of whole patients: indices into `patient`; an empty batch is one empty part.

        Gradients are forgotten and `patients` is called before each part, so all there is to do is backward and `step`.
        What is unfinished when the loop is left is thrown away.

        Args:
            patient: (records,) int64, whose the records of the logical batch are, in any order.
            at_most: records in one part.

        Raises:
            ValueError: a patient has more than `at_most` records.
            RuntimeError: a part was not followed by `step`.
        """
        if self._unfinished:
            self.discard()
        cut = whole_patients(patient, at_most=at_most, together=at_most)
        try:
            for number, part in enumerate(cut):
                self.signal_skip_step(number + 1 < len(cut))
                self.zero_grad()
                self.patients(patient[part])
                yield part
                if self._step_skip_queue:
                    raise RuntimeError("a part of a batch was not followed by step()")
        finally:
            if self._unfinished:
                self.discard()

    def patients(self, patient: Tensor) -> None:
        """Whose the records of the coming physical batch are: (records,), equal numbers for the records of one patient.

        To be called before `backward`; good until `step`. A patient's records stand next to each other in one physical
        batch and in no other of the same step; `step` refuses a patient that was cut in two. Once called, it is wanted for
        every batch that has records.

        Raises:
            ValueError: records of one patient do not stand next to each other, or the model was called with another number
                of records.
        """
        self._by_patient = True
        if not len(patient):
            return
        patient = patient.to(self.params[0].device)
        met, number = torch.unique_consecutive(patient, return_inverse=True)
        if len(torch.unique(met)) != len(met):
            raise ValueError("the records of one patient do not stand next to each other")
        self._watch.said = None
        self._watch.agree(len(patient))
        self._watch.said = len(patient)
        self._whose = patient
        self._taps.group(Groups.of(number))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, layers are plain: for a generator's step through this critic, or a loss on public data.

        What a backward pass within leaves on the model's parameters is dropped at the end.

        Raises:
            RuntimeError: a backward pass still waits for its `step`.
        """
        if not self._watch.on:
            yield
            return
        if self._taps.used:
            raise RuntimeError("a backward pass waits for step(); pause before it or after")
        self._forget()
        before = [p.grad for p in self.params]
        self._watch.on = False
        self._taps.remove()
        for p in self.params:
            p.grad = None
        try:
            yield
        finally:
            for p, g in zip(self.params, before, strict=True):
                p.grad = g
            self._taps.install()
            self._watch.on = True

    # --- Opacus' contract -----------------------------------------------------------------------------------------------

    @property
    def accumulated_iterations(self) -> int:
        """One: what the layers keep belongs to one physical batch."""
        return 1

    @property
    def grad_samples(self) -> list[Tensor]:
        """Not there: no gradient of a single record is held on a parameter. Opacus only asks whether the list is empty."""
        return list(self.params)

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """See Opacus. A sampler that starts anew drops what an earlier one left unfinished: that loop was left."""
        caller = sys._getframe(1)
        if caller.f_code.co_flags & inspect.CO_GENERATOR:  # BatchMemoryManager's sampler, one frame for each of its loops
            if caller is not self._sampler and self._unfinished:
                self.discard()
            self._sampler = caller
        super().signal_skip_step(do_skip)

    @torch.no_grad()
    def clip_and_accumulate(self) -> None:
        """Add the clipped sum of the physical batch to `summed_grad`; nothing where the batch was empty.

        Raises:
            Untappable: a layer was used twice or not at all, or is not known and `check` was not called; with its name.
            RuntimeError: a weight was used outside of its layer, records were not counted or not back-propagated.
            ValueError: `zero_grad` was not called, or a patient was cut in two.
        """
        try:
            self._refuse_stray()
            if self._watch.records or self._taps.used:
                self._accumulate()
            for p in self.params:
                if p.summed_grad is None:
                    p.summed_grad = torch.zeros_like(p)
        finally:
            self._forget()

    @torch.no_grad()
    def add_noise(self) -> None:
        """Turn `summed_grad` into a noised `grad`; the sum itself is not kept."""
        coins = self._coins or OsCoins()
        for p in self.params:
            total, p.summed_grad = p.summed_grad, None
            self._leave(p, self._noised(total, coins))
        self._met, self._summed = [], 0

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Forget gradients, what layers kept, and, outside of a logical batch, what was summed. Always sets to None."""
        whose = self._whose
        self._forget()
        if whose is not None:
            self.patients(whose)
        if not self._is_last_step_skipped:
            self._drop_sums()
        self.original_optimizer.zero_grad(True)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step, or none where a further physical batch belongs to it; see Opacus. What it raises ends the batch."""
        try:
            return super().step(closure)
        except BaseException:
            self.discard()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch; ends an unfinished logical batch."""
        self.discard()
        super().load_state_dict(state_dict)

    def discard(self) -> None:
        """Throw away a logical batch that will not be finished: sums without noise must not lie about."""
        self._forget()
        self._step_skip_queue.clear()
        self._is_last_step_skipped = False
        self._drop_sums()
        for p in self.params:
            p.grad = None

    def detach(self) -> None:
        """Give the model its own layers back; the optimizer is of no more use."""
        self.discard()
        self._taps.remove()
        for hook in self._hooks:
            hook.remove()

    # --- within ---------------------------------------------------------------------------------------------------------

    @property
    def _unfinished(self) -> bool:
        return bool(self._step_skip_queue) or self._is_last_step_skipped

    def _forget(self) -> None:
        self._taps.clear()
        self._watch.records = self._watch.said = None
        self._whose = None

    def _drop_sums(self) -> None:
        self._met, self._summed = [], 0
        for p in self.params:
            p.summed_grad = None

    def _refuse_stray(self) -> None:
        for p in self.params:
            if p.grad is None:
                continue
            if hasattr(p.grad, "_processed"):
                raise ValueError("gradients of the last step are still there; call zero_grad() before each backward pass")
            if self._watch.records != 0:
                raise RuntimeError(f"{self._names[id(p)]} was used outside of its layer; its gradient is not covered")
            p.grad = None  # of an empty batch, which went past the taps

    def _accumulate(self) -> None:
        if self._copied:
            raise Untappable(f"layer {self._copied[0]} is not among the known ones; prove it by check() before training")
        if not self._taps.used:
            raise RuntimeError("records went through the model and no gradient came back; call backward() before step()")
        if self._watch.records is None:
            raise RuntimeError("the records were not counted: call the model itself, not its parts, or say patients()")
        if self._by_patient and self._whose is None:
            raise RuntimeError("patients() was called before, and not for this batch")
        if self._whose is not None:
            met = torch.unique(self._whose)
            if any(bool(torch.isin(met, before).any()) for before in self._met):
                raise ValueError("a patient was cut in two physical batches, and would be clipped twice; see parts()")
            self._met.append(met)
        squares = self._taps.squares()
        records = self._taps.records if self.loss_reduction == "mean" else 1  # a mean's gradients are that much smaller
        squares = squares * records**2
        factor = factors(squares, clip_norm=self.max_grad_norm, dtype=self.params[0].dtype) * records
        self._summed += len(squares)
        sums = sum_clipped(self._taps, squares, factor)
        for p in self.params:
            part = sums[self._names[id(p)]]
            before = p.summed_grad
            if self._summed > MANY:
                part, before = part.double(), None if before is None else before.double()
            p.summed_grad = part if before is None else before.add_(part)

    def _noised(self, total: Tensor, coins: Coins) -> Tensor:
        deviation = self.noise_multiplier * self.max_grad_norm
        return add_noise(total.contiguous(), deviation=deviation, coins=coins) if deviation else total

    @staticmethod
    def _leave(p: Tensor, noised: Tensor) -> None:
        p.grad = noised.to(p.dtype).view_as(p)
        p.grad._processed = True  # type: ignore[attr-defined]


class _Watch:
    """Counts records where they enter the model, and lets an empty batch past the taps. Copied along with a model."""

    def __init__(self, taps: Taps) -> None:
        self.taps = taps
        self.records: int | None = None  # that the model was called with
        self.said: int | None = None  # that patients() named the patients of
        self.on = True
        self.proved = False

    def agree(self, records: int) -> None:
        """One number of records between two steps, and the one that was said."""
        for known in (self.records, self.said):
            if known not in (None, records):
                raise ValueError(
                    f"{known} and {records} records in one pass; call zero_grad() first, and evaluate under no_grad()"
                )

    def before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not (self.on and torch.is_grad_enabled()):
            return
        counts = [count for leaf in _leaves((args, kwargs)) if (count := _rows(leaf)) is not None]
        if not counts:
            raise ValueError("no batch of tensors reaches the model")
        self.agree(counts[0])
        self.records = counts[0]
        if not self.records:
            self.taps.remove()
        elif self.said is None:
            device = next(p.device for p in model.parameters())
            self.taps.group(Groups.alone(self.records, device))

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        if not (self.on and torch.is_grad_enabled()) or self.records is None:
            return
        if not self.records:
            self.taps.install()
            return
        counts = [count for leaf in _leaves(output) if (count := _rows(leaf)) is not None]
        if counts and counts[0] != self.records and not self.proved:
            raise ValueError(f"{self.records} records became {counts[0]} outputs; if records come first, prove it by check()")


def _leaves(values: Any) -> list[Any]:
    return _pytree.tree_leaves(values, is_leaf=lambda v: isinstance(v, PackedSequence))


def _rows(leaf: Any) -> int | None:
    if isinstance(leaf, PackedSequence):
        return int(leaf.batch_sizes[0])
    return len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None


def _sum_of_outputs(output: Any, label: Tensor) -> Tensor:
    """Stands in for a loss of each record where only the network is looked at."""
    tensors = [leaf for leaf in _leaves(output) if isinstance(leaf, Tensor) and len(leaf) == len(label)]
    return torch.stack([leaf.flatten(1).double().sum(1) for leaf in tensors]).sum(0)


def _is_copied(layer: nn.Module) -> bool:
    return isinstance(getattr(layer.__dict__.get("forward"), "__self__", None), BareTap)


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for kind, why in _WRAPPERS.items():
            if isinstance(module, kind):
                raise ValueError(f"{f'layer {name}' if name else 'the model'} is {why}")
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{f'layer {name}' if name else 'the model'} is {_COMPILED}")
