"""What `wardround simulate` does once its options are read (apart, so that `--help` need not import torch)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from wardround.common.errors import ConfigError
from wardround.common.plan import SignedText
from wardround.common.studies import find_study
from wardround.server.report import Report, story, write_report
from wardround.simulations.live import LiveView
from wardround.simulations.run import Watch, over_seeds, seed_folders, simulate
from wardround.simulations.scenario import Changes, Scenario, Settings, fresh_folder

_SHOWN_METRICS = 2  # with their intervals, more do not fit a terminal


@dataclass(frozen=True)
class Request:
    """The options of one call."""

    study: str
    epsilon: float | None = None
    rounds: int | None = None
    without_privacy: bool = False
    sites: int | None = None
    partition: str | None = None
    seed: int | None = None
    seeds: int = 1
    processes: int | None = None
    baselines: bool | None = None
    out: Path = Path("runs")
    resume: Path | None = None
    quiet: bool = False
    json: bool = False
    data: Path | None = None
    weights: Path | None = None


def run(request: Request) -> None:
    """Prepare or reopen the run folder, simulate every seed, print the summary.

    Raises:
        ConfigError: an option or a file does not hold; nothing was started.
        StudyStopped: a study ended early; its report says so too.
    """
    if request.resume is not None:
        folder, settings = _reopened(request)
        scenarios = [Scenario.reopen(path) for path in seed_folders(folder, settings.seeds).values()]
    else:
        folder, settings, scenarios = _prepared(request)
    console = Console(stderr=True, quiet=request.quiet or request.json)
    console.print(f"run folder: {folder}", highlight=False)
    reports = []
    for number, (seed, scenario) in enumerate(zip(settings.seeds, scenarios, strict=True), start=1):
        if len(scenarios) > 1:
            console.print(f"seed {seed} ({number} of {len(scenarios)})", highlight=False)
        with _watching(console) as watch:
            reports.append(simulate(scenario, processes=settings.processes, baselines=settings.baselines, watch=watch))
    report = reports[0]
    if len(reports) > 1:
        report = over_seeds(reports, settings.seeds)
        write_report(folder, report)
    if request.json:
        print((folder / "report.json").read_text())
    elif request.quiet:
        print(folder / "report.html")
    else:
        _print_summary(Console(), report, folder)


def _prepared(request: Request) -> tuple[Path, Settings, list[Scenario]]:
    source = find_study(request.study)
    plan = SignedText.load(source).plan
    first = plan.seed if request.seed is None else request.seed
    if first < 0:
        raise ConfigError(f"--seed {first}: wanted 0 or more")
    seeds = [first + number for number in range(request.seeds)]
    folder = fresh_folder(request.out, plan.name)
    settings = _settled(request, Settings(seeds))
    scenarios = []
    for seed, path in seed_folders(folder, seeds).items():
        changes = Changes(
            request.epsilon, request.rounds, request.without_privacy, request.sites, request.partition,
            seed if request.seed is not None or request.seeds > 1 else None, request.weights,
        )  # fmt: skip
        scenarios.append(Scenario.prepare(source, path, changes, request.data))
    settings.save(folder)
    return folder, settings, scenarios


def _reopened(request: Request) -> tuple[Path, Settings]:
    assert request.resume is not None
    changed = [
        name
        for name, given in {
            "--epsilon": request.epsilon, "--rounds": request.rounds, "--sites": request.sites,
            "--partition": request.partition, "--seed": request.seed, "--no-privacy": request.without_privacy or None,
            "--weights": request.weights,
        }.items()
        if given is not None
    ]  # fmt: skip
    if changed:
        raise ConfigError(f"{changed[0]}: a resumed run keeps its plan; leave the option out, or start a new run")
    folder = request.resume if request.resume.is_dir() else request.out / request.resume
    plan = Scenario.reopen(folder).study.plan
    settings = Settings.load(folder)
    if request.seeds not in (1, len(settings.seeds)):
        raise ConfigError(f"--seeds: this run has {len(settings.seeds)}; leave the option out, or start a new run")
    wanted = SignedText.load(find_study(request.study)).plan
    if plan.name != wanted.name:
        raise ConfigError(f"--resume {folder}: this run is of study {plan.name}, not {wanted.name}")
    return folder, _settled(request, settings)


def _settled(request: Request, settings: Settings) -> Settings:
    """The settings with what the command line says about them."""
    if request.processes is not None:
        settings = replace(settings, processes=request.processes)
    if request.baselines is not None:
        settings = replace(settings, baselines=request.baselines)
    return settings


@contextlib.contextmanager
def _watching(console: Console) -> Iterator[Watch]:
    if console.quiet or not sys.stderr.isatty():
        yield _plain_watch(console)
        return
    with LiveView(console) as view:
        yield view.watch


def _plain_watch(console: Console) -> Watch:
    """A line now and then, for logs."""

    def began(scenario: Scenario, present: list[str], refused: dict[str, str]) -> None:
        console.print(f"{len(present)} sites take part: {', '.join(present[:12])}", highlight=False)
        for reason in refused.values():
            console.print(reason, highlight=False)

    def round_done(record: object) -> None:
        number = getattr(record, "round", 0)
        figures = dict(getattr(record, "metrics", {}))
        seen = getattr(record, "validation", None)
        figures |= {} if seen is None else {"validation": seen}
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        if number % 10 == 0 or number == 1:
            console.print(f"round {number}: {metrics}", highlight=False)

    def baseline(name: str, done: int, total: int) -> None:
        if name:
            console.print(f"baseline {done + 1} of {total}: {name}", highlight=False)

    return Watch(began, round_done, baseline)


def _print_summary(console: Console, report: Report, folder: Path) -> None:
    table = report.model_dump(mode="json", by_alias=True)
    headline = table["headline"]
    results, privacy = table["results"], table["privacy"]
    metrics = [headline, *(name for name in results["federated"] if name != headline)][:_SHOWN_METRICS]
    shown = Table(title=f"{table['study']['title']}: same test patients of all hospitals", title_justify="left")
    for column in ("model", *metrics):
        shown.add_column(column)
    rows = {"federated": results["federated"], "pooled, no noise": results["pooled"]}
    rows |= {f"{site} alone": figures for site, figures in list(results["local"].items())[:12]}
    for name, figures in rows.items():
        if figures:
            shown.add_row(name, *(_figure(figures.get(metric)) for metric in metrics))
    console.print(shown)
    if seeds := table["seeds"]:
        figures = seeds["federated"][headline]
        spread = f" ± {figures['sd']:.3f}" if figures["sd"] is not None else ""
        console.print(f"federated {headline} over {len(seeds['values'])} seeds: {figures['mean']:.3f}{spread} (mean ± sd)")
    if table["validation"] and table["validation"]["best_round"] is not None:
        console.print(story.validation(report), highlight=False)
    if table["outcome"]["status"] == "completed early":
        console.print(f"completed early: {table['outcome']['reason']}", highlight=False)
    if privacy:
        worst = max(privacy.values(), key=lambda site: site["epsilon"])
        console.print(
            f"each patient paid at most epsilon {worst['epsilon']:.2f} at delta {worst['delta']:g} "
            f"(add or remove one patient; {worst['epsilon_replace_one']:.2f} if one is replaced)",
            highlight=False,
        )
    else:
        console.print("trained without privacy: no guarantee for any patient", highlight=False)
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _figure(figure: dict[str, float | None] | None) -> str:
    if not figure or figure["value"] is None:
        return "undefined"
    text = f"{figure['value']:.3f}"
    if figure["low"] is not None:
        text += f"  ({figure['low']:.3f} to {figure['high']:.3f})"
    return text
