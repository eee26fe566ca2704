"""Several devices of one site: each clips its own patients, the sums are added, and one noise hides them all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from wardround.client.dp.coins import OsCoins
from wardround.client.dp.engine import MANY
from wardround.client.dp.optimizer import PatientOptimizer


class DistributedPatientOptimizer(PatientOptimizer):
    """`PatientOptimizer` for one process a device, through `torch.distributed`.

    The weights of rank 0 are everybody's at construction. At the end of a logical batch the clipped sums are added at rank
    0, which adds noise of `noise_multiplier * max_grad_norm` once and sends the result to all: every rank steps with the same
    bits. No wrapper is needed. `DistributedDataParallel` would wait for gradients that autograd never computes; who has one
    hands in its `.module` and calls it under `no_sync()`.

    Each rank draws from patients of its own, all records of a patient at one rank: `patient % world_size == rank`. Ranks may
    have different numbers of physical batches, and none at all, but each ends every logical batch by `step`.

    Where a step raises at one rank, it raises at all of them and nothing is noised. A rank that never comes to its step ends
    the others after the timeout of the process group, so give `init_process_group` one.

    Args: as for `PatientOptimizer`, and
        expected_batch_size: sampling rate times the patients of all ranks together.
        group: the ranks of this site; None for all.

    Raises:
        RuntimeError: the ranks differ in clip norm, noise, expected batch or number of weights; or another rank stopped.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, model: nn.Module, group: ProcessGroup | None = None, **terms: Any
    ) -> None:
        super().__init__(optimizer, model=model, **terms)
        self._group = group
        self._first = 0 if group is None else distributed.get_global_rank(group, 0)
        self._agree()
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                distributed.broadcast(t, src=self._first, group=group)

    def clip_and_accumulate(self) -> None:
        """See `PatientOptimizer`; what this rank raises, the others hear of."""
        try:
            super().clip_and_accumulate()
        except Exception:
            self._agree(stopped=True)
            raise

    @torch.no_grad()
    def add_noise(self) -> None:
        """Add all ranks' sums up, noise them once, and leave the result at each of them."""
        wide = self._agree() > MANY or any(p.dtype == torch.float64 for p in self.params)
        parts = [p.summed_grad.flatten().to(torch.float64 if wide else torch.float32) for p in self.params]
        self._drop_sums()
        total = torch.cat(parts)
        distributed.reduce(total, dst=self._first, group=self._group)
        if distributed.get_rank(self._group) == 0:
            total = self._noised(total, self._coins or OsCoins()).to(total.dtype)
        distributed.broadcast(total, src=self._first, group=self._group)
        for p, noised in zip(self.params, torch.split(total, [p.numel() for p in self.params]), strict=True):
            self._leave(p, noised)

    def _agree(self, *, stopped: bool = False) -> int:
        """How many patients the ranks have summed together.

        Raises:
            RuntimeError: a rank stopped, or has other constants than this one.
        """
        public = (self.noise_multiplier, self.max_grad_norm, self.expected_batch_size or 0, self.loss_reduction == "mean")
        figures = [float(one) for one in (stopped, self._summed, sum(p.numel() for p in self.params), *public)]
        mine = torch.tensor(figures, dtype=torch.float64, device=self.params[0].device)
        everyone: list[Tensor] = [torch.empty_like(mine) for _ in range(distributed.get_world_size(self._group))]
        distributed.all_gather(everyone, mine, group=self._group)
        told = torch.stack(everyone).cpu()
        if stopped:
            return 0
        if told[:, 0].any():
            raise RuntimeError(f"rank {int(told[:, 0].argmax())} stopped in its step; nothing was noised or stepped")
        if not (told[:, 2:] == told[:1, 2:]).all():
            raise RuntimeError("the ranks differ in noise, clip norm, expected batch, reduction or number of weights")
        return int(told[:, 1].sum())
