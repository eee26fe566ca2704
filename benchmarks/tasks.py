"""How good every shipped study gets, without privacy and with it: `python -m benchmarks.tasks [NAME...] [--json FILE]`.

Each study is run through `simulate`, as a user would, with three seeds; the figure is the mean over them of its headline
metric on all hospitals' held-out patients. A floor is what the study was built to reach. Takes the better part of an hour.

Some tasks are learnt without privacy in more steps than can be noised. They have a study file of their own with privacy, under
the same name with "-private" behind it; the figures with an epsilon are that file's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from wardround.common.errors import ConfigError
from wardround.common.studies import find_study
from wardround.simulations.run import simulate
from wardround.simulations.scenario import Changes, Scenario

SEEDS = (7, 8, 9)


@dataclass(frozen=True)
class Goal:
    """What a study is to reach: its headline metric without privacy, and at some epsilons."""

    plain: float | None = None
    private: tuple[tuple[float, float | None], ...] = ((8.0, None),)  # (epsilon, floor)
    private_study: str | None = None  # what runs with privacy, where it is not the study itself


GOALS = {
    "heart-disease": Goal(0.885, ((8.0, 0.88),)),
    "splice-junctions": Goal(0.93, ((8.0, 0.85),)),
    "chest-xray": Goal(0.95, ((8.0, 0.93), (3.0, 0.925))),
    "radiology-reports": Goal(0.97, ((8.0, 0.93),)),
    "icu-mortality": Goal(0.83, ((8.0, 0.78),)),
    "icu-mortality-eicu": Goal(),
    "icu-fusion": Goal(),
    "ecg-beats": Goal(0.93),
    "chest-phantom": Goal(0.95, private_study="chest-phantom-private"),
    "chest-phantom-segmentation": Goal(0.85, private_study="chest-phantom-segmentation-private"),
    "chest-phantom-detection": Goal(0.8, private_study="chest-phantom-detection-private"),
    "image-synthesis": Goal(0.85, ((8.0, 0.75),)),
    "news-topics": Goal(0.86),
    "colour-images": Goal(),
}


@dataclass(frozen=True)
class Row:
    """One study at one epsilon.

    Attributes:
        study: the file that was run.
        epsilon: None without privacy.
        values: the headline metric for each seed.
        seconds: of one run, without baselines; the median.
    """

    study: str
    metric: str
    epsilon: float | None
    floor: float | None
    values: list[float]
    seconds: float

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def met(self) -> bool:
        """Whether the floor was reached, or there is none."""
        return self.floor is None or self.mean >= self.floor


def measure(name: str, epsilon: float | None, floor: float | None, *, data: Path | None, rounds: int | None = None) -> Row:
    """Run study `name` with every seed; raises `ConfigError` where its records are not at hand."""
    values, seconds, metric = [], [], ""
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            changes = Changes(epsilon=epsilon, without_privacy=epsilon is None, seed=seed, rounds=rounds)
            scenario = Scenario.prepare(find_study(name), Path(folder) / "run", changes, data)
            began = time.perf_counter()
            report = simulate(scenario, baselines=False)
            seconds.append(time.perf_counter() - began)
        metric = report.headline
        value = report.results.federated[metric].value
        values.append(float("nan") if value is None else value)
    return Row(name, metric, epsilon, floor, values, statistics.median(seconds))


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", metavar="NAME", help=f"studies; all by default: {', '.join(GOALS)}")
    options.add_argument("--data", type=Path, help="folder of the data sets that are not embedded, as in wardround simulate")
    options.add_argument("--rounds", type=int, help="fewer rounds than the studies' own: a quick look, no floor is judged")
    options.add_argument("--json", type=Path, help="also write the figures here")
    given = options.parse_args()
    if unknown := set(given.names) - set(GOALS):
        options.error(f"no study is called {sorted(unknown)[0]}; there are: {', '.join(GOALS)}")
    console, rows = Console(), []
    for name in given.names or GOALS:
        goal = GOALS[name]
        for epsilon, floor in ((None, goal.plain), *goal.private):
            try:
                study = name if epsilon is None else goal.private_study or name
                row = measure(study, epsilon, None if given.rounds else floor, data=given.data, rounds=given.rounds)
            except ConfigError as refusal:
                console.print(f"{name}: left out: {refusal}", highlight=False)
                break
            rows.append(row)
            console.print(_line(row), highlight=False)
    console.print(_table(rows))
    if given.json:
        given.json.write_text(json.dumps([asdict(row) | {"mean": row.mean, "met": row.met} for row in rows], indent=1) + "\n")


def _line(row: Row) -> str:
    privacy = "no privacy" if row.epsilon is None else f"epsilon {row.epsilon:g}"
    return f"{row.study}, {privacy}: {row.metric} {row.mean:.3f}, {row.seconds:.0f} s a run"


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"mean and standard deviation over {len(SEEDS)} seeds", title_justify="left")
    for column in ("study", "metric", "privacy", "figure", "floor", "reached", "seconds a run"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row.study,
            row.metric,
            "none" if row.epsilon is None else f"epsilon {row.epsilon:g}",
            f"{row.mean:.3f} ± {statistics.stdev(row.values):.3f}",
            "" if row.floor is None else f"{row.floor:g}",
            "" if row.floor is None else ("yes" if row.met else "NO"),
            f"{row.seconds:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
