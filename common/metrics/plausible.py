"""Whether sums could be those of any records: what can be known of a tally without its records."""

from __future__ import annotations

import numpy as np

from wardround.common.metrics import classes
from wardround.common.metrics.books import Sums
from wardround.common.metrics.scores import Floats
from wardround.common.metrics.tally import Tally

_MOST = 2.0**40  # records; more is a mistake, and up to here sums of sites stay whole numbers
_SLACK = 1.01  # a probability may be a little above 1, and sums of many round
_SURPRISE = 17.0  # nats of one record: a probability is taken for no smaller one than 1e-7


def contradiction(tally: Tally) -> str:
    """Why no records have these sums; empty where nothing speaks against it. For a tally of classes with finite numbers.

    It finds mistakes and coarse lies. Sums of records that a site does not have pass.
    """
    sums = tally.sums
    if any((array < 0).any() for array in sums.values()):
        return "a sum is negative"
    if sums["unsound"].any():
        void = sums["unsound"][0] == 1 and not any(array.any() for name, array in sums.items() if name != "unsound")
        return "" if void else "a void tally holds sums"
    whole = [sums["counts"], sums["losses"][2], sums["calibration"][:, 1:], sums.get("histogram", np.zeros(0))]
    if any((array != np.floor(array)).any() for array in whole):
        return "a count is no whole number"
    records = float(sums["counts"][2].sum())
    if not 1 <= records <= _MOST:
        return "there is no record, or there are too many"
    return "" if _agree(sums, records, tally.classes) else "the sums contradict each other"


def _agree(sums: Sums, records: float, count: int) -> bool:
    hit, called, true = sums["counts"]
    sure, came_true, in_bin = sums["calibration"].T
    surprise, brier, counted = sums["losses"]
    agree = [
        _none_above(hit, np.minimum(called, true)),
        called.sum() == counted == in_bin.sum() == records,
        surprise <= _SURPRISE * records,
        brier <= 2 * _SLACK * records,
        _none_above(came_true, in_bin),
        _none_above(sure, _SLACK * in_bin),
    ]
    if "histogram" in sums:
        positive, negative = sums["histogram"].sum(axis=-1).T
        of = true[classes.ranked(count)]
        agree += [bool((positive == of).all()), bool((negative == records - of).all())]
    return all(agree)


def _none_above(array: Floats, bound: Floats) -> bool:
    return bool((array <= bound).all())
