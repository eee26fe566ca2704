"""A hospital's resident process: neither what a coordinator makes up nor a dead line keeps it from its work or its end."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from wardround.client.network import join
from wardround.client.network import link as module
from wardround.client.network.link import Line, Offline
from wardround.client.policy import SiteConfig
from wardround.common.errors import LinkRefused
from wardround.common.trust.site_folder import SiteFolder


class Renewing:
    """A line that says where the certificate was shown from; nobody answers on it."""

    def __init__(self) -> None:
        self.shown: list[tuple[Path, Path]] = []

    def trust(self) -> str:
        return "a list"

    def show(self, certificate: Path, key: Path) -> None:
        self.shown.append((certificate, key))


def test_a_certificate_that_was_renewed_is_shown_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SiteFolder, "take_news", lambda *given: [])  # another process put it there
    line: Any = Renewing()
    join._renew_trust(SiteFolder("va", tmp_path), line)
    assert line.shown == [(tmp_path / "trust/roster/va.tls.crt", tmp_path / "keys/tls.key")]


def test_what_a_coordinator_made_up_ends_an_order_and_not_the_process(caplog: pytest.LogCaptureFixture):
    def breaks(run: int) -> None:
        raise ValueError("no such thing in Flower's books")

    site, line = SiteConfig.model_validate({"site": "va"}), SimpleNamespace(settings=breaks)
    mail: Any = SimpleNamespace(run=1)
    nobody: Any = None
    join._deal_with(site, nobody, line, mail)  # type: ignore[arg-type]
    assert "an order is dropped" in caplog.text


def a_line(address: str = "localhost:1") -> Line:
    return Line(address, ssl.create_default_context(), ec.generate_private_key(ec.SECP384R1()), None)


class Fleet:
    """Flower's side of a line that breaks."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.breaks: list[Exception] = []

    def __getattr__(self, name: str) -> Any:
        def call(request: object) -> object:
            self.heard.append(name)
            if name == "PullMessages" and self.breaks:
                raise self.breaks.pop()
            return SimpleNamespace(node_id=1, messages_list=[])

        return call


def test_a_site_that_is_refused_reports_anew_for_the_coordinator_may_have_new_books():
    line, fleet = a_line(), Fleet()
    line._client = fleet  # type: ignore[assignment]
    line.connect(None)
    assert line.mail() is None
    fleet.breaks.append(httpx.HTTPStatusError("", request=httpx.Request("POST", "/"), response=httpx.Response(401)))
    with pytest.raises(LinkRefused):
        line.mail()
    assert line.mail() is None
    assert line.mail() is None
    line._stop.set()
    report = ["DeactivateNode", "ActivateNode"]
    assert fleet.heard == ["ActivateNode", "PullMessages", "PullMessages", *report, "PullMessages", "PullMessages"]


@pytest.mark.parametrize("broke", [httpx.ReadTimeout("half open"), DecodeError("a proxy's page")])
def test_what_is_no_answer_of_a_coordinator_is_waited_for(broke: Exception):
    line, fleet = a_line(), Fleet()
    line._client = fleet  # type: ignore[assignment]
    fleet.breaks.append(broke)
    with pytest.raises(Offline):
        line.mail()
    assert line.mail() is None


def test_a_line_that_is_dead_does_not_keep_a_process_from_ending(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module._FAREWELL, "read", 0.3)
    monkeypatch.setattr(module._FAREWELL, "connect", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        line = a_line(f"127.0.0.1:{silent.getsockname()[1]}")
        line._node = SimpleNamespace(node_id=1)
        began = time.monotonic()
        line.close()
        assert time.monotonic() - began < 5
        with pytest.raises((Offline, RuntimeError)):
            line.trust()


def test_a_heart_beats_on_whatever_was_said_to_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_HEARTBEAT_EVERY", 0.01)
    line, beats = a_line(), []

    def breaks(request: object) -> None:
        beats.append(request)
        raise RuntimeError("no word of Flower's")

    line._client = SimpleNamespace(SendNodeHeartbeat=breaks)  # type: ignore[assignment]
    heart = threading.Thread(target=line._beat, daemon=True)
    heart.start()
    deadline = time.monotonic() + 5
    while len(beats) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    line._stop.set()
    heart.join(5)
    assert len(beats) >= 3
