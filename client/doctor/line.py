"""The way to the coordinator, step by step, as `wardround join` goes it: name, proxy, TCP, TLS, admission, clock, version."""

from __future__ import annotations

import email.utils
import re
import socket
import ssl
import time
from dataclasses import dataclass
from datetime import UTC
from importlib.metadata import version

import httpx
from cryptography import x509

from wardround.client.doctor.findings import Case, Finding, Unwell
from wardround.common.errors import TrustRefused
from wardround.common.trust import checks
from wardround.common.trust.addresses import written
from wardround.common.trust.bundle import Bundle
from wardround.common.trust.certificates import COORDINATOR, Subject, utc_now

_SECONDS = 8.0
_CLOCK_WARN, _CLOCK_FAIL = 5.0, 60.0  # seconds; Flower refuses what is signed much earlier or later
_ALERT = re.compile(r"ALERT_(CERTIFICATE_\w+|BAD_CERTIFICATE\w*|UNKNOWN_CA|UNSUPPORTED_CERTIFICATE|ACCESS_DENIED)")
_WHY_NOT = {  # OpenSSL's codes of a server's certificate that is not accepted (x509_vfy.h)
    9: "its certificate is not valid yet; compare this machine's clock",
    10: "its certificate has expired; compare this machine's clock, and tell the coordinator",
    26: "its certificate is good for a site and not for a coordinator",
    62: "its certificate is for another name than the one this site calls",
    64: "its certificate is for another address than the one this site calls",
}


def name(case: Case) -> Finding:
    """The coordinator's name leads to an address; behind a proxy that is the proxy's business."""
    host, port = case.coordinator
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        if case.config.network.proxy:
            return Finding("note", f"{host} is not known here; the proxy looks it up")
        raise Unwell(
            f"the name {host} is not known here",
            "ask for the name in the hospital's DNS, or check network.coordinator",
            str(error),
        ) from None
    return Finding("ok", f"{host} is known")


def proxy(case: Case) -> Finding:
    """The proxy answers and lets a connection through to the coordinator."""
    through = case.config.network.proxy
    if through is None:
        return Finding("ok", "none is configured: connections go straight, whatever HTTPS_PROXY says")
    url = httpx.URL(through)
    _tcp(url.host, url.port or 3128, "the proxy does not answer", "check network.proxy and the firewall between")
    return Finding("ok", "it answers", local=through)


def tcp(case: Case) -> Finding:
    """A connection is made: one outbound port is all that is wanted."""
    host, port = case.coordinator
    where = written(host, port)
    if case.config.network.proxy is None:
        _tcp(
            host, port, f"no connection to {where}", f"open the firewall for outbound TCP to {where}; nothing inbound is wanted"
        )
        return Finding("ok", f"connected to {where}")
    try:
        with httpx.Client(verify=_anybody(case), timeout=_SECONDS, proxy=case.config.network.proxy, trust_env=False) as client:
            client.get(f"https://{where}/health")
    except httpx.ProxyError as error:
        status = str(error)[:60]
        raise Unwell(
            f"the proxy does not let {where} through ({status})",
            f"allow CONNECT to {where} without a password and without looking into TLS",
        ) from None
    except httpx.TransportError:  # beyond the proxy: the next checks say what
        pass
    return Finding("ok", f"the proxy connects to {where}")


@dataclass(frozen=True)
class Answer:
    """What the coordinator said to this site; status 0 where TLS itself ended with its refusal."""

    status: int
    words: str
    date: str
    shown: bytes  # its certificate, DER
    protocol: str
    asked: float  # seconds since 1970, in the middle of the question


def tls(case: Case) -> Finding:
    """TLS 1.3, with a certificate that the pinned authority issued to the coordinator."""
    host, port = case.coordinator
    answer = ask(case)
    if answer.shown:
        certificate, trusted = x509.load_der_x509_certificate(answer.shown), Bundle.of(case.folder.trust, ())
        try:
            checks.check_certificate(certificate, trusted.authority, Subject(COORDINATOR, "tls"), utc_now())
            if checks.is_revoked(certificate, trusted.revoked):
                raise TrustRefused("its certificate was revoked")
        except TrustRefused as error:
            raise Unwell(
                f"{written(host, port)} is not the consortium's coordinator: {error}", "do not go on; call the consortium"
            ) from None
    return Finding("ok", f"{answer.protocol or 'TLS 1.3'}, and the consortium's own authority vouches for the other side")


def admitted(case: Case) -> Finding:
    """The coordinator lets this site in now."""
    answer = ask(case)
    if answer.status == 200:
        return Finding("ok", "the coordinator lets this site in")
    if answer.status == 403:
        raise Unwell(
            f"the coordinator refuses: {answer.words}",
            "call the consortium's administrator; after an enrolment or renewal the coordinator needs the new public folder",
        )
    if answer.status == 0:
        raise Unwell(
            f"the coordinator does not take this site's certificate ({answer.words})",
            "wardround certificates --site SITE.toml says until when it holds; renew it, or call the consortium",
        )
    raise Unwell(
        f"the coordinator answers HTTP {answer.status}: {answer.words}",
        "try again in a minute; then call the consortium",
        level="warn" if answer.status in (429, 503) else "fail",
    )


