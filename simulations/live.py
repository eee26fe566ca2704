"""What a person sees while a simulation runs: rounds, the headline metric, and each hospital's privacy."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from wardround.server.account import looks_of, spent_on, steps_after
from wardround.server.checkpoint import RoundRecord
from wardround.simulations.run import Watch
from wardround.simulations.scenario import Scenario

_SHOWN_SITES = 12
_SECONDS_BETWEEN_LOOKS = 0.25


class LiveView:
    """A progress bar and one line per hospital. Drawn when a round ends, never from a thread, so forking is safe."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[figure]}"), console=console,
        )  # fmt: skip
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._scenario: Scenario | None = None
        self._rounds = self._bar.add_task("rounds", total=None, figure="")
        self._baselines = self._bar.add_task("baselines", total=None, figure="", visible=False)
        self._last: RoundRecord | None = None
        self._seen = ""  # at the last look
        self._refused: dict[str, str] = {}
        self._steps: dict[str, int] = {}
        self._history: list[RoundRecord] = []
        self._drawn = 0.0

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._draw(force=True)
        self._live.__exit__(None, None, None)

    @property
    def watch(self) -> Watch:
        """The callbacks to hand to `simulate`."""
        return Watch(self._began, self._round_done, self._baseline)

    def _began(self, scenario: Scenario, present: list[str], refused: dict[str, str]) -> None:
        self._scenario, self._refused = scenario, refused
        plan = scenario.study.plan
        self._bar.update(self._rounds, total=plan.rounds, description=f"{plan.name}, {len(present)} sites")
        self._draw(force=True)

    def _round_done(self, record: RoundRecord) -> None:
        self._last = record
        self._history.append(record)
        assert self._scenario is not None
        self._steps = steps_after(self._scenario.study.plan, self._steps, record)
        headline = self._scenario.task.headline
        figure = f"{headline} {record.metrics[headline]:.3f}" if headline in record.metrics else ""
        if record.validation is not None:
            self._seen = f"validation {record.validation:.3f} (round {record.round})"
        self._bar.update(self._rounds, completed=record.round, figure="  ".join(filter(None, (figure, self._seen))))
        self._draw()

    def _baseline(self, name: str, done: int, total: int) -> None:
        self._bar.update(self._baselines, visible=True, completed=done, total=total, figure=name)
        self._draw(force=True)

    def _draw(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._drawn > _SECONDS_BETWEEN_LOOKS:
            self._drawn = now
            self._live.update(Group(self._bar, self._table()), refresh=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        if self._scenario is None:
            return table
        study = self._scenario.study
        private = study.plan.privacy
        table.add_column("site")
        table.add_column("last round")
        if private:
            table.add_column("epsilon spent", justify="right")
            table.add_column("left of the plan's", justify="right")
        for site in list(study.plan.sites)[:_SHOWN_SITES]:
            cells = [site, self._state(site)]
            if private:
                steps, looks = self._steps.get(site, 0), looks_of(site, self._history)
                spent = spent_on(study.plan, steps, counted=study.plan.loss.counts, looks=looks).epsilon(private.delta)
                cells += [f"{spent:.2f}", f"{max(0.0, private.epsilon - spent):.2f}"]
            table.add_row(*cells)
        if len(study.plan.sites) > _SHOWN_SITES:
            table.add_row(f"and {len(study.plan.sites) - _SHOWN_SITES} more")
        return table

    def _state(self, site: str) -> str:
        if site in self._refused:
            return "does not take part"
        if self._last is None:
            return ""
        return "update" if site in self._last.sites else self._last.dropped.get(site, "absent")
