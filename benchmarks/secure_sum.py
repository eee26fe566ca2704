"""What a secure sum costs, beside Flower's SecAgg+ in the same run: `python -m benchmarks.secure_sum [--n 4,10,32]`.

Processor time of one thread. A client's time is all five steps of one site, a server's is taking the masks off the sum, with
one site that vanished after it had dealt its shares; of each the best of the repetitions, who take turns, since whatever else
runs on a machine slows both. Mask expansion is measured beside `openssl speed`, which counts processor time too. Nothing here
counts what it takes to move the bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks import flower_secagg
from wardround.common.secure_sum.coordinator import CoordinatorSum
from wardround.common.secure_sum.masks import BLOCK, Mask, add_masks
from wardround.common.secure_sum.occasion import Occasion, SumPlan
from wardround.common.secure_sum.site import SiteRules, SiteSum
from wardround.common.secure_sum.turns import Turns
from wardround.common.trust.certificates import Authority, Subject
from wardround.common.trust.signing import Signed, Signer, verify

SIZE = 11_700_000  # parameters: a ResNet-18
SITES = (4, 10, 32)
EXPANSION, FASTER, UPLOAD, PEAK, ERROR = 0.8, 6.0, 1.001, 3.0, 1e-7  # targets
MODEL = "ab" * 32
_MASKS = 8  # streams of one measurement


@dataclass(frozen=True)
class Row:
    """One number of sites; seconds."""

    sites: int
    client: float
    flower_client: float
    unmask: float
    flower_unmask: float
    upload: float  # bytes for each byte of float32
    flower_upload: float
    peak: float  # of the server, in vectors of float32
    error: float  # at most, of the clip

    @property
    def line(self) -> str:
        """As it is printed."""
        both = f"{self.client:8.3f} {self.flower_client:8.3f} {self.flower_client / self.client:6.1f}x"
        server = f"{self.unmask:8.3f} {self.flower_unmask:8.3f} {self.flower_unmask / self.unmask:6.1f}x"
        return f"{self.sites:5} {both} {server} {self.upload:7.2f} {self.flower_upload:7.2f} {self.peak:6.2f} {self.error:9.1e}"


HEADER = (
    f"{'sites':>5} {'client':>8} {'flower':>8} {'':7} {'unmask':>8} {'flower':>8} {'':7} "
    f"{'upload':>7} {'flower':>7} {'peak':>6} {'error':>9}"
)


class Cohort:
    """Sites with keys, and the certificates that verify what they sign."""

    def __init__(self, count: int) -> None:
        self.plan = SumPlan({f"h{number:03}": 1 / count for number in range(count)}, 1.0, 30, SIZE)
        now, authority = datetime.now(UTC), Authority.found("benchmark", datetime.now(UTC))
        self.signers = {name: Signer(name, Ed25519PrivateKey.generate()) for name in self.plan.weights}
        self._certificates = {
            name: authority.issue(signer._key.public_key(), Subject(name, "sign"), now) for name, signer in self.signers.items()
        }

    def check(self, signed: Signed) -> None:
        """What a roster does."""
        verify(signed, self._certificates[signed.signer])


class Sum:
    """One sum among a cohort, of which the first site vanishes after it has dealt its shares."""

    def __init__(self, cohort: Cohort, folder: Path) -> None:
        occasion = Occasion("5e" * 32, "benchmark", 1, 1)
        self.server = CoordinatorSum(cohort.plan, occasion, check=cohort.check)
        self.sites = {
            name: SiteSum(cohort.plan, occasion, signer, check=cohort.check, turns=Turns(folder / name), rules=SiteRules())
            for name, signer in cohort.signers.items()
        }
        self.alive, self.spent = list(self.sites)[1:], dict.fromkeys(self.sites, 0.0)

    def timed(self, name: str, step: Callable[[SiteSum], Any]) -> Any:
        """What a site answers; its time is added to what it has spent."""
        began = time.process_time()
        found = step(self.sites[name])
        self.spent[name] += time.process_time() - began
        return found

    def begin(self) -> None:
        """Keys and shares."""
        for name in self.sites:
            self.server.take_advert(self.timed(name, SiteSum.advert))
        adverts = self.server.adverts()
        for name in self.sites:
            self.server.take_dealt(self.timed(name, lambda site: site.deal(adverts)))
        self.server.cohort(MODEL)

    def masked(self, name: str, update: np.ndarray) -> tuple[Signed, np.ndarray]:
        """A site's vector."""
        found: tuple[Signed, np.ndarray] = self.timed(name, lambda site: site.mask(self.server.inbox(name), update, MODEL))
        return found

    def finish(self) -> None:
        """Agreements and reveals."""
        asked = self.server.survivors()
        for name in self.alive:
            self.server.take_agreed(self.timed(name, lambda site: site.agree(asked.names, asked.dropped, asked.masked)))
        agreements = self.server.agreements()
        for name in self.alive:
            self.server.take_revealed(self.timed(name, lambda site: site.reveal(agreements)))


