"""Private gradients: secret coins, per-patient clipping, noise. Usable without the rest of wardround.

    draw(patient, ...)  ->  clipped_sum(...)  ->  add noise  ->  divide by public constants

`client/training/supervised.py` is the one place that puts these together.
"""

from wardround.client.dp.clipping import clipped_sum
from wardround.client.dp.coins import Coins, OsCoins, SeededCoins
from wardround.client.dp.preflight import refuse_coupled
from wardround.client.dp.sampling import draw

__all__ = ["Coins", "OsCoins", "SeededCoins", "clipped_sum", "draw", "refuse_coupled"]
