"""Where a coordinator is: HOST or HOST:PORT, nothing else."""

from __future__ import annotations

import ipaddress
import re

from wardround.common.errors import ConfigError

PORT = 9092  # where an address names none: Flower's own
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
_ADDRESS = re.compile(r"(?P<host>\[[^\]]+\]|[^:\[\]]+)(:(?P<port>[0-9]{1,5}))?")


def address(text: str) -> tuple[str, int]:
    """Host (a DNS name in ASCII, or an IP address without brackets) and port.

    >>> address("fl.example.org:443"), address("[::1]:8443"), address("10.0.0.7")
    (('fl.example.org', 443), ('::1', 8443), ('10.0.0.7', 9092))

    Raises:
        ConfigError: a scheme, a user, a path, port 0, letters that only look like ASCII.
    """
    found = _ADDRESS.fullmatch(text)
    host = found["host"].strip("[]") if found else ""
    port = int(found["port"] or PORT) if found else 0
    if not _is_host(host) or not 0 < port < 1 << 16:
        raise ConfigError(f"{text[:200]!a} is no address; wanted HOST or HOST:PORT, such as fl.example.org:{PORT}")
    return host, port


def written(host: str, port: int) -> str:
    """HOST:PORT, with brackets where the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        only_numbers = re.fullmatch(r"[0-9.]+", text)  # 10.0.0.300 is a mistake, not a name
        return _HOST.fullmatch(text) is not None and only_numbers is None
    return "%" not in text
