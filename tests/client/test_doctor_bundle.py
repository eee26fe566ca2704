"""What `wardround doctor --bundle` sends to support, and what it never does."""

from __future__ import annotations

import json
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from wardround.client.doctor.bundle import redacted, write_bundle
from wardround.client.doctor.findings import Case, Finding
from wardround.client.policy import SiteConfig
from wardround.common.cli import application
from wardround.simulations.scenario import Scenario

COORDINATOR = "fl.example.org:8443"
LOG = f"""\
2026-11-21 18:00:00,001 wardround.site INFO renewed: crl.pem, roster/va.tls.crt
2026-11-21 18:00:01,001 httpx INFO HTTP Request: GET https://10.1.2.3/secret
2026-11-21 18:00:02,001 wardround.site WARNING refused: the records do not fit (/srv/ris/heart.csv: row 7: age = 240)
2026-11-21 18:00:03,001 wardround.site ERROR internal error, ref 7f3a
Traceback (most recent call last):
  File "/opt/wardround/site.py", line 3
ValueError: patient Jane Doe, born 1961
2026-11-21 18:00:04,001 wardround.site WARNING connecting: {COORDINATOR} refuses 12345 of 678 at proxy.hospital.example:3128
"""


@pytest.fixture
def case(scenario: Callable[..., Scenario]) -> Case:
    path = scenario(rounds=2).sites["va"]
    path.write_text(tomli_w.dumps(tomllib.loads(path.read_text()) | {"network": {"coordinator": COORDINATOR}}))
    (path.parent / "state").mkdir(exist_ok=True)
    return Case(path, SiteConfig.load(path))


def written(case: Case, found: dict[str, Finding]) -> dict[str, object]:
    path = case.path.parent / "bundle.json"
    write_bundle(path, case, found)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    body: dict[str, object] = json.loads(path.read_text())
    return body


def test_the_bundle_holds_results_and_versions_and_nothing_that_is_local(case: Case):
    body = written(
        case, {"clock": Finding("fail", f"90 s off {COORDINATOR}", "set it", "/etc/ntp.conf of ntp.hospital.example")}
    )
    assert body["checks"] == [{"check": "clock", "level": "fail", "text": f"90 s off {COORDINATOR}", "do": "set it"}]
    assert body["coordinator"] == COORDINATOR
    assert body["versions"]["flwr"].startswith("1.")  # type: ignore[index]
    assert "hospital" not in json.dumps(body)
    assert str(case.path.parent) not in json.dumps(body)


def test_the_log_comes_without_details_traces_numbers_and_others_lines(case: Case):
    (case.config.state / "site.log").write_text(LOG)
    assert written(case, {})["log"] == [
        "2026-11-21 18:00:00 INFO renewed: [name], [path]",
        "2026-11-21 18:00:02 WARNING refused: the records do not fit",
        "2026-11-21 18:00:03 ERROR internal error, ref 7f3a",
        f"2026-11-21 18:00:04 WARNING connecting: {COORDINATOR} refuses # of # at [name]",
    ]


def test_only_the_newest_50_lines_are_taken(case: Case):
    (case.config.state / "site.log").write_text(LOG * 3000)
    log = written(case, {})["log"]
    assert isinstance(log, list)
    assert len(log) == 50


def test_a_site_without_a_log_or_an_enrolment_has_a_bundle_too(case: Case):
    case.path.write_text(case.path.read_text().replace(COORDINATOR, "").replace("coordinator = ", "# "))
    bare = Case(case.path, SiteConfig.load(case.path))
    body = written(bare, {})
    assert body["log"] == []
    assert body["coordinator"] == ""


def test_the_command_writes_it_and_says_to_read_it(case: Case, tmp_path: Path):
    done = CliRunner().invoke(application(), ["doctor", str(case.path), "--bundle", str(tmp_path / "b.json")])
    assert done.exit_code == 1  # it is not enrolled
    assert "read it before you send it" in done.output
    text = (tmp_path / "b.json").read_text()
    assert str(tmp_path) not in text
    assert "heart" in text


WORD = st.text("abcdefghijklmnop0123456789-_", min_size=1, max_size=12)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(parts=st.lists(WORD, min_size=1, max_size=5), root=st.sampled_from(["/", "./", "../", "~/", "C:\\"]))
def test_no_path_stays(parts: list[str], root: str):
    path = root + ("\\" if root[0] == "C" else "/").join(parts)
    assert redacted(f"cannot open {path}, giving up") == "cannot open [path] giving up"


@settings(derandomize=True, deadline=None, max_examples=60)
@given(host=st.lists(st.text("abcdefgh-", min_size=1, max_size=8), min_size=2, max_size=4), port=st.integers(1, 65535))
def test_no_host_stays_but_the_coordinators(host: list[str], port: int):
    name = "x" + ".x".join(host)
    said = redacted(f"from {name}:{port} to {COORDINATOR} and fl.example.org", COORDINATOR)
    assert said == f"from [name] to {COORDINATOR} and fl.example.org"


@pytest.mark.parametrize(
    "secret",
    [
        "10.1.2.3:443", "fe80::1", "[2001:db8::7]", "it@hospital.example", "https://pacs.example/x?y=1", "heart.csv",
        "token-" + "ab" * 32, "4f1c" * 8,
    ],
)  # fmt: skip
def test_addresses_names_and_secrets_are_taken_out(secret: str):
    said = redacted(f"saw {secret} there")
    assert secret not in said
    assert said.startswith("saw [")
    assert said.endswith("there")


def test_plain_words_and_versions_stay():
    text = "1.41.0 here, 0 s ahead of the coordinator's; 90 days left"
    assert redacted(text) == text
