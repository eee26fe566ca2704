"""On a GPU the same study gives the same model, up to rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import safetensors.torch
import torch

from wardround.client.hospital import CoinsFor
from wardround.simulations.run import simulate
from wardround.simulations.scenario import Scenario


@pytest.mark.gpu
@pytest.mark.parametrize("without_privacy", [False, True])
def test_a_gpu_gives_the_model_of_a_cpu(scenario: Callable[..., Scenario], coins_for: CoinsFor, without_privacy: bool):
    models = {}
    for device in ("cpu", "cuda"):
        prepared = scenario(device, rounds=3, without_privacy=without_privacy)
        for path in prepared.sites.values():
            path.write_text(path.read_text().replace('device = "auto"', f'device = "{device}"'))
        simulate(prepared, baselines=False, coins_for=coins_for)
        models[device] = safetensors.torch.load_file(prepared.folder / "model.safetensors")
    for name, tensor in models["cpu"].items():
        torch.testing.assert_close(models["cuda"][name], tensor, rtol=1e-4, atol=1e-6)
