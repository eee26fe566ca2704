"""How one network's private gradients are taken. Decided once, on made-up records and weights, before a patient is read.

    Engine.on(model, loss, like)    taps where they are proved exact; else record by record
      engine.clipped_sum(...)       pieces -> lengths -> factors -> sums

Nothing of a patient or of the coordinator's model enters the decision, so which way is taken tells nobody anything.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from wardround.client.dp import proof
from wardround.client.dp.alone import mean_gradients, squared_length
from wardround.client.dp.pieces import Piece, pieces
from wardround.client.dp.sizes import Sizes
from wardround.client.dp.taps import Groups, Taps, Untappable
from wardround.common.tasks import Records
from wardround.common.tasks.base import Loss

_log = logging.getLogger(__name__)

MANY = 256  # patients in one sum from which it is kept in float64: float32 would eat a tenth of the headroom
_FAINTEST = 2.0**-100  # a factor below it is zero: float32 could no longer multiply by it without rounding upwards

Sums = dict[str, Tensor]


def headroom(dtype: torch.dtype) -> float:
    """The part of the clip norm left free for the rounding of sums, so that no rounding steps over the norm."""
    return 1e-9 if dtype == torch.float64 else 2.0**-10


def factors(squares: Tensor, *, clip_norm: float, dtype: torch.dtype) -> Tensor:
    """min(1, clip norm / length) for each patient, a hair smaller; zero where a length is not finite. (patients,) float64."""
    factor = (clip_norm * (1 - headroom(dtype)) / squares.sqrt()).clamp(max=1.0)
    return torch.where(squares.isfinite() & (factor > _FAINTEST), factor, 0.0)


def sum_clipped(taps: Taps, squares: Tensor, factor: Tensor) -> Sums:
    """The clipped sums after a pass; patients whose length is not finite are blanked first."""
    unusable = ~squares.isfinite()
    if unusable.any():
        taps.blank(unusable)
    return taps.clipped(factor)


class Engine:
    """The way of one network, loss and shape of records."""

    def __init__(self, model: nn.Module, loss: Loss, taps: Taps | None, sizes: Sizes | None) -> None:
        self._model, self._loss, self._taps = model, loss, taps
        self._sizes = sizes

    @classmethod
    def on(cls, model: nn.Module, loss: Loss, like: Records) -> Engine:
        """The engine for records shaped as `like` (any number, values are not looked at) on their device."""
        try:
            taps = Taps.on(model, public_shapes=True)
            proof.exact(model, loss, like, public_shapes=True)
            return cls(model, loss, taps, Sizes.of(model, loss, like))
        except Untappable as why:
            _log.info("gradients are taken record by record: %s", why)
            return cls(model, loss, None, None)

    @property
    def in_one_pass(self) -> bool:
        """Whether one pass gives all gradients of a piece."""
        return self._taps is not None

    @property
    def sizes(self) -> Sizes:
        """How many records are computed at once; one where they are taken record by record."""
        return self._sizes or Sizes.single()

    def clipped_sum(
        self, weights: Mapping[str, Tensor], batch: Records, *, clip_norm: float, records_per_patient: int | None
    ) -> Sums:
        """See `clipped_sum` of this package."""
        while self._taps is not None and self._sizes is not None:
            at_most = records_per_patient or self._sizes.largest
            sizes = self._sizes.at_least(at_most)
            if sizes is None:  # no size so large gives the same bits at every place of a piece
                break
            try:
                return self._together(self._taps, weights, batch, clip_norm, sizes, at_most)
            except torch.OutOfMemoryError:
                # the shape decides how much memory is wanted, nobody's values; what was summed so far is thrown away
                self._sizes = self._sizes.halved()
                _log.info("not enough memory on the device; now %d records at once", self.sizes.largest)
        return self._alone(weights, batch, clip_norm)

    def _together(
        self, taps: Taps, weights: Mapping[str, Tensor], batch: Records, clip_norm: float, sizes: Sizes, at_most: int
    ) -> Sums:
        wide = batch.patients > MANY
        total: Sums = {}
        for piece in pieces(batch, sizes, at_most=at_most):
            found = self._piece(taps, weights, piece, clip_norm)
            for name, part in found.items():
                if name in total:
                    total[name] += part
                else:
                    total[name] = part.double() if wide else part
        return {name: total[name] if name in total else torch.zeros_like(w) for name, w in weights.items()}

    def _piece(self, taps: Taps, weights: Mapping[str, Tensor], piece: Piece, clip_norm: float) -> Sums:
        records = piece.records
        dtype = next(iter(weights.values())).dtype
        with taps.installed(Groups.of(records.patient)):
            fixed = {name: w.detach() for name, w in weights.items()}
            losses = self._loss(
                torch.func.functional_call(self._model, fixed, args=(), kwargs=dict(records.fields)), records.label
            )
            torch.autograd.backward(losses.sum())
            with torch.no_grad():
                squares = taps.squares()
                factor = factors(squares, clip_norm=clip_norm, dtype=dtype)
                return sum_clipped(taps, squares, torch.where(piece.counts, factor, 0.0))

    def _alone(self, weights: Mapping[str, Tensor], batch: Records, clip_norm: float) -> Sums:
        total = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
        order = torch.argsort(batch.patient, stable=True)
        for mean in mean_gradients(self._model, self._loss, weights, batch.take(order)) if len(batch) else ():
            squares = squared_length(mean)
            factor = factors(squares, clip_norm=clip_norm, dtype=next(iter(mean.values())).dtype)
            for name, g in mean.items():
                total[name] += factor * g.double().nan_to_num(0.0, 0.0, 0.0)
        return total


_ENGINES: WeakKeyDictionary[nn.Module, dict[object, Engine]] = WeakKeyDictionary()


def kind_of(loss: Loss, like: Records) -> object:
    """What an engine was made for, apart from its network."""
    shapes = tuple((name, tuple(t.shape[1:]), t.dtype) for name, t in sorted(like.fields.items()))
    return loss, shapes, tuple(like.label.shape[1:]), like.label.dtype, like.patient.device


def engine_of(model: nn.Module, loss: Loss, like: Records) -> Engine:
    """The one engine of a network, loss and shape of records in this process."""
    known = _ENGINES.setdefault(model, {})
    key = kind_of(loss, like)
    with contextlib.suppress(KeyError):
        return known[key]
    known[key] = Engine.on(model, loss, like)
    return known[key]
