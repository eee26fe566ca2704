"""The coordinator's side: a Flower ServerApp that runs one study and leaves a folder behind."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from wardround.common.plan import SignedText, StudyPlan
from wardround.common.vault import Vault
from wardround.server import federation
from wardround.server.checkpoint import Progress
from wardround.server.federation import Observer
from wardround.server.roll import say_farewell
from wardround.server.validation import handed_out


def server_app(observer: Observer | None = None, *, every: int = 1, vault: Vault = Vault.none()) -> ServerApp:
    """A ServerApp; `observer` watches, and `every` is the number of rounds between two checkpoints, which `vault` seals."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        study = SignedText.received(context.run_config.get("plan"))
        folder = Path(str(context.run_config.get("folder") or f"runs/{study.plan.name}"))
        checkpoints = folder / "checkpoints"
        public = context.run_config.get("weights")
        progress = federation.opened(study, checkpoints, Path(str(public)) if public else None, vault)
        watch = observer or Observer()
        progress = federation.run(grid, study, progress, folder=checkpoints, every=every, observer=watch, vault=vault)
        write_model(folder, study.plan, progress, vault)
        say_farewell(grid, study, progress)

    return app


def write_model(folder: Path, plan: StudyPlan, progress: Progress, vault: Vault = Vault.none()) -> None:
    """The released model as model.safetensors, under torch's own names; with the key of a `vault`, as model.sealed."""
    weights = {name: tensor.contiguous() for name, tensor in handed_out(plan, progress).items()}
    path = folder / ("model.sealed" if vault.seals else "model.safetensors")
    vault.write(path, safetensors.torch.save(weights, metadata={"study": progress.study}), label=path.name)


app = server_app()
