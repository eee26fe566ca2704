"""The coordinator's side: a Flower ServerApp that runs one study and leaves a folder behind."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from wardround.common.files import write_atomically
from wardround.common.plan import SignedText
from wardround.server import federation
from wardround.server.checkpoint import Progress
from wardround.server.federation import Observer
from wardround.server.roll import say_farewell
from wardround.server.validation import handed_out


def server_app(observer: Observer | None = None, *, every: int = 1) -> ServerApp:
    """A ServerApp; `observer` watches, and `every` is the number of rounds between two checkpoints."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        study = SignedText.received(context.run_config.get("plan"))
        folder = Path(str(context.run_config.get("folder") or f"runs/{study.plan.name}"))
        checkpoints = folder / "checkpoints"
        progress = federation.opened(study, checkpoints)
        progress = federation.run(grid, study, progress, folder=checkpoints, every=every, observer=observer or Observer())
        write_model(folder, progress)
        say_farewell(grid, study, progress)

    return app


def write_model(folder: Path, progress: Progress) -> None:
    """The released model as model.safetensors, under torch's own names."""
    weights = {name: tensor.contiguous() for name, tensor in handed_out(progress).items()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(weights, metadata={"study": progress.study}))


app = server_app()