def clock(case: Case) -> Finding:
    """Both clocks agree, this machine's and the coordinator's; both sign with the time."""
    answer = ask(case)
    found = email.utils.parsedate_to_datetime(answer.date) if answer.date else None
    if found is None:
        return Finding("note", "the coordinator says no time")
    off = answer.asked - found.replace(tzinfo=found.tzinfo or UTC).timestamp() - 0.5  # its seconds are whole ones, cut off
    text = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the coordinator's"
    do = "set this machine's clock (chrony or systemd-timesyncd; timedatectl shows it), or the coordinator's"
    if abs(off) > _CLOCK_FAIL:
        raise Unwell(text, do)
    return Finding("warn", text, do) if abs(off) > _CLOCK_WARN else Finding("ok", text)


def flower(case: Case) -> Finding:
    """The same Flower on both sides, in its first two numbers."""
    here = version("flwr")
    told = re.search(r"flower/([0-9.]+)", ask(case).words)
    if told is None:
        return Finding("note", f"{here} here; the coordinator does not say which it runs")
    if told[1].split(".")[:2] != here.split(".")[:2]:
        raise Unwell(f"{here} here, {told[1]} at the coordinator", "install the version of wardround that the consortium runs")
    return Finding("ok", f"{here} here, {told[1]} at the coordinator")


def ask(case: Case) -> Answer:
    """GET /health as this site; raises `Unwell` where no answer comes from whom it should."""
    where = written(*case.coordinator)
    try:
        with (
            httpx.Client(
                verify=_ours(case), timeout=_SECONDS, proxy=case.config.network.proxy, trust_env=False, follow_redirects=False
            ) as client,
            client.stream("GET", f"https://{where}/health") as response,
        ):
            began = time.time()
            channel = response.extensions["network_stream"].get_extra_info("ssl_object")
            shown, protocol = channel.getpeercert(True) or b"", str(channel.version())
            body = next(response.iter_bytes(4096), b"")
            return Answer(response.status_code, _words(body), response.headers.get("date", ""), shown, protocol, began)
    except httpx.TransportError as error:
        return _unanswered(case, error, where)


def _unanswered(case: Case, error: httpx.TransportError, where: str) -> Answer:
    """What lies behind a failed call: a refusal by TLS is an answer, anything else is raised."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        why = _WHY_NOT.get(cause.verify_code)
        if why:
            raise Unwell(f"{where}: {why}", "call the consortium's administrator") from None
        raise Unwell(
            "this is not the consortium's coordinator: its certificate is not of the authority whose fingerprint was given",
            "check network.coordinator; if a proxy or firewall looks into TLS, exempt this connection from it",
            _shown_by(case, where),
        ) from None
    reason = cause.reason if cause is not None and cause.reason else ""
    if found := _ALERT.search(reason):
        return Answer(0, found[1].replace("_", " ").lower(), "", b"", "TLSv1.3", time.time())
    if "PROTOCOL" in reason:
        raise Unwell(f"{where} does not speak TLS 1.3", "something between ends TLS; exempt this connection from it")
    if cause is not None or isinstance(error, httpx.RemoteProtocolError):
        raise Unwell(f"{where} does not speak TLS as a coordinator does", "check the port in network.coordinator", reason)
    said = "no answer in time" if isinstance(error, httpx.TimeoutException) else "the connection broke"
    raise Unwell(
        f"{where}: {said}", "try again in a minute; then ask the consortium whether wardround serve is running", str(error)
    )


def _shown_by(case: Case, where: str) -> str:
    """Who vouches for the other side instead, for this console: it often names the box that looks into TLS."""
    try:
        with (
            httpx.Client(verify=_anybody(case), timeout=_SECONDS, proxy=case.config.network.proxy, trust_env=False) as client,
            client.stream("GET", f"https://{where}/") as response,
        ):
            der = response.extensions["network_stream"].get_extra_info("ssl_object").getpeercert(True)
            issuer = x509.load_der_x509_certificate(der or b"").issuer.rfc4514_string()
    except (httpx.TransportError, ValueError):
        return ""
    return f"the certificate shown there was issued by {issuer[:200]!a}"


def _ours(case: Case) -> ssl.SSLContext:
    """As `wardround join` calls: TLS 1.3, this site's certificate, the consortium's authority and no other."""
    folder, context = case.folder, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(folder.trust / "ca.crt")
    context.load_cert_chain(folder.trust / "roster" / f"{folder.name}.tls.crt", folder.key("tls"))
    return context


def _anybody(case: Case) -> ssl.SSLContext:
    """Whoever is there, to see who it is; this site's certificate is not shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _tcp(host: str, port: int, text: str, do: str) -> None:
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError as error:
        why = "nobody answers in time" if isinstance(error, TimeoutError) else error.strerror or type(error).__name__
        raise Unwell(f"{text} ({why})", do, str(error)) from None


def _words(body: bytes) -> str:
    text = body.decode(errors="replace")
    found = re.fullmatch(r'\s*\{"detail":\s*"(.*)"\}\s*', text, re.DOTALL)
    return "".join(c if c.isprintable() else " " for c in (found[1] if found else text))[:200]
