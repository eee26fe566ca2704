"""Private gradients: secret coins, per-patient clipping, noise. Usable without the rest of wardround.

    draw(patient, ...)  ->  clipped_sum(...)  ->  add_noise(...)  ->  divide by public constants

`client/training/supervised.py` puts these together for a study; `PatientOptimizer` does for a training loop of your own.
"""

from typing import TYPE_CHECKING, Any

from wardround.client.dp.chance import secret_chance
from wardround.client.dp.clipping import clipped_sum
from wardround.client.dp.coins import Coins, OsCoins, SeededCoins
from wardround.client.dp.noise import add_noise
from wardround.client.dp.preflight import preflight, refuse_coupled, refuse_entangled
from wardround.client.dp.sampling import draw
from wardround.client.dp.taps import Untappable

if TYPE_CHECKING:
    from wardround.client.dp.distributed import DistributedPatientOptimizer
    from wardround.client.dp.optimizer import PatientOptimizer

__all__ = [
    "Coins",
    "DistributedPatientOptimizer",
    "OsCoins",
    "PatientOptimizer",
    "SeededCoins",
    "Untappable",
    "add_noise",
    "clipped_sum",
    "draw",
    "preflight",
    "refuse_coupled",
    "refuse_entangled",
    "secret_chance",
]


def __getattr__(name: str) -> Any:
    if name == "PatientOptimizer":  # on demand: importing Opacus takes seconds, and a site does without it
        from wardround.client.dp.optimizer import PatientOptimizer

        return PatientOptimizer
    if name == "DistributedPatientOptimizer":
        from wardround.client.dp.distributed import DistributedPatientOptimizer

        return DistributedPatientOptimizer
    raise AttributeError(name)
