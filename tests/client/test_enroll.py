"""A hospital gets in with what its IT types, keeps its secrets, and believes only the authority it was told of."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from wardround.client.enroll import enroll, install
from wardround.common.errors import ConfigError, TrustRefused
from wardround.common.trust.bundle import Bundle
from wardround.common.trust.certificates import COORDINATOR, Authority, Subject, pem, utc_now
from wardround.common.trust.enrolment import Token, new_key
from wardround.common.trust.site_folder import SiteFolder
from wardround.server.consortium import verbs
from wardround.server.consortium.office import Consortium, Founding

FINGERPRINT = re.compile(r"(?:[0-9A-F]{4}-){15}[0-9A-F]{4}")
SECRETS = ("tls.key", "sign.key", "node.key")


class Desk:
    """Somebody who types commands in a folder; a refusal is raised, other ends are checked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._app = typer.Typer(pretty_exceptions_enable=False)
        for verb in (verbs.init_consortium, verbs.invite, verbs.approve, verbs.revoke, verbs.certificates, enroll):
            self._app.command(name=verb.__name__.replace("_", "-"))(verb)

    def type(self, line: str, *, keyboard: str = "", code: int = 0) -> str:
        """The output of one line, typed here."""
        done = CliRunner().invoke(self._app, line.split(), input=keyboard)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == code, done.output
        return done.output

    def invited(self, site: str, hours: int = 72) -> str:
        """What the hospital is told: options of enroll."""
        said = self.type(f"invite {site} --consortium heart --hours {hours}")
        return said[said.index("--token") :].replace("\\\n", "")

    def approved(self, site: str) -> None:
        """Ask, compare, approve, install."""
        asked = self.type(f"enroll {site}.toml {self.invited(site)}")
        self.type(f"approve {site}.request --consortium heart --fingerprint {fingerprint_in(asked)}")
        self.type(f"enroll {site}.toml --welcome {site}.welcome")


def fingerprint_in(text: str) -> str:
    found = FINGERPRINT.search(text)
    assert found, text
    return found[0]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    for site in ("va", "hungarian"):
        (tmp_path / f"{site}.toml").write_text(f'site = "{site}"\nstate = "{site}"\n')
    desk = Desk(tmp_path)
    desk.type("init-consortium heart --name heart --coordinator fl.example.org:443")
    return desk


def site(name: str = "va") -> SiteFolder:
    return SiteFolder.load(Path(f"{name}.toml"))


def secrets(name: str = "va") -> dict[str, bytes]:
    return {secret: (site(name).keys / secret).read_bytes() for secret in SECRETS}


# ---- the way in


def test_a_hospital_is_enrolled_by_what_the_page_says(desk: Desk):
    desk.approved("va")
    roster = site().roster()
    assert roster.names() == [COORDINATOR, "va"]
    assert roster.sites() == ["va"]
    roster.check(site().signer().sign("reply", {"round": 1}), role="site")
    assert site().enrolment().coordinator == "fl.example.org:443"
    assert "va           sign             " in desk.type("certificates --site va.toml")


def test_nothing_secret_leaves_the_hospital(desk: Desk):
    told = desk.invited("va")
    token = re.search(r"token-\w+", told)
    said = desk.type(f"enroll va.toml {told}")
    sent = Path("va.request").read_text()
    assert token
    for secret in (token[0], token[0].removeprefix("token-")):
        assert secret not in sent
        assert secret not in "".join(p.read_text("latin1") for p in Path("va").rglob("*") if p.is_file())
    for data in secrets().values():
        for line in data.decode().splitlines()[1:-1]:
            assert line not in sent + said
    assert {p.name: p.stat().st_mode & 0o777 for p in site().keys.iterdir()} == dict.fromkeys(SECRETS, 0o600)
    assert site().keys.stat().st_mode & 0o777 == 0o700


