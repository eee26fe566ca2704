"""A thousand simulated hospitals in one process: one model at a time, not a thousand."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w

SITES = 1000
MODEL_BYTES = 4 * 205_890  # the chest film's network


def write_study(folder: Path) -> None:
    random = np.random.default_rng(0)
    names = [f"site-{number:04d}" for number in range(SITES)]
    for name in names:
        home = folder / "sites" / name
        home.mkdir(parents=True)
        image = random.integers(0, 256, (2, 1, 28, 28), dtype=np.uint8)
        np.savez(home / "records.npz", image=image, label=np.array([0, 1]))
        site = {
            "site": name,
            "allow": {"tasks": ["chest-xray"], "without_privacy": True, "min_patients": 1},
            "data": {"chest-xray": {"loader": "arrays", "path": "records.npz", "declared_patients": 2}},
            "compute": {"device": "cpu"},
        }
        (home / "site.toml").write_text(tomli_w.dumps(site))
    plan = {"name": "thousand", "task": "chest-xray", "rounds": 2, "sites": dict.fromkeys(names, 2), "local": {"steps": 2}}
    (folder / "plan.toml").write_text(tomli_w.dumps(plan))


def run(folder: Path) -> None:
    """Two rounds; prints how far the peak grew over what the process had after its first site of the first round."""
    import torch
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp

    from wardround.client.app import client_app
    from wardround.common.plan import SignedText
    from wardround.server.app import server_app
    from wardround.simulations.grid import LocalGrid

    torch.set_num_threads(1)
    study = SignedText.load(folder / "plan.toml")
    config = {"plan": study.text, "folder": str(folder)}
    trained = []

    def watched() -> ClientApp:
        real = client_app()

        def answer(message: Message, context: Context) -> Message:
            reply = real(message, context)
            if message.metadata.message_type == "train":
                trained.append(peak_bytes())
            return reply

        return answer  # type: ignore[return-value]

    with LocalGrid(watched, [folder / "sites" / site / "site.toml" for site in study.plan.sites], config) as grid:
        server_app()(grid, Context(grid.run.run_id, 1, {}, RecordDict(), dict(config)))
    print(len(trained), trained[-1] - trained[0])


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@pytest.mark.slow
def test_a_thousand_sites_fit_into_the_memory_of_a_few_models(tmp_path: Path):
    write_study(tmp_path)
    ended = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    trained, grown = map(int, ended.stdout.split())
    assert trained == 2 * SITES
    assert grown < 30 * MODEL_BYTES, f"{grown / MODEL_BYTES:.1f} models' worth"


if __name__ == "__main__":
    run(Path(sys.argv[1]))
