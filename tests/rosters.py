"""A small consortium for tests that need signatures: a trust folder with everybody's signing certificates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from wardround.common.plan import SignedText, StudyPlan
from wardround.common.trust.certificates import Authority, Subject, fingerprint, pem
from wardround.common.trust.enrolment import key_text
from wardround.common.trust.private_files import write_private
from wardround.common.trust.roster import Roster
from wardround.common.trust.signing import Signer
from wardround.common.trust.site_folder import Enrolment, SiteFolder

NOW = datetime.now(UTC)
SITES = ("cleveland", "hungarian", "va")
PLAN = """
name = "heart"
task = "heart-disease"
rounds = 10
min_approvals = 2
[sites]
cleveland = 200
hungarian = 200
va = 130
[privacy]
epsilon = 3.0
"""

ALLOW = 'tasks = ["heart-disease"]\nepsilon_per_study = 4.0\nepsilon_lifetime = 8.0'


def a_study(text: str = PLAN) -> SignedText:
    return SignedText(StudyPlan.parse(text), text)


class Consortium:
    """An authority, its trust folder, and the keys of a coordinator and of sites."""

    def __init__(self, folder: Path, names: tuple[str, ...] = ("coordinator", *SITES)) -> None:
        self.folder = folder
        (folder / "roster").mkdir(parents=True)
        self.authority = Authority.found("test", NOW)
        (folder / "ca.crt").write_bytes(pem(self.authority.certificate))
        self.signers: dict[str, Signer] = {}
        self.keys: dict[str, Ed25519PrivateKey] = {}
        self.certificates: dict[str, x509.Certificate] = {}
        for name in names:
            self.enrol(name)
        self.revoke()
        self.roster = Roster(folder)

    def enrol(self, name: str) -> Signer:
        """A new key and certificate for `name`, in place of any older."""
        key = self.keys[name] = Ed25519PrivateKey.generate()
        certificate = self.authority.issue(key.public_key(), Subject(name, "sign"), NOW - timedelta(minutes=1))
        (self.folder / "roster" / f"{name}.sign.crt").write_bytes(pem(certificate))
        self.certificates[name] = certificate
        self.signers[name] = Signer(name, key)
        return self.signers[name]

    def revoke(self, *names: str) -> None:
        """The list of everybody who is revoked."""
        serials = {self.certificates[name].serial_number: NOW for name in names}
        listed = self.authority.revocation_list(serials, 1 + len(names), NOW)
        (self.folder / "crl.pem").write_bytes(pem(listed))

    def site_file(self, folder: Path, site: str = "va", allow: str = ALLOW) -> Path:
        """An enrolled hospital's folder; its site file."""
        home = SiteFolder(site, folder / "state")
        home.keys.mkdir(parents=True, mode=0o700)
        write_private(home.key("sign"), key_text(self.keys[site], "sign"))
        home.trust.symlink_to(self.folder)
        home.note(Enrolment(fingerprint(self.authority.certificate), "127.0.0.1:9092"))
        file = folder / "site.toml"
        file.write_text(f'site = "{site}"\n[allow]\n{allow}\n[data.heart-disease]\nloader = "table"\npath = "records.csv"\n')
        return file


def a_stranger(name: str) -> Signer:
    """Somebody with another key who calls himself `name`."""
    return Signer(name, Ed25519PrivateKey.generate())