def test_flower_reads_the_key_made_for_it(desk: Desk):
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    desk.type(f"enroll va.toml {desk.invited('va')}")
    key = load_ssh_private_key(secrets()["node.key"], password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"


def test_asking_again_before_the_welcome_is_harmless(desk: Desk):
    told = desk.invited("va")
    first = desk.type(f"enroll va.toml {told}")
    kept = secrets()
    (site().keys / "node.key").unlink()  # as if the first time was cut short
    desk.type(f"enroll va.toml {told}")
    assert {name: data for name, data in secrets().items() if name != "node.key"} == {
        name: data for name, data in kept.items() if name != "node.key"
    }
    kept, second = secrets(), desk.type(f"enroll va.toml {told}")
    assert secrets() == kept
    assert fingerprint_in(second) == fingerprint_in(desk.type(f"enroll va.toml {told}")) != fingerprint_in(first)
    desk.type(f"approve va.request --consortium heart --fingerprint {fingerprint_in(second)}")
    desk.type("enroll va.toml --welcome va.welcome")


def test_a_token_can_be_typed_unseen(desk: Desk):
    told = desk.invited("va").replace("\n", " ")
    token = re.search(r"token-\w+", told)
    assert token
    said = desk.type(f"enroll va.toml {told.replace(token[0], '-')}", keyboard=f"{token[0]}\n")
    assert token[0] not in said
    desk.type("approve va.request --consortium heart", keyboard="y\n")


def test_an_enrolled_site_keeps_its_keys(desk: Desk):
    desk.approved("va")
    kept = secrets()
    with pytest.raises(ConfigError, match="va is enrolled already, and its keys are not replaced"):
        desk.type(f"enroll va.toml {desk.invited('va')}")
    assert secrets() == kept


def test_a_renewal_needs_no_token_and_keeps_the_keys(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.approved("va")
    kept, before = secrets(), site().roster().tls("va")
    later = utc_now() + timedelta(days=5)
    monkeypatch.setattr("wardround.common.trust.certificates.utc_now", lambda: later)
    asked = desk.type("enroll va.toml --renew")
    said = desk.type(f"approve va.request --consortium heart --fingerprint {fingerprint_in(asked)}")
    assert "The renewal of va has the fingerprint" in said
    assert f"{later + timedelta(days=90):%Y-%m-%d}" in desk.type("enroll va.toml --welcome va.welcome")
    after = site().roster(now=lambda: later).tls("va")
    assert after.not_valid_after_utc > before.not_valid_after_utc
    assert secrets() == kept


def test_only_an_enrolled_site_can_renew(desk: Desk):
    with pytest.raises(ConfigError, match="va is not enrolled"):
        desk.type("enroll va.toml --renew")
    desk.type(f"enroll va.toml {desk.invited('va')}")
    with pytest.raises(ConfigError, match="the welcome is not installed yet"):
        desk.type("enroll va.toml --renew")


# ---- what is typed wrong


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "wanted one of --token, --welcome, --renew"),
        ("--renew --welcome va.welcome", "wanted one of --token, --welcome, --renew"),
        ("--token token-12", "--ca-fingerprint and --coordinator are wanted too"),
        ("--token token-12 --ca-fingerprint AA --coordinator a.org", "that is no token"),
        (f"--token {Token(bytes(32)).text()} --ca-fingerprint AA11 --coordinator a.org", "wanted all 64 hex digits"),
        (f"--token {Token(bytes(32)).text()} --ca-fingerprint {'AA' * 32} --coordinator https://a.org", "is no address"),
        ("--welcome none.welcome", "none.welcome cannot be read"),
        ("--welcome va.toml", "that is no welcome"),
    ],
)
def test_what_is_typed_wrong_makes_no_key(desk: Desk, options: str, said: str):
    with pytest.raises((ConfigError, TrustRefused), match=said):
        desk.type(f"enroll va.toml {options}")
    assert not list(Path().rglob("va/keys/*"))
    assert not Path("va.request").exists()


@pytest.mark.parametrize(
    "content", ["", "site = 3", 'site = "../va"', 'site = "coordinator"', 'site = "va"\nstate = 3', "a = [", "[" * 5000]
)
def test_a_site_file_without_a_site_is_refused(desk: Desk, content: str):
    Path("va.toml").write_text(content)
    with pytest.raises(ConfigError, match=r"va\.toml"):
        desk.type("enroll va.toml --renew")


