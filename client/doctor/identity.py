"""Whether the coordinator could know this site: enrolment, keys, certificates, the revocation list, another process."""

from __future__ import annotations

import fcntl

from wardround.client.doctor.findings import Case, Finding, Unwell
from wardround.common.errors import ConfigError
from wardround.common.trust.bundle import Bundle
from wardround.common.trust.certificates import COORDINATOR, USES, fingerprint, same_fingerprint, utc_now
from wardround.common.trust.enrolment import read_key
from wardround.common.trust.expiry import Status, statuses
from wardround.common.trust.private_files import make_private_folder

_RENEW = "wardround enroll SITE.toml --renew, and send the request to the consortium's administrator"


def enrolled(case: Case) -> Finding:
    """A welcome is installed, of the authority whose fingerprint was told."""
    folder = case.folder
    if not (case.config.state / "enrolment.json").exists():
        raise Unwell("this site is not enrolled", "wardround enroll SITE.toml --token ... as the consortium told you")
    noted = folder.enrolment()
    if not folder.is_enrolled:
        raise Unwell("the consortium's welcome is not installed yet", "wardround enroll SITE.toml --welcome FILE")
    if not same_fingerprint(fingerprint(Bundle.of(folder.trust, ()).authority), noted.authority):
        raise Unwell(
            "the trust folder is of another authority than the one whose fingerprint was given",
            "do not go on; call the consortium's administrator",
        )
    return Finding("ok", "with the authority whose fingerprint was given")


def keys(case: Case) -> Finding:
    """Three keys that nobody else can read, and that the certificates are for."""
    folder = case.folder
    if not folder.keys.is_dir():
        raise Unwell("the folder of keys is not there", "restore the state folder, or enrol anew with a new token")
    enrolled_with = Bundle.of(folder.trust, [folder.name]).certificates
    try:
        make_private_folder(folder.keys)
        found = {use: read_key(folder.key(use), use) for use in USES["site"]}
    except ConfigError as error:
        raise Unwell(
            "a key file or its folder is missing, damaged, another user's, or open to others",
            "as the user who runs wardround join: chown it, chmod 700 the folder and 600 the keys; if others may have read a "
            "key, tell the consortium",
            str(error),
        ) from None
    for use, key in found.items():
        if enrolled_with[folder.name, use].public_key() != key.public_key():
            raise Unwell(f"the {use} key is not the one that was enrolled", "put back the enrolled keys, or enrol anew")
    return Finding("ok", "three keys, readable by their owner alone")


def certificates(case: Case) -> Finding:
    """What this site shows, the coordinator's and the authority's hold for a while; other hospitals' are their own affair."""
    ours = {case.folder.name, COORDINATOR, "authority"}
    rows = [row for row in statuses(case.folder.trust, utc_now()) if row.name in ours and row.use != "revocation list"]
    return _judged(rows, _RENEW)


def revocations(case: Case) -> Finding:
    """The revocation list is in its time."""
    return _judged(
        [row for row in statuses(case.folder.trust, utc_now()) if row.use == "revocation list"],
        "wardround join fetches it while it runs; once it has ended, install a fresh welcome from the administrator with "
        "wardround enroll SITE.toml --welcome FILE",
    )


def process(case: Case) -> Finding:
    """Whether a `wardround join` serves this site now; both answers are fine."""
    try:
        with (case.config.state / "join.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return Finding("note", "no wardround join has run here yet")
    except BlockingIOError:
        return Finding("note", "wardround join is running")
    return Finding("note", "wardround join is not running")


def _judged(rows: list[Status], do: str) -> Finding:
    revoked = [row for row in rows if row.level == "revoked"]
    if revoked:
        raise Unwell(f"{revoked[0].name}'s certificates were revoked", "call the consortium's administrator")
    broken = [row for row in rows if row.days_left is None]
    if broken:
        raise Unwell(f"{broken[0].name}'s {broken[0].use} certificate: {broken[0].note}", do)
    soonest = min(rows, key=lambda row: row.days_left or 0.0)
    left = soonest.days_left or 0.0
    what = "the revocation list" if soonest.use == "revocation list" else f"{soonest.name}'s {soonest.use} certificate"
    if left < 0:
        raise Unwell(f"{what} ended {-left:g} days ago", do)
    text = f"{left:g} days left ({what})"
    if soonest.level == "error":
        raise Unwell(text, do)
    return Finding("warn", text, do) if soonest.level == "warning" else Finding("ok", text)