def ours(cohort: Cohort, update: np.ndarray) -> tuple[float, float, float, float]:
    """Seconds of a site and of the unmasking, the largest error, and bytes uploaded for each of float32."""
    with tempfile.TemporaryDirectory() as folder:
        found, upload = Sum(cohort, Path(folder)), 0.0
        found.begin()
        for name in found.alive:
            signed, vector = found.masked(name, update)
            upload = (vector.nbytes + len(signed.text())) / update.nbytes
            found.server.take_masked(signed, vector)
        found.finish()
    began = time.process_time()
    result = found.server.result(np.float32)
    unmask = time.process_time() - began
    error = np.abs(result - found.server.weight * update.astype(np.float64)).max()
    return min(found.spent[name] for name in found.alive), unmask, float(error), upload


def peak(cohort: Cohort, update: np.ndarray) -> float:
    """The most memory the server needs at once, in vectors of float32: what comes in, the sum, the result."""
    with tempfile.TemporaryDirectory() as folder:
        found = Sum(cohort, Path(folder))
        found.begin()
        masked = [found.masked(name, update) for name in found.alive]
        tracemalloc.start()  # from here, so that the sites' memory is not counted; the sum itself is there already
        for signed, vector in masked:
            found.server.take_masked(signed, vector.copy())
        found.finish()
        found.server.result(np.float32)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return 1 + highest / update.nbytes


def measured(count: int, update: np.ndarray, repetitions: int) -> Row:
    """One line of the table."""
    cohort = Cohort(count)
    threshold = cohort.plan.threshold
    mine, theirs, unmasking = [], [], []
    for _ in range(repetitions):
        mine.append(ours(cohort, update))
        theirs.append(flower_secagg.client(update, count, threshold))
        unmasking.append(flower_secagg.unmask(SIZE, count, threshold))
    return Row(
        sites=count, client=min(row[0] for row in mine), flower_client=min(row[0] for row in theirs),
        unmask=min(row[1] for row in mine), flower_unmask=min(unmasking),
        upload=mine[0][3], flower_upload=theirs[0][1] / update.nbytes,
        peak=peak(cohort, update), error=max(row[2] for row in mine),
    )  # fmt: skip


def expansion(repetitions: int) -> tuple[float, float | None]:
    """Gigabytes a second of masks put on a vector, and of the bare cipher by `openssl speed`, None where that is not there."""
    vector, masks = np.zeros(SIZE, np.uint32), [Mask(os.urandom(32), (-1) ** number) for number in range(_MASKS)]
    mine, bare = [], []
    for _ in range(repetitions):
        began = time.process_time()
        add_masks(vector, masks)
        mine.append(_MASKS * vector.nbytes / (time.process_time() - began) / 1e9)
        bare.append(_openssl())
    return max(mine), None if None in bare else max(rate for rate in bare if rate)


def _openssl() -> float | None:
    command = ["openssl", "speed", "-seconds", "1", "-bytes", str(BLOCK), "-evp", "aes-256-ctr"]
    if shutil.which(command[0]) is None:
        return None
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(re.findall(r"([0-9.]+)k", text)[-1]) * 1000 / 1e9


def misses(rows: list[Row], mine: float, bare: float | None) -> list[str]:
    """Every target that was not met, in words."""
    found = []
    if bare is not None and mine < EXPANSION * bare:
        found.append(f"mask expansion: {mine / bare:.2f} x openssl speed, wanted {EXPANSION:.2f}")
    for row in rows:
        for what, got, wanted in (("client", row.flower_client / row.client, FASTER),
                                  ("unmasking", row.flower_unmask / row.unmask, FASTER)):  # fmt: skip
            if got < wanted:
                found.append(f"{row.sites} sites: {what} {got:.1f} x faster than SecAgg+, wanted {wanted:.1f}")
        for what, got, wanted in (
            ("upload", row.upload, UPLOAD),
            ("server's peak", row.peak, PEAK),
            ("error", row.error, ERROR),
        ):
            if got > wanted:
                found.append(f"{row.sites} sites: {what} {got:.3g}, wanted at most {wanted:.3g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.secure_sum", description=__doc__)
    parser.add_argument("--n", default=",".join(map(str, SITES)), help="numbers of sites")
    parser.add_argument("--reps", type=int, default=3, help="repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file as well")
    asked = parser.parse_args()
    print(f"{os.cpu_count()} cores, one used; {SIZE:,} parameters")
    mine, bare = expansion(asked.reps)
    beside = "openssl is not there to compare with" if bare is None else f"openssl speed {bare:.2f}, ratio {mine / bare:.2f}"
    print(f"mask expansion {mine:.2f} GB/s; {beside}\n\n{HEADER}", flush=True)
    update, rows = np.random.default_rng(1).uniform(-1, 1, SIZE).astype(np.float32), []
    for count in map(int, asked.n.split(",")):
        rows.append(measured(count, update, asked.reps))
        print(rows[-1].line, flush=True)
    missed = misses(rows, mine, bare)
    print("\n" + ("\n".join(f"missed: {line}" for line in missed) or "every target is met"))
    if asked.json:
        table = {"cores": os.cpu_count(), "repetitions": asked.reps, "expansion": mine, "openssl": bare}
        asked.json.write_text(json.dumps({**table, "rows": [asdict(row) for row in rows], "missed": missed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