def test_another_fingerprint_than_the_hospital_reads_approves_nothing(desk: Desk):
    asked = desk.type(f"enroll va.toml {desk.invited('va')}")
    wrong = fingerprint_in(asked)[:-4] + "0000"
    with pytest.raises(TrustRefused, match="nothing was issued"):
        desk.type(f"approve va.request --consortium heart --fingerprint {wrong}")
    desk.type("approve va.request --consortium heart", keyboard="n\n", code=1)
    desk.type("approve va.request --consortium heart", keyboard="", code=1)
    assert not Path("va.welcome").exists()
    assert not list(Path("heart/public/roster").glob("va.*"))


# ---- welcomes that are not believed


def test_a_welcome_of_another_authority_is_refused(desk: Desk, tmp_path: Path):
    desk.type(f"enroll va.toml {desk.invited('va')}")
    rogue = Consortium.found(tmp_path / "rogue", Founding("heart", "fl.example.org:443"), utc_now())
    Path("heart").rename("real")
    rogue.folder.rename("heart")
    asked = desk.type(f"enroll va.toml {desk.invited('va')}".replace(rogue_fingerprint(), real_fingerprint()))
    desk.type(f"approve va.request --consortium heart --fingerprint {fingerprint_in(asked)}")
    with pytest.raises(TrustRefused, match="another authority than the one whose fingerprint was given"):
        desk.type("enroll va.toml --welcome va.welcome")
    assert not site().trust.exists()


def rogue_fingerprint() -> str:
    return Consortium(Path("heart")).fingerprint


def real_fingerprint() -> str:
    return Consortium(Path("real")).fingerprint


def test_a_welcome_that_was_not_asked_for_is_refused(desk: Desk):
    desk.approved("va")
    with pytest.raises(ConfigError, match="hungarian is not enrolled"):
        desk.type("enroll hungarian.toml --welcome va.welcome")


def test_another_sites_welcome_is_refused(desk: Desk):
    desk.approved("va")
    desk.type(f"enroll hungarian.toml {desk.invited('hungarian')}")
    with pytest.raises(TrustRefused, match="this welcome is not for hungarian"):
        desk.type("enroll hungarian.toml --welcome va.welcome")
    assert not site("hungarian").trust.exists()


def test_a_welcome_for_other_keys_is_refused(desk: Desk):
    asked = desk.type(f"enroll va.toml {desk.invited('va')}")
    desk.type(f"approve va.request --consortium heart --fingerprint {fingerprint_in(asked)}")
    site().keys.rename("elsewhere")
    desk.type(f"enroll va.toml {desk.invited('va')}")
    with pytest.raises(TrustRefused, match="certificate is for another key than this site's"):
        desk.type("enroll va.toml --welcome va.welcome")


@pytest.fixture
def welcome(desk: Desk) -> Bundle:
    asked = desk.type(f"enroll va.toml {desk.invited('va')}")
    desk.type(f"approve va.request --consortium heart --fingerprint {fingerprint_in(asked)}")
    return Bundle.parse(Path("va.welcome").read_text())


def test_a_welcome_survives_the_way(welcome: Bundle):
    assert Bundle.parse(welcome.text()) == welcome
    until = install(site(), welcome, utc_now())
    assert until == welcome.certificates["va", "tls"].not_valid_after_utc


def test_a_welcome_with_a_forged_part_is_refused(welcome: Bundle):
    rogue = Authority.found("heart", utc_now())
    for holder in welcome.certificates:
        name, use = holder
        forged = rogue.issue(new_key(use).public_key(), Subject(name, use), utc_now())
        with pytest.raises(TrustRefused, match="is not issued by this consortium's authority"):
            install(site(), replace(welcome, certificates={**welcome.certificates, holder: forged}), utc_now())
    with pytest.raises(TrustRefused, match="list is not signed by"):
        install(site(), replace(welcome, revoked=rogue.revocation_list({}, 9, utc_now())), utc_now())
    assert not site().trust.exists()


def test_a_welcome_that_comes_too_late_is_refused(welcome: Bundle):
    with pytest.raises(TrustRefused, match="revocation list held until"):
        install(site(), welcome, utc_now() + timedelta(days=8))


