"""One run in a process of its own: `python -m benchmarks.one_run plain|1|2 RUN_FOLDER OUT STARTED`.

`plain` is the loop anybody would write, with privacy the one of `benchmarks.plain_private`; a number is wardround with that
many processes. Leaves the final model, and the moment each round was finished: in seconds since STARTED (what `time.time()`
said just before this process was made), and in processor time of this process.
"""

from __future__ import annotations

import json
import sys
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import safetensors.torch


class Mark(NamedTuple):
    """A moment: what `time.time()` said, and the processor time of this process, in seconds."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Mark:
        """The moment of the call."""
        return cls(time.time(), time.process_time())


def plain(folder: Path, out: Path) -> list[Mark]:
    """Federated averaging as a bare loop over the sites: no messages, no checks, no checkpoints."""
    import torch

    from wardround.client.data import open_records
    from wardround.client.policy import SiteConfig
    from wardround.client.training.supervised import batches
    from wardround.common.devices import keep_memory
    from wardround.common.plan import SignedText
    from wardround.common.tasks import TASKS
    from wardround.common.weights import trainable

    keep_memory()
    torch.set_num_threads(1)
    plan = SignedText.load(folder / "plan.toml").plan
    task = TASKS[plan.task]
    site_files = {site: SiteConfig.load(folder / "sites" / site / "site.toml") for site in plan.sites}
    records = {site: open_records(file.data[plan.task], task)[0] for site, file in site_files.items()}
    model, share = task.model(plan.model, plan.seed), plan.weights()
    parameters: list[torch.Tensor] = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    marks = []
    for round in range(1, plan.rounds + 1):
        total = [torch.zeros_like(p) for p in start]
        for site, mine in records.items():
            drawn = batches(mine, plan.local, seed=plan.seed, site=site, round=round)
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            for _ in range(plan.local.steps):
                index = next(drawn)
                loss = task.loss(model(mine.fields["image"][index]), mine.label[index]).mean()
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    torch._foreach_add_(parameters, gradients, alpha=-plan.local.learning_rate)
            with torch.no_grad():
                torch._foreach_add_(total, torch._foreach_sub(parameters, start), alpha=share[site])
        torch._foreach_add_(start, total)
        marks.append(Mark.now())
    final = dict(zip(trainable(model), start, strict=True))
    safetensors.torch.save_file(final, out / "model.safetensors")
    return marks


def plain_private(folder: Path, out: Path) -> list[Mark]:
    """The same with private steps: DP-SGD by book-keeping, see `benchmarks.plain_private`."""
    import torch

    from benchmarks.plain_private import PlainDPSGD
    from wardround.client.data import open_records
    from wardround.client.policy import SiteConfig
    from wardround.common.devices import keep_memory
    from wardround.common.plan import SignedText
    from wardround.common.tasks import TASKS

    keep_memory()
    torch.set_num_threads(1)
    torch.seed()  # else every run would draw the same noise
    plan = SignedText.load(folder / "plan.toml").plan
    task, privacy, noise_multiplier = TASKS[plan.task], plan.private(), plan.noise_multiplier()
    site_files = {site: SiteConfig.load(folder / "sites" / site / "site.toml") for site in plan.sites}
    records = {site: open_records(file.data[plan.task], task)[0] for site, file in site_files.items()}
    model, share = task.model(plan.model, plan.seed), plan.weights()
    sgd = PlainDPSGD(model, task.loss)
    start, marks = sgd.parameters.clone(), []
    for _ in range(plan.rounds):
        total = torch.zeros_like(start)
        for site, mine in records.items():
            sgd.parameters.copy_(start)
            rate = plan.local.learning_rate / (privacy.sampling_rate * plan.sites[site])
            for _ in range(plan.local.steps):
                index = (torch.rand(len(mine)) < privacy.sampling_rate).nonzero()[:, 0]
                sgd.clipped_sum(mine.fields["image"][index], mine.label[index], privacy.clip_norm)
                sgd.step(deviation=noise_multiplier * privacy.clip_norm, rate=rate)
            total.add_(sgd.parameters - start, alpha=share[site])
        start.add_(total)
        marks.append(Mark.now())
    sgd.parameters.copy_(start)
    final = {name: p.detach().clone() for name, p in model.named_parameters()}
    safetensors.torch.save_file(final, out / "model.safetensors")
    return marks


def wardround(folder: Path, out: Path, processes: int) -> list[Mark]:
    """The real coordinator and the real client over a LocalGrid, as `wardround simulate` joins them, without evaluation."""
    import torch
    from flwr.app import Context, RecordDict

    from wardround.client.app import client_app
    from wardround.common.devices import keep_memory
    from wardround.common.plan import SignedText
    from wardround.server.app import server_app
    from wardround.server.federation import Observer
    from wardround.simulations.grid import LocalGrid

    keep_memory()
    torch.set_num_threads(1)
    study = SignedText.load(folder / "plan.toml")
    sites = [folder / "sites" / site / "site.toml" for site in study.plan.sites]
    run_config = {"plan": study.text, "folder": str(out)}
    marks: list[Mark] = []
    app = server_app(Observer(round_done=lambda record: marks.append(Mark.now())), every=study.plan.rounds)
    with LocalGrid(client_app, sites, run_config, processes) as grid:
        app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), dict(run_config)))
    return marks


def main() -> None:
    """Run once, write marks.json."""
    who, folder, out, started = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
    if who == "plain":
        private = "privacy" in tomllib.loads((folder / "plan.toml").read_text())
        marks = plain_private(folder, out) if private else plain(folder, out)
    else:
        marks = wardround(folder, out, int(who))
    found = {"wall": [mark.wall - started for mark in marks], "cpu": [mark.cpu for mark in marks]}
    (out / "marks.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
