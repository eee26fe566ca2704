"""`wardround doctor`: every illness has its own line, and a healthy site has none."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from typer.testing import CliRunner

from lab import lab, wardround
from wardround.client.doctor import identity, line, machine
from wardround.client.doctor import plan as plans
from wardround.client.doctor.findings import Case, Check, Finding, Unwell, examine
from wardround.client.ledger import Cohort, PrivacyLedger
from wardround.client.policy import SiteConfig
from wardround.common.cli import application
from wardround.common.privacy import NoisedSteps
from wardround.common.trust.certificates import COORDINATOR, Authority, Subject, Use, pem, utc_now
from wardround.common.trust.enrolment import key_text, new_key
from wardround.simulations import STUDIES
from wardround.simulations.scenario import Changes, Scenario
from wards import Silent, Ward, coordinator, copied, founded, listening, proxy


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; tests break copies."""
    folder = tmp_path_factory.mktemp("ward") / "master"
    sites = Scenario.prepare(STUDIES / "heart-disease.toml", folder / "run", Changes(rounds=3)).sites
    return founded(folder, {"va": sites["va"]}).folder


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another consortium."""
    return founded(tmp_path_factory.mktemp("others") / "other", {}).folder


@pytest.fixture
def ward(master: Path, tmp_path: Path) -> Ward:
    return copied(master, tmp_path / "ward")


def doctor(ward: Ward, *options: object) -> tuple[int, str]:
    done = CliRunner().invoke(application(), ["doctor", str(ward.site), *map(str, options)], catch_exceptions=False)
    return done.exit_code, done.output


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---- a healthy site


def test_a_healthy_site_is_told_so_line_by_line_and_nothing_is_changed(ward: Ward):
    wardround("approve-plan", ward.plan, "--site", ward.site, "--yes", "--out", ward.folder / "va.approval")
    with ward.called(coordinator(body=b"ok flower/1.41.7"), ward.context()):
        before = snapshot(ward.folder)
        code, said = doctor(ward, "--plan", ward.plan)
        assert code == 0, said
        assert snapshot(ward.folder) == before
        code, text = doctor(ward, "--plan", ward.plan, "--json")
    facts = json.loads(text)
    assert facts["ok"] is True
    assert facts["site"] == "va"
    assert {row["level"] for row in facts["checks"]} <= {"ok", "note"}
    assert [said.count(f" {row['check']} ") >= 1 for row in facts["checks"]] == [True] * len(facts["checks"])
    assert {"TLS", "clock", "import guard", "records of heart-disease", "a step of it"} <= {
        row["check"] for row in facts["checks"]
    }


def test_the_site_file_that_cannot_be_read_is_code_2(ward: Ward):
    ward.site.write_text("site = ")
    with pytest.raises(Exception, match="not valid TOML"):  # what `main` turns into exit code 2
        doctor(ward)


# ---- keys and certificates


def test_a_site_that_is_not_enrolled_is_told_how_to_begin(ward: Ward):
    shutil.rmtree(ward.state)
    found = ward.look()
    assert found["enrolment"].level == "fail"
    assert "wardround enroll" in found["enrolment"].do
    assert {found[name].level for name in ("keys", "certificates", "TLS", "admission")} == {"skip"}
    assert found["state folder"].level == "fail"
    assert doctor(ward)[0] == 1


def test_a_request_without_a_welcome_is_half_an_enrolment(ward: Ward):
    shutil.rmtree(ward.state / "trust")
    assert "--welcome" in ward.find("enrolment").do


def test_a_trust_folder_of_another_authority_is_refused(ward: Ward, strangers: Path):
    shutil.copy(strangers / "consortium/public/ca.crt", ward.state / "trust/ca.crt")
    assert "another authority" in ward.find("enrolment").text


@pytest.mark.parametrize("break_key", ["open", "folder", "missing", "link", "another"])
def test_a_key_that_others_could_have_or_that_is_another_is_refused(ward: Ward, break_key: str):
    key = ward.state / "keys" / "tls.key"
    if break_key == "open":
        key.chmod(0o644)
    elif break_key == "folder":
        key.parent.chmod(0o755)
    elif break_key == "another":
        key.write_bytes(key_text(new_key("tls"), "tls"))
    else:
        key.rename(ward.folder / "elsewhere")
        if break_key == "link":
            key.symlink_to(ward.folder / "elsewhere")
    found = ward.find("keys")
    assert found.level == "fail"
    assert str(ward.state) not in found.text + found.do


@pytest.mark.parametrize(("days", "level"), [(0, "ok"), (59, "ok"), (65, "warn"), (85, "fail"), (91, "fail")])
def test_certificates_warn_30_days_before_their_end_and_fail_7(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, days: int, level: str
):
    monkeypatch.setattr(identity, "utc_now", lambda: utc_now() + datetime.timedelta(days=days))
    assert ward.find("certificates").level == level


def test_what_is_missing_of_another_hospital_is_not_this_ones_illness(ward: Ward):
    roster = ward.state / "trust" / "roster"
    shutil.copy(roster / "va.sign.crt", roster / "cleveland.sign.crt")
    assert ward.find("certificates").level == "ok"
    (roster / "va.node.crt").unlink()
    assert ward.find("certificates").level == "fail"


@pytest.mark.parametrize(("days", "level"), [(0, "ok"), (6, "warn"), (8, "fail")])
def test_a_stale_revocation_list_is_found_and_the_enrolment_is_not_blamed(
    ward: Ward, monkeypatch: pytest.MonkeyPatch, days: int, level: str
):
    monkeypatch.setattr(identity, "utc_now", lambda: utc_now() + datetime.timedelta(days=days))
    assert ward.find("revocation list").level == level
    assert ward.find("enrolment").level == "ok"


def test_another_join_is_news_and_no_illness(ward: Ward):
    import fcntl

    assert "no wardround join has run" in ward.find("wardround join").text
    with (ward.state / "join.lock").open("w") as lock:
        assert "not running" in ward.find("wardround join").text
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert ward.find("wardround join") == Finding("note", "wardround join is running")


# ---- the way to the coordinator


def test_an_unknown_name_is_found_before_the_network_is_blamed(ward: Ward, monkeypatch: pytest.MonkeyPatch):
    def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(line.socket, "getaddrinfo", unknown)  # type: ignore[attr-defined]
    found = ward.look()
    assert "is not known here" in found["name"].text
    assert found["TCP"].level == found["TLS"].level == "skip"
    ward.change(network={"proxy": "http://localhost:1"})
    assert ward.find("name").level == "note"


def test_a_closed_port_names_what_the_firewall_must_let_through(ward: Ward):
    with ward.called(Silent) as port:
        pass
    found = ward.find("TCP")
    assert found.level == "fail"
    assert f"outbound TCP to localhost:{port}" in found.do


def test_another_authoritys_server_is_not_the_coordinator(ward: Ward, strangers: Path):
    with ward.called(coordinator(), ward.context(strangers)):
        found = ward.find("TLS")
    assert found.level == "fail"
    assert "this is not the consortium's coordinator" in found.text


def test_a_box_that_looks_into_tls_is_called_by_its_name(ward: Ward, strangers: Path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(
        strangers / "consortium/public/roster/coordinator.tls.crt", strangers / "consortium/coordinator/tls.key"
    )
    with ward.called(coordinator(), context):
        found = ward.find("TLS")
    assert "issued by 'CN=lab authority,O=wardround'" in found.local
    assert "lab authority" not in found.text + found.do


def test_a_site_posing_as_the_coordinator_is_refused(ward: Ward):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ward.state / "trust/roster/va.tls.crt", ward.state / "keys/tls.key")
    with ward.called(coordinator(), context):
        found = ward.find("TLS")
    assert found.level == "fail"
    assert "good for a site" in found.text


@pytest.mark.parametrize("what", ["for another use", "revoked"])
def test_a_certificate_of_the_authority_is_not_enough(ward: Ward, what: str):
    home = ward.folder / "consortium"
    office = Authority(
        load_pem_private_key((home / "ca/ca.key").read_bytes(), None),  # type: ignore[arg-type]
        x509.load_pem_x509_certificate((home / "public/ca.crt").read_bytes()),
    )
    key = new_key("tls")
    use: Use = "tls" if what == "revoked" else "sign"
    shown = office.issue(key.public_key(), Subject(COORDINATOR, use, ("localhost",)), utc_now())
    if what == "revoked":
        listed = office.revocation_list({shown.serial_number: utc_now()}, 99, utc_now())
        (ward.state / "trust/crl.pem").write_bytes(pem(listed))
    (ward.folder / "shown.crt").write_bytes(pem(shown))
    (ward.folder / "shown.key").write_bytes(key_text(key, "tls"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ward.folder / "shown.crt", ward.folder / "shown.key")
    with ward.called(coordinator(), context):
        found = ward.find("TLS")
    assert found.level == "fail"
    assert "is not the consortium's coordinator" in found.text
    assert ("was revoked" if what == "revoked" else "for another role or use") in found.text


def test_a_certificate_for_another_address_is_told_from_a_strangers(ward: Ward, monkeypatch: pytest.MonkeyPatch):
    with ward.called(coordinator(), ward.context()) as port:
        ward.change(network={"coordinator": f"another.example.org:{port}"})
        real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1", *rest, **more))
        found = ward.find("TLS")
    assert "for another name than the one this site calls" in found.text


def test_an_older_tls_is_refused(ward: Ward):
    context = ward.context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with ward.called(coordinator(), context):
        assert "does not speak TLS 1.3" in ward.find("TLS").text


def test_a_port_without_tls_is_refused(ward: Ward):
    with ward.called(coordinator()):
        assert "does not speak TLS" in ward.find("TLS").text


def test_silence_is_told_after_seconds(ward: Ward, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(line, "_SECONDS", 0.3)
    with ward.called(Silent):
        assert "no answer in time" in ward.find("TLS").text


def test_a_refusal_comes_in_the_coordinators_own_words(ward: Ward):
    refusal = coordinator(403, json.dumps({"detail": "va's tls certificate was revoked"}).encode())
    with ward.called(refusal, ward.context()):
        found = ward.look()
    assert found["TLS"].level == "ok"
    assert found["admission"].level == "fail"
    assert found["admission"].text == "the coordinator refuses: va's tls certificate was revoked"


def test_a_certificate_that_tls_itself_refuses_is_an_admission_refused(ward: Ward, strangers: Path):
    context = ward.context()
    other = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    other.minimum_version = ssl.TLSVersion.TLSv1_3
    home = ward.folder / "consortium"
    other.load_cert_chain(home / "public/roster/coordinator.tls.crt", home / "coordinator/tls.key")
    other.load_verify_locations(strangers / "consortium/public/ca.crt")
    other.verify_mode = ssl.CERT_REQUIRED
    assert context.verify_mode == other.verify_mode
    with ward.called(coordinator(), other):
        found = ward.look()
    assert found["TLS"].level == "ok"
    assert found["admission"].level == "fail"
    assert "does not take this site's certificate" in found["admission"].text


@pytest.mark.parametrize("status", [429, 503])
def test_a_coordinator_that_is_busy_is_a_warning(ward: Ward, status: int):
    with ward.called(coordinator(status), ward.context()):
        assert ward.find("admission").level == "warn"


@pytest.mark.parametrize(("ahead", "level"), [(0.0, "ok"), (-20.0, "warn"), (20.0, "warn"), (90.0, "fail"), (-90.0, "fail")])
def test_clocks_may_differ_by_5_seconds_and_never_by_60(ward: Ward, ahead: float, level: str):
    with ward.called(coordinator(ahead=ahead), ward.context()):
        found = ward.find("clock")
    assert found.level == level
    assert ("behind" if ahead > 0 else "ahead") in found.text or level == "ok"


def test_another_flower_at_the_coordinator_is_refused(ward: Ward):
    with ward.called(coordinator(body=b"ok flower/9.9.0"), ward.context()):
        assert "9.9.0 at the coordinator" in ward.find("Flower").text
    with ward.called(coordinator(), ward.context()):
        assert ward.find("Flower").level == "note"


def test_a_proxy_that_lets_it_through_is_no_obstacle(ward: Ward):
    with ward.called(coordinator(), ward.context()), listening(proxy()) as port:
        ward.change(network={"proxy": f"http://127.0.0.1:{port}"})
        found = ward.look()
    assert [found[name].level for name in ("proxy", "TCP", "TLS", "admission", "clock")] == ["ok"] * 5
    assert "the proxy connects" in found["TCP"].text


def test_a_proxy_that_is_away_or_forbids_is_told_apart(ward: Ward):
    with ward.called(coordinator(), ward.context()):
        with listening(proxy(allows=False)) as port:
            ward.change(network={"proxy": f"http://127.0.0.1:{port}"})
            found = ward.look()
        assert found["proxy"].level == "ok"
        assert "403" in found["TCP"].text
        assert "allow CONNECT" in found["TCP"].do
        assert ward.find("proxy").level == "fail"


# ---- the machine


def test_a_disk_without_room_is_found(ward: Ward, monkeypatch: pytest.MonkeyPatch):
    def free(gib: float) -> None:
        usage = type("Usage", (), {"free": int(gib * 2**30)})
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)  # type: ignore[attr-defined]

    free(0.5)
    assert ward.find("disk").level == ward.find("disk", ward.plan).level == "fail"
    free(1.5)  # the plan's model is tiny, the largest one that is allowed is not
    assert ward.find("disk").level == "warn"
    assert ward.find("disk", ward.plan).level == "ok"


def test_a_state_folder_that_cannot_be_written_is_found(ward: Ward, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert "Read-only file system" in ward.find("state folder").text


def test_a_state_folder_that_others_may_write_is_a_warning(ward: Ward):
    ward.state.chmod(0o777)
    assert ward.find("state folder").level == "warn"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_found(ward: Ward):
    ward.change(compute={"device": "cuda:7"})
    assert "0 GPUs were found" in ward.find("device").text


@pytest.mark.gpu
def test_a_gpus_memory_is_told_and_a_step_of_the_plan_is_tried_on_it(ward: Ward):
    ward.change(compute={"device": "cuda", "gpu_share": 0.5})
    assert "GiB free" in ward.find("device").text
    found = ward.find("a step of it", ward.plan)
    assert found.level == "ok", found
    assert "on cuda" in found.text
    assert "of its memory" in found.text


def test_more_threads_or_memory_than_there_is_are_warnings(ward: Ward):
    ward.change(compute={"device": "cpu", "threads": 1024})
    assert ward.find("device").level == "warn"
    ward.change(compute={"threads": 1, "memory_gib": 1e6})
    assert "memory_gib" in ward.find("device").do


def test_a_guard_that_lets_a_program_start_is_found(ward: Ward, monkeypatch: pytest.MonkeyPatch):
    assert ward.find("import guard").level == "ok"
    let_through = subprocess.CompletedProcess([], 0, stdout="import\n", stderr="")
    monkeypatch.setattr(machine.subprocess, "run", lambda *args, **kwargs: let_through)  # type: ignore[attr-defined]
    assert "do not run wardround join" in ward.find("import guard").do
    assert not list(ward.state.glob(".doctor-*"))


# ---- records and budget


def test_records_that_do_not_fit_are_found_and_their_file_is_named_here_alone(ward: Ward):
    source = SiteConfig.load(ward.site).data["heart-disease"].path
    lines = source.read_text().splitlines()
    (ward.site.parent / "bad.csv").write_text("\n".join([*lines[:5], "much,too,short"]))
    ward.change(data={"heart-disease": tomli_section(ward) | {"path": "bad.csv"}})
    found = ward.find("records of heart-disease")
    assert found.level == "fail"
    assert "bad.csv" in found.local
    assert "bad.csv" not in found.text + found.do


def tomli_section(ward: Ward) -> dict[str, object]:
    import tomllib

    section: dict[str, object] = tomllib.loads(ward.site.read_text())["data"]["heart-disease"]
    return section


def test_what_is_sent_to_support_does_not_depend_on_how_many_patients_there_are(ward: Ward):
    many = ward.find("records of heart-disease")
    ward.change(allow={"min_patients": 100_000})
    few = ward.find("records of heart-disease")
    assert "at least 50" in many.local
    assert "fewer than 100000" in few.local
    assert (many.level, many.text, many.do) == (few.level, few.text, few.do)


def test_data_for_a_task_that_is_not_allowed_is_a_warning(ward: Ward):
    ward.change(allow={"tasks": []})
    assert "not allowed" in ward.find("records of heart-disease").text


def spend(ward: Ward, steps: NoisedSteps) -> None:
    with PrivacyLedger(ward.state / "ledger.sqlite") as books:
        books.reserve(Cohort("cardiology", 1e9, 1e-5), study="s" * 64, name="other", run="r", steps=steps, steps_per_round=1)


def test_a_plan_that_costs_more_than_is_left_is_found_before_it_comes(ward: Ward):
    assert ward.find("budget of cardiology", ward.plan).level == "ok"
    assert not (ward.state / "ledger.sqlite").exists()
    spend(ward, NoisedSteps(0.5, 1.0, 300))
    assert "costs more than is left" in ward.find("budget of cardiology", ward.plan).text
    assert "nothing is left" in ward.find("budget of cardiology").text


def test_a_site_without_a_budget_is_told(ward: Ward):
    text = ward.site.read_text()
    ward.site.write_text("\n".join(line for line in text.splitlines() if "epsilon_lifetime" not in line))
    assert "no budget is set" in ward.find("budget of cardiology").text


def test_a_ledger_that_is_none_is_found(ward: Ward):
    (ward.state / "ledger.sqlite").write_bytes(b"no ledger at all")
    assert ward.find("budget of cardiology").level == "fail"


# ---- a plan


def test_every_rule_is_told_and_those_that_are_broken_are_the_text(ward: Ward):
    ward.change(allow={"rounds": 2, "epsilon_per_study": 1.0, "parameters": 3})
    found = ward.find("rules", ward.plan)
    assert found.level == "fail"
    assert "3 rounds are more than the 2 allowed" in found.text
    assert "epsilon 3 is more than the 1 allowed" in found.text
    assert "larger than the 3 allowed" in found.text
    assert sum(line.startswith("no: ") for line in found.local.splitlines()) == 3
    assert sum(line.startswith("yes") for line in found.local.splitlines()) == 7


def test_an_approval_is_asked_for_and_found(ward: Ward):
    assert "wardround approve-plan" in ward.find("approval", ward.plan).do
    ward.change(allow={"studies": ["heart-disease"]})
    assert "admitted by its name" in ward.find("approval", ward.plan).text


def test_a_plan_that_is_none_is_a_line_and_no_crash(ward: Ward):
    ward.plan.write_text("rounds = 0")
    found = ward.look(ward.plan)
    assert found["plan"].level == "fail"
    assert found["rules"].level == found["a step of it"].level == "skip"


def test_a_round_that_takes_longer_than_the_plan_waits_is_found(ward: Ward, monkeypatch: pytest.MonkeyPatch):
    assert "seconds a round on cpu" in ward.find("a step of it", ward.plan).text
    monkeypatch.setattr(plans, "_timed", lambda *args: 9000.0)
    found = ward.find("a step of it", ward.plan)
    assert found.level == "fail"
    assert "the plan waits 60 minutes" in found.text


@pytest.mark.parametrize(("hours", "level"), [("00:00-23:30", "ok"), ("20:00-06:00", "warn"), ("06:00-05:30", "ok")])
def test_hours_that_outlast_the_plans_patience_are_a_warning(ward: Ward, hours: str, level: str):
    assert "any time" in ward.find("hours", ward.plan).text
    ward.change(compute={"hours": hours})
    assert ward.find("hours", ward.plan).level == level


def test_a_step_beyond_the_memory_is_found(ward: Ward, monkeypatch: pytest.MonkeyPatch):
    def too_large(*args: object) -> float:
        raise MemoryError

    monkeypatch.setattr(plans, "_timed", too_large)
    assert "does not fit into memory" in ward.find("a step of it", ward.plan).text


def test_a_step_opens_no_record(ward: Ward, monkeypatch: pytest.MonkeyPatch):
    import wardround.client.data as data

    def opened(*args: object) -> None:
        raise AssertionError("a record was opened")

    monkeypatch.setattr(data, "load", opened)
    assert ward.find("a step of it", ward.plan).level == "ok"
    assert not (ward.state / "ledger.sqlite").exists()


def test_a_signed_study_is_as_good_as_its_plan(ward: Ward):
    signed = ward.folder / "heart.signed"
    from wardround.common.agreement import SignedStudy
    from wardround.common.plan import SignedText
    from wardround.common.trust.signing import Signer

    study = SignedText.load(ward.plan)
    SignedStudy.sign(study, Signer.load("coordinator", ward.folder / "consortium/coordinator/sign.key")).save(signed)
    assert ward.find("plan", signed).text == ward.find("plan", ward.plan).text


# ---- how checks are gone through


@pytest.fixture
def case(ward: Ward) -> Case:
    return Case(ward.site, SiteConfig.load(ward.site))


def test_what_does_not_end_is_given_up(case: Case):
    over = threading.Event()

    def hang(case: Case) -> Finding:
        over.wait(30)
        return Finding("ok", "late")

    began = time.monotonic()
    found = examine([Check("a", hang, seconds=0.05), Check("b", hang, seconds=0.05, late="warn")], case)
    over.set()
    assert time.monotonic() - began < 5
    assert (found["a"].level, found["b"].level) == ("fail", "warn")
    assert found["a"].text == "not over after 0.05 s"


def test_a_check_that_falls_is_a_line_and_its_error_stays_here(case: Case):
    def fall(case: Case) -> Finding:
        raise KeyError("patient 4711")

    found = examine([Check("a", fall), Check("b", lambda case: Finding("ok", "fine"))], case)
    assert found["a"].level == "fail"
    assert "KeyError" in found["a"].text
    assert "4711" not in found["a"].text
    assert "4711" in found["a"].local
    assert found["b"].level == "ok"


def test_what_a_failed_check_leaves_open_is_not_looked_at(case: Case):
    def refuse(case: Case) -> Finding:
        raise Unwell("no", "do this")

    def fine(case: Case) -> Finding:
        return Finding("ok", "fine")

    names: list[str] = []
    found = examine(
        [Check("a", refuse), Check("b", fine, needs=("a",)), Check("c", fine, needs=("b",)), Check("d", fine)],
        case,
        begun=names.append,
    )
    assert [finding.level for finding in found.values()] == ["fail", "skip", "skip", "ok"]
    assert "because of: a" in found["b"].text
    assert names == ["a", "b", "c", "d"]


def test_the_help_says_what_the_exit_codes_mean():
    said = CliRunner().invoke(application(), ["doctor", "--help"]).output
    assert "Exit code 0" in said
    assert {"--plan", "--json", "--bundle"} <= set(said.split())


def test_lines_follow_each_other_as_they_are_found(ward: Ward, capsys: pytest.CaptureFixture[str]):
    from wardround.client.doctor.report import printer

    begun, done, close = printer(["clock"], quiet=False)
    begun("clock")
    done("clock", Finding("fail", "90 s off", "set it", "here [red] only"))
    close()
    said = capsys.readouterr().out.splitlines()
    assert said == ["FAIL clock 90 s off. Do: set it", f"{'':<11}here [red] only"]
    _, done, close = printer(["clock"], quiet=True)
    done("clock", Finding("ok", "fine"))
    close()
    assert capsys.readouterr().out == ""


@pytest.mark.live
def test_the_real_coordinator_admits_a_site_and_refuses_it_once_revoked(tmp_path: Path):
    sites = Scenario.prepare(STUDIES / "heart-disease.toml", tmp_path / "run", Changes(rounds=3)).sites
    with lab(tmp_path, {"va": sites["va"]}) as real:
        real.serve()
        ward = Ward(tmp_path)
        deadline = time.monotonic() + 120
        while ward.find("admission").level != "ok" and time.monotonic() < deadline:
            time.sleep(0.5)  # its port is open before it answers
        found = ward.look()
        assert {finding.level for finding in found.values()} <= {"ok", "note"}, found
        wardround("revoke", "va", "--consortium", real.consortium)
        found = ward.look()
        assert found["TLS"].level == "ok"
        assert found["admission"].text == "the coordinator refuses: va's tls certificate was revoked"
        assert found["Flower"].level == "skip"