def test_a_welcome_of_a_revoked_site_is_refused(desk: Desk, welcome: Bundle):
    desk.type("revoke va --consortium heart --reason mistake")
    newer = Bundle.of(Path("heart/public"), (COORDINATOR, "va"))
    with pytest.raises(TrustRefused, match=r"va.s \w+ certificate was revoked"):
        install(site(), newer, utc_now())


def test_an_older_list_never_replaces_a_newer_one(desk: Desk, welcome: Bundle):
    install(site(), welcome, utc_now())
    desk.approved("hungarian")
    desk.type("revoke hungarian --consortium heart")
    news = Bundle.of(Path("heart/public"), (COORDINATOR,))
    assert news.install(site().trust) == ["crl.pem"]
    install(site(), welcome, utc_now())
    assert (site().trust / "crl.pem").read_bytes() == pem(news.revoked)


def test_news_bring_revocations_and_the_coordinators_renewal(desk: Desk, welcome: Bundle):
    install(site(), welcome, utc_now())
    roster, later = site().roster(), utc_now() + timedelta(minutes=1)
    Consortium(Path("heart")).renew_coordinator(later)
    news = Bundle.of(Path("heart/public"), (COORDINATOR, "va")).text()
    assert site().take_news(news, later) == ["crl.pem", "roster/coordinator.sign.crt", "roster/coordinator.tls.crt"]
    assert site().take_news(news, later) == []
    assert site().roster(now=lambda: later).signer(COORDINATOR).not_valid_after_utc >= later.replace(microsecond=0) + timedelta(
        days=90
    )
    desk.type("revoke coordinator --consortium heart")
    news = Bundle.of(Path("heart/public"), ()).text()
    assert site().take_news(news, utc_now()) == ["crl.pem"]
    with pytest.raises(TrustRefused, match="was revoked"):
        roster.signer(COORDINATOR)


def test_news_that_do_not_hold_change_nothing(desk: Desk, welcome: Bundle, tmp_path: Path):
    with pytest.raises(ConfigError, match="the welcome is not installed yet"):
        site().take_news(welcome.text(), utc_now())
    install(site(), welcome, utc_now())
    rogue = Consortium.found(tmp_path / "rogue", Founding("heart", "a.org"), utc_now())
    before = {path: path.read_bytes() for path in site().trust.rglob("*.*") if path.is_file()}
    with pytest.raises(TrustRefused, match="another authority"):
        site().take_news(Bundle.of(rogue.public, (COORDINATOR,)).text(), utc_now())
    with pytest.raises(TrustRefused, match="list held until"):
        site().take_news(welcome.text(), utc_now() + timedelta(days=8))
    assert {path: path.read_bytes() for path in before} == before


def test_a_disk_that_is_full_leaves_no_half_of_a_trust_folder(desk: Desk, welcome: Bundle, monkeypatch: pytest.MonkeyPatch):
    whole, written = Path.replace, iter(range(9))

    def dies(path: Path, target: Path) -> Path:
        if next(written) == 3:
            raise OSError(28, "No space left on device")
        return whole(path, target)

    with monkeypatch.context() as crash:
        crash.setattr(Path, "replace", dies)
        with pytest.raises(OSError, match="No space left"):
            install(site(), welcome, utc_now())
    assert not site().is_enrolled
    install(site(), welcome, utc_now())
    assert site().roster().sites() == ["va"]


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"authority": 3, "list": "", "certificates": {}}', "[" * 100_000])
def test_what_is_no_welcome_is_refused(text: str):
    with pytest.raises(TrustRefused, match="that is no welcome"):
        Bundle.parse(text)


@pytest.mark.parametrize("label", ["../va.tls", "va", "va.ca", "coordinator.node", "va.tls.crt"])
def test_a_welcome_can_name_no_other_file(welcome: Bundle, label: str):
    fields = json.loads(welcome.text())
    fields["certificates"][label] = fields["certificates"]["va.tls"]
    with pytest.raises(TrustRefused, match="that is no welcome"):
        Bundle.parse(json.dumps(fields))


