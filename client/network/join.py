"""`wardround join`: one resident process of a hospital. It calls out, waits for orders, and comes back after every break."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import ssl
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from wardround.client.network.link import Line, Mail, Offline
from wardround.client.policy import SiteConfig
from wardround.common.errors import ConfigError, LinkRefused, TrustRefused, WardroundError
from wardround.common.files import write_atomically
from wardround.common.service import LOG_BYTES, alone, logging_to, quiet_flower
from wardround.common.trust.certificates import UNREADABLE, fingerprint, same_fingerprint, utc_now
from wardround.common.trust.enrolment import read_key
from wardround.common.trust.private_files import read_private
from wardround.common.trust.site_folder import SiteFolder

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0  # seconds between two attempts to reach the coordinator
_REFUSED_WAIT = 30.0
_RENEW_SECONDS = 3600.0  # between two looks at the revocation list

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from wardround.client.network.desk import Desk

log = logging.getLogger("wardround.site")


class Leaving(BaseException):
    """SIGTERM or Ctrl-C: whatever is under way is given up, and nothing is half-written."""


def join(path: Path, make_app: Callable[[], ClientApp] | None = None) -> None:
    """Serve this hospital until a signal says otherwise.

    Args:
        path: the site file.
        make_app: tests inject an app with repeatable coins; no configuration can.

    Raises:
        ConfigError: a file is not as it must be, or another process serves this site.
        TrustRefused: this site is not enrolled, or its certificates do not hold.
    """
    path = path.resolve()
    config = SiteConfig.load(path)
    os.umask(0o077)
    quiet_flower(config.state / "flower")
    with (
        alone(config.state, "join", "another `wardround join` serves this site"),
        logging_to(config.state / "site.log", largest=LOG_BYTES),
        contextlib.suppress(Leaving),
    ):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave)
        _serve(path, config, make_app)


def _serve(path: Path, config: SiteConfig, make_app: Callable[[], ClientApp] | None) -> None:
    from wardround.client.network.desk import Desk
    from wardround.client.network.guard import raise_guard

    folder = SiteFolder(config.site, config.state)
    line = opened_line(config, folder)
    try:
        _patiently("connecting", lambda: _connect(config, line))
        _renew_trust(folder, line)  # a list that went stale while this process was down would refuse everybody
        renewed = time.monotonic()
        desk = Desk(path, config, make_app)
        raise_guard(config.state)
        log.info("connected")
        print(f"{config.site} is connected; log in {config.state / 'site.log'}", flush=True)
        try:
            while True:
                mail = _patiently("waiting for orders", line.mail)
                if mail is not None:
                    _deal_with(config, desk, line, mail)
                if time.monotonic() - renewed > _RENEW_SECONDS:
                    _renew_trust(folder, line)
                    renewed = time.monotonic()
        finally:
            desk.close()
    finally:
        line.close()


def _deal_with(config: SiteConfig, desk: Desk, line: Line, mail: Mail) -> None:
    """One order from envelope to reply; an order nobody waits for any more is dropped."""
    try:
        began = time.monotonic()
        settings = _patiently("fetching a plan", lambda: line.settings(mail.run), refusals=False)
        message = _patiently("fetching an order", lambda: line.fetch(mail, most=5 * config.allow.parameters), refusals=False)
        action = message.metadata.message_type
        _wait_for_hours(config, action)
        fetched = time.monotonic()
        reply = desk.answer(message, settings)
        answered = time.monotonic()
        _patiently("sending a reply", lambda: line.send(reply, answered - fetched), refusals=False)
        parts = (fetched - began, answered - fetched, time.monotonic() - answered)
        log.info("%s: fetched in %.1f s, carried out in %.1f s, answered in %.1f s", action, *parts)
    except WardroundError as error:
        log.warning("an order is dropped: %s%s", error, f" ({error.detail})" if error.detail else "")
    except Exception:  # Flower's own code on what a coordinator made up: the next order may be a good one
        log.exception("an order is dropped")


def _connect(config: SiteConfig, line: Line) -> None:
    book = config.state / "connection.json"
    last = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        last = int(json.loads(book.read_text())["number"])
    number = line.connect(last)
    if number != last:
        write_atomically(book, json.dumps({"number": number}).encode())


def opened_line(config: SiteConfig, folder: SiteFolder) -> Line:
    """The line to the coordinator that this site was enrolled with.

    Raises:
        ConfigError: this site is not enrolled, or a key is not as it must be.
        TrustRefused: the authority is not the one whose fingerprint was given at enrolment.
    """
    noted = folder.enrolment()
    read_private(folder.key("tls"))  # refuses one that others could read
    try:
        authority = x509.load_pem_x509_certificate((folder.trust / "ca.crt").read_bytes())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(folder.trust / "ca.crt")
        context.load_cert_chain(folder.trust / "roster" / f"{config.site}.tls.crt", folder.key("tls"))
    except (OSError, *UNREADABLE, ssl.SSLError) as error:
        raise ConfigError(f"the TLS key and certificate of {config.site} cannot be used: {error}") from None
    if not same_fingerprint(fingerprint(authority), noted.authority):
        raise TrustRefused(f"{folder.trust} is of another authority than the one whose fingerprint was given at enrolment")
    node_key = read_key(folder.key("node"), "node")
    assert isinstance(node_key, ec.EllipticCurvePrivateKey)  # `read_key` checks the kind
    return Line(config.network.coordinator or noted.coordinator, context, node_key, config.network.proxy)


def _renew_trust(folder: SiteFolder, line: Line) -> None:
    """Take the newest revocation list and certificates; they prove themselves, whoever hands them over."""
    try:
        if changed := folder.take_news(line.trust(), utc_now()):
            log.info("renewed: %s", ", ".join(changed))
        # also what `enroll --welcome` put there meanwhile: a certificate ends sooner than this process
        line.show(folder.trust / "roster" / f"{folder.name}.tls.crt", folder.key("tls"))
    except (WardroundError, OSError, Offline) as error:
        log.warning("the revocation list could not be renewed: %s", error)


def _patiently(what: str, act: Any, *, refusals: bool = True) -> Any:
    """`act` once the coordinator can be reached, for ever; with `refusals` also once it changes its mind."""
    wait, told = _FIRST_WAIT, ""
    while True:
        try:
            found = act()
        except Offline as error:
            said, pause = str(error), wait
            wait = min(_LONGEST_WAIT, 2 * wait)
        except LinkRefused as error:
            if not refusals:
                raise
            said, pause = str(error), _REFUSED_WAIT
        else:
            if told:
                log.info("%s: the coordinator answers again", what)
            return found
        if said != told:  # once, not every half minute
            log.warning("%s: %s; trying again for ever", what, said)
            print(f"{what}: {said}", flush=True)
            told = said
        time.sleep(pause * random.uniform(0.7, 1.0))


def _wait_for_hours(config: SiteConfig, action: str) -> None:
    """Keep an order to train until this site's hours; the coordinator waits as long as its plan says."""
    if action != "train":
        return
    while (seconds := config.compute.closed_for(datetime.now())) > 0:
        log.info("outside of this site's hours (%s); the order is kept", config.compute.hours)
        time.sleep(min(seconds, 60.0))


def _leave(number: int, frame: object) -> None:
    if threading.current_thread() is threading.main_thread():
        raise Leaving
