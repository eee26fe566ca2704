"""`wardround audit-log`: whether a log still says what it said, and what that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cryptography import x509

audit_log = typer.Typer(no_args_is_help=True, help="Check or read an audit log, of a hospital or of the coordinator.")


@audit_log.command()
def verify(
    file: Annotated[Path, typer.Argument(help="The log (audit.jsonl).")],
    certificate: Annotated[
        Path | None, typer.Option(metavar="CRT", help="Of whoever signs the log; without it signatures are not checked.")
    ] = None,
    anchors: Annotated[
        list[Path] | None,
        typer.Option(metavar="LOG", help="A log of the other side, which has written down heads of this one; repeatable."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
) -> None:
    """Check that no record was changed, cut out, put in, moved or written anew; name the first that was.

    wardround audit-log verify audit.jsonl --certificate cork.sign.crt --anchors coordinator/audit.jsonl
    """
    from dataclasses import asdict
    from json import dumps

    from wardround.common.audit_check import anchors_about, verify_log

    of_signer = _certificate(certificate) if certificate else None
    found = verify_log(file, of_signer)
    if anchors:
        heads = [head for other in anchors for head in anchors_about(found.log, other, about=found.about)]
        found = verify_log(file, of_signer, heads)
    if json:
        print(dumps(asdict(found)))
        return
    about = f" about {found.about}" if found.about else ""
    print(f"{found.records} records of {found.log}{about}, {found.first} to {found.last}, hang together.")
    print(f"The newest is number {found.records - 1}, digest {found.digest}.")
    print("Its signature is genuine." if found.signature_checked else "Signatures were not checked: see --certificate.")
    if found.anchors:
        print(f"All {found.anchors} heads that the other side has written down are in it.")
    else:
        print("Nobody else's word was asked: see --anchors.")


@audit_log.command()
def show(
    file: Annotated[Path, typer.Argument(help="The log (audit.jsonl).")],
    last: Annotated[int, typer.Option(min=1, metavar="N", help="How many records, counted from the end.")] = 20,
) -> None:
    """Print the newest records, one a line. They are read up to the first that does not follow the one before."""
    from collections import deque
    from json import dumps

    from wardround.common.audit_records import Entry, entries, speaking_plainly

    newest: deque[Entry] = deque(maxlen=last)
    with speaking_plainly(file), file.open("rb") as opened:
        try:
            newest.extend(entries(opened))
        finally:  # what comes before a broken record is worth seeing
            for entry in newest:
                said = "  ".join(f"{name}={dumps(value)}" for name, value in sorted(entry.body.items()))
                print(f"{entry.seq:>7}  {entry.time}  {entry.event}  {said}".rstrip())


def _certificate(path: Path) -> x509.Certificate:
    from cryptography import x509

    from wardround.common.errors import ConfigError

    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path} is no certificate in PEM") from None
