"""The list of checks, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from rich.console import Console

from wardround.client.doctor import identity, line, machine, plan, records
from wardround.client.doctor.findings import Case, Check, Finding

_SLOW = 120.0  # seconds for what reads records or trains
_WORDS = {"ok": "ok  ", "note": "note", "warn": "warn", "fail": "FAIL", "skip": "-   "}
_COLOURS = {"ok": "green", "note": "blue", "warn": "yellow", "fail": "red", "skip": "dim"}


def checks(case: Case) -> Iterator[Check]:
    """Every check of a site, in the order in which they build on each other."""
    yield Check("site file", lambda case: Finding("ok", "valid"))
    yield Check("enrolment", identity.enrolled)
    yield Check("keys", identity.keys, needs=("enrolment",))
    yield Check("certificates", identity.certificates, needs=("enrolment",))
    yield Check("revocation list", identity.revocations, needs=("enrolment",))
    yield Check("wardround join", identity.process)
    has_address = () if case.config.network.coordinator else ("enrolment",)
    yield Check("name", line.name, needs=has_address)
    yield Check("proxy", line.proxy)
    yield Check("TCP", line.tcp, needs=(*has_address, "name", "proxy"), seconds=20.0)
    yield Check("TLS", line.tls, needs=("enrolment", "keys", "TCP"), seconds=30.0)
    yield Check("admission", line.admitted, needs=("TLS",), seconds=20.0)
    yield Check("clock", line.clock, needs=("TLS",), seconds=20.0)
    yield Check("Flower", line.flower, needs=("admission",), seconds=20.0)
    yield Check("state folder", machine.state)
    planned = ("plan",) if case.plan else ()
    if case.plan:
        yield Check("plan", plan.readable, seconds=60.0)
    yield Check("disk", machine.disk, needs=("state folder", *planned), seconds=60.0)
    yield Check("device", machine.compute, seconds=60.0)
    yield Check("import guard", machine.guard, needs=("state folder",), seconds=70.0)
    for task in case.config.data:
        yield Check(f"records of {task}", partial(records.contract, task), seconds=_SLOW, late="warn")
    for cohort in sorted({source.cohort for source in case.config.data.values()}):
        yield Check(f"budget of {cohort}", partial(records.budget, cohort), needs=planned, seconds=60.0)
    if case.plan:
        yield Check("rules", plan.rules, needs=planned, seconds=60.0)
        yield Check("approval", plan.approval, needs=(*planned, "enrolment"), seconds=20.0)
        yield Check("hours", plan.hours, needs=planned)
        yield Check("a step of it", plan.step, needs=(*planned, "device", "rules"), seconds=_SLOW, late="warn")


def printer(
    names: Sequence[str], *, quiet: bool
) -> tuple[Callable[[str], None], Callable[[str, Finding], None], Callable[[], None]]:
    """Who is told of each check: (begun, done, closed). What is under way is shown on stderr, where it is a terminal."""
    width = max(map(len, names))
    out, busy = Console(highlight=False, soft_wrap=True), Console(stderr=True).status("")
    if busy.console.is_terminal:
        busy.start()

    def done(name: str, finding: Finding) -> None:
        if quiet:
            return
        text = f"{finding.text}. Do: {finding.do}" if finding.do else finding.text
        out.print(f"{_WORDS[finding.level]} ", style=_COLOURS[finding.level], end="", markup=False)
        out.print(f"{name:<{width}} {text}", markup=False)
        for local in finding.local.splitlines():
            out.print(f"{'':<{width + 6}}{local}", style="dim", markup=False)

    return lambda name: busy.update(f"{name} ..."), done, busy.stop


def print_json(case: Case, found: Mapping[str, Finding]) -> None:
    """The same facts, with what is for this console only."""
    rows = [
        {"check": name, "level": one.level, "text": one.text, "do": one.do, "local": one.local} for name, one in found.items()
    ]
    sound = all(one.level != "fail" for one in found.values())
    print(json.dumps({"site": case.config.site, "ok": sound, "checks": rows}, indent=2))
