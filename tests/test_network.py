"""A consortium on loopback: real keys, TLS with certificates on both ends, every hospital a process that may be killed."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import safetensors.torch
import torch

from lab import Lab, lab, wardround
from wardround.client.ledger import PrivacyLedger
from wardround.server.checkpoint import Progress
from wardround.simulations.run import simulate
from wardround.simulations.scenario import Scenario

pytestmark = pytest.mark.live


def test_a_study_over_the_network_gives_the_bits_of_a_simulation(
    tmp_path: Path, scenario: Callable[..., Scenario], coins_for: Callable[..., object]
):
    local = scenario("local", rounds=3)
    simulate(local, baselines=False, coins_for=coins_for)  # type: ignore[arg-type]
    remote = scenario("remote", rounds=3)
    with lab(tmp_path / "lab", remote.sites) as there:
        there.serve()
        there.join(repeatable=True)
        there.start(there.sign(remote.study))
        status = there.wait(remote.study.plan.name)
        assert status.state == "finished", there.logs()
        assert status.round == 3
        folder = there.shelf.study(remote.study.plan.name).path
        expected = safetensors.torch.load_file(local.folder / "model.safetensors")
        found = safetensors.torch.load_file(folder / "model.safetensors")
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        for name in there.sites:
            assert there.kill(name, signal.SIGTERM) == 0
        assert there.kill("serve", signal.SIGTERM) == 0
        logs_hold(there)


def test_whatever_is_killed_the_study_ends_and_nothing_is_spent_twice(tmp_path: Path, scenario: Callable[..., Scenario]):
    rounds = 30
    study = scenario(rounds=rounds).study
    with lab(tmp_path / "lab", scenario("sites", rounds=rounds).sites) as there:
        name = study.plan.name
        there.serve()
        there.join()
        there.start(there.sign(study))
        there.wait(name, rounds=2)
        there.kill("va")  # and at once again: Flower still takes the dead one for present
        there.join("va")
        there.wait(name, rounds=8)
        there.kill("serve")
        there.serve()
        there.wait(name, rounds=14)
        os.kill(study_process(there), signal.SIGKILL)
        there.wait(name, rounds=20)
        there.kill("serve")
        there.kill("cleveland")
        there.join("cleveland")
        there.serve()
        status = there.wait(name)
        assert status.state == "finished", there.logs()
        folder = there.shelf.study(name).path
        progress = Progress.latest(folder / "checkpoints", study=study.digest)
        assert progress is not None
        assert [record.round for record in progress.history] == list(range(1, rounds + 1))
        assert not any(record.lost for record in progress.history)
        took_part = {site: sum(site in record.sites for record in progress.history) for site in study.plan.sites}
        for site, path in there.sites.items():
            with PrivacyLedger(path.parent / "state" / "ledger.sqlite") as ledger:
                ledger.verify()
                (account,) = ledger.accounts()
            assert took_part[site] <= account.marked <= rounds
        logs_hold(there)


def test_nobody_without_the_consortiums_certificate_gets_a_word(tmp_path: Path, scenario: Callable[..., Scenario]):
    run = scenario(rounds=1)
    sites = dict(list(run.sites.items())[:2])
    with lab(tmp_path / "lab", sites) as there, lab(tmp_path / "other", dict(list(run.sites.items())[2:3])) as other:
        there.serve()
        one, two = sites
        assert asked(there, there, one)[0] == 200
        with pytest.raises(httpx.TransportError):
            asked(there, None, "")
        with pytest.raises(httpx.TransportError):
            asked(there, other, next(iter(other.sites)))
        assert asked(there, there, one, "/docs")[0] == 404
        assert asked(there, there, one, "/v1/control/list-runs")[0] == 404
        wardround("revoke", two, "--consortium", there.consortium)
        status, why = asked(there, there, two)
        assert (status, "revoked" in why) == (403, True)
        assert asked(there, there, one)[0] == 200
        there.kill("serve", signal.SIGTERM)
        log = (there.folder / "coordinator" / "audit.jsonl").read_text()
        assert "gate.refused" in log


def logs_hold(there: Lab) -> None:
    """Every log of the consortium is whole, and knows what the others wrote down of it."""
    for path in there.folder.rglob("audit.jsonl"):
        wardround("audit-log", "verify", path)
    for file in there.sites.values():
        wardround("audit-log", "verify", file.parent / "state" / "audit.jsonl")


def study_process(there: Lab) -> int:
    log = (there.folder / "coordinator" / "coordinator.log").read_text()
    return int(re.findall(r"process (\d+)$", log, re.MULTILINE)[-1])


def asked(there: Lab, whose: Lab | None, site: str, path: str = "/health") -> tuple[int, str]:
    """What the coordinator says to a caller with the certificate of `site`, or none."""
    import ssl

    context = ssl.create_default_context(cafile=str(there.consortium / "public" / "ca.crt"))
    if whose is not None:
        state = whose.sites[site].parent / "state"
        context.load_cert_chain(state / "trust" / "roster" / f"{site}.tls.crt", state / "keys" / "tls.key")
    with httpx.Client(verify=context, trust_env=False) as client:
        time.sleep(0.1)
        answer = client.get(f"https://localhost:{there.port}{path}")
    return answer.status_code, answer.text