def test_a_trust_folder_of_another_authority_is_not_believed_later(desk: Desk, welcome: Bundle):
    install(site(), welcome, utc_now())
    rogue = Authority.found("heart", utc_now())
    (site().trust / "ca.crt").write_bytes(pem(rogue.certificate))
    (site().trust / "crl.pem").write_bytes(pem(rogue.revocation_list({}, 9, utc_now())))
    with pytest.raises(TrustRefused, match="of another authority"):
        site().roster()
    with pytest.raises(TrustRefused, match="from another authority than the one enrolled with"):
        install(site(), welcome, utc_now())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"authority": "AA", "coordinator": "a.org"}', '{"authority": 1}'])
def test_a_damaged_enrolment_is_refused(desk: Desk, welcome: Bundle, content: str):
    (site().state / "enrolment.json").write_text(content)
    with pytest.raises(ConfigError, match=r"enrolment\.json"):
        install(site(), welcome, utc_now())


# ---- the table


def test_certificates_warn_in_time_and_end_with_1(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.approved("va")
    start = utc_now()
    for days, level, code in ((0, "ok", 0), (59, "ok", 0), (61, "warning", 0), (84, "error", 1), (91, "error", 1)):
        monkeypatch.setattr("wardround.common.trust.certificates.utc_now", lambda days=days: start + timedelta(days=days))
        said = desk.type("certificates --consortium heart --renew-list --json", code=code)
        rows = {(row["name"], row["use"]): row for row in json.loads(said)}
        assert {row["level"] for (name, _), row in rows.items() if name == "va"} == {level}
        assert rows["authority", "revocation list"]["level"] == "ok"
        assert rows["va", "tls"]["days_left"] == pytest.approx(90 - days, abs=0.1)
    assert "va           tls" in desk.type("certificates --trust heart/public", code=1)
    desk.type("certificates --consortium heart --renew-coordinator", code=1)  # va's have expired still
    desk.type("revoke va --consortium heart")
    assert desk.type("certificates --consortium heart").count("revoked") == 3  # somebody meant it: no alarm


def test_a_list_that_ends_soon_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    start = utc_now()
    for days, level, code in ((4, "ok", 0), (6, "warning", 0), (8, "error", 1)):
        monkeypatch.setattr("wardround.common.trust.certificates.utc_now", lambda days=days: start + timedelta(days=days))
        assert re.search(rf"revocation list .* {level}\b", desk.type("certificates --trust heart/public", code=code))


def test_a_damaged_trust_folder_is_an_error_in_the_table(desk: Desk):
    Path("heart/public/roster/coordinator.tls.crt").write_bytes(b"noise")
    assert "coordinator  tls              -" in desk.type("certificates --trust heart/public", code=1)
    Path("heart/public/crl.pem").unlink()
    assert "ca.crt or crl.pem is missing" in desk.type("certificates --trust heart/public", code=1)


@pytest.mark.parametrize("options", ["", "--site va.toml --trust heart/public", "--trust heart/public --renew-list"])
def test_a_table_is_of_one_folder(desk: Desk, options: str):
    with pytest.raises(ConfigError, match=r"wanted one of --consortium, --site, --trust|only --consortium can renew"):
        desk.type(f"certificates {options}")


def test_a_passphrase_is_asked_for_where_there_is_one(desk: Desk):
    Path("word").write_text("correct horse\n")
    Path("word").chmod(0o600)
    desk.type("init-consortium closed --name closed --coordinator a.org --passphrase-file word")
    desk.type("certificates --consortium closed --renew-list --passphrase-file word")
    with pytest.raises(ConfigError, match="wants its --passphrase-file"):
        desk.type("certificates --consortium closed --renew-list")
    Path("word").write_text("short\n")
    with pytest.raises(ConfigError, match="at least 8 characters"):
        desk.type("init-consortium other --name other --coordinator a.org --passphrase-file word")


def test_trust_needs_no_torch():
    modules = "bundle, certificates, checks, enrolment, expiry, private_files, roster, signing, site_folder"
    code = f"import sys\nfrom wardround.common.trust import {modules}\nprint('torch' in sys.modules, 'flwr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
