"""`wardround approve-plan`: a person at the hospital reads what a study would do here, and says yes, no, or no longer."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.common.errors import ConfigError, PlanRefused, TrustRefused

if TYPE_CHECKING:
    from wardround.client.approvals import ApprovalBook, Page
    from wardround.client.policy import Rule, SiteConfig
    from wardround.common.agreement import SignedStudy
    from wardround.common.plan import SignedText
    from wardround.common.trust.roster import Roster

_LEAST_PREFIX = 8  # characters of a digest that stand for it


def approve_plan(
    plan: Annotated[
        Path | None, typer.Argument(help="What was sent: NAME.signed, or a plan's TOML file.", show_default=False)
    ] = None,
    site: Annotated[Path, typer.Option(metavar="FILE", help="The hospital's site file.")] = Path("site.toml"),
    until: Annotated[str | None, typer.Option(metavar="DATE", help="The last day it holds, such as 2027-03-31.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: this command line is the approval.")] = False,
    revoke: Annotated[
        str | None, typer.Option(metavar="STUDY|DIGEST", help="Take an approval back; nothing is trained from then on.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the approval goes; default: SITE-STUDY.approval here.")
    ] = None,
) -> None:
    """Show what a study would do here, ask, and sign this hospital's approval of exactly this plan.

    wardround approve-plan heart.signed --site site.toml

    wardround approve-plan --revoke heart --site site.toml

    Without an approval nothing is trained, unless the site file names the study under [allow]. The approval stays here; what
    is written is a copy for the coordinator.
    """
    from wardround.client.approvals import ApprovalBook
    from wardround.client.policy import SiteConfig
    from wardround.common.trust.site_folder import SiteFolder

    if (plan is None) == (revoke is None):
        raise ConfigError("wanted either a plan to approve or --revoke")
    config = SiteConfig.load(site)
    folder = SiteFolder(config.site, config.state)
    roster, now = folder.roster(), datetime.now(UTC)
    book = ApprovalBook(config.state, roster, config.site)
    if plan is None:
        for page in _taken_back(book, str(revoke)):
            book.revoke(page, folder.signer(), now)
            print(f"Taken back: study {page.study.plan.name}, {page.study.digest}. {config.site} trains nothing more of it.")
        return
    last_day = _day(until, now)
    study, signed = read_plan(plan)
    if signed is not None:
        signed.check(roster, need=0, now=now)
    broken = _show(study, signed, config, book, roster)
    if broken:
        raise PlanRefused(f"{config.site} cannot take part: " + "; ".join(rule.refusal for rule in broken))
    if not yes and not _agrees(config.site):
        print("Nothing was signed.")
        raise typer.Exit(1)
    approval = book.approve(study, folder.signer(), now, last_day)
    copy = out or Path(f"{config.site}-{study.plan.name}.approval")
    copy.write_text(approval.signed.text() + "\n")
    print(f"Approved{f' until {last_day}' if last_day else ''}. Send {copy} to the coordinator.")


def read_plan(path: Path) -> tuple[SignedText, SignedStudy | None]:
    """A plan, out of a `.signed` file or as it is; raises `ConfigError`."""
    from wardround.common.agreement import LARGEST_SIGNED_STUDY, SignedStudy
    from wardround.common.config import read_text
    from wardround.common.plan import SignedText

    if read_text(path, LARGEST_SIGNED_STUDY).startswith("{"):  # no TOML does
        signed = SignedStudy.load(path)
        return signed.study, signed
    return SignedText.load(path), None


def rules_of(study: SignedText, config: SiteConfig) -> list[Rule]:
    """Every rule of this site, and whether the plan keeps it; the ledger is only looked at."""
    from wardround.client.policy import Rule

    plan = study.plan
    source, found = config.data.get(plan.task), config.rules(plan)
    if plan.privacy is not None and source is not None and config.allow.epsilon_lifetime is not None:
        before, after = budget(study, config)
        lifetime = config.allow.epsilon_lifetime
        passed = f"with this study patients of {source.cohort} would have paid {after:.2f} of {lifetime:g}"
        wants = f"patients of {source.cohort} pay at most {lifetime:g} over all studies; so far {before:.2f}, then {after:.2f}"
        found.append(Rule(wants, passed if not after <= lifetime else ""))
    return found


def budget(study: SignedText, config: SiteConfig) -> tuple[float, float]:
    """Epsilon that the cohort's patients were charged over all studies, by the ledger: so far, and with this study."""
    from wardround.client.ledger import PrivacyLedger
    from wardround.common.privacy import filtered

    delta, cohort = config.allow.delta, config.data[study.plan.task].cohort
    file, charged, reserved = config.state / "ledger.sqlite", [], False
    if file.exists():
        with PrivacyLedger(file) as ledger:
            accounts = [account for account in ledger.accounts() if account.cohort == cohort]
        charged = [account.charged for account in accounts]
        reserved = any(account.study == study.digest and not account.settled for account in accounts)
    after = charged if reserved else [*charged, study.plan.cost()]
    return filtered(charged, delta), filtered(after, delta)


def difference(before: SignedText, study: SignedText) -> Iterator[str]:
    """A unified diff of two plans' texts, fit for a terminal."""
    old, new = ([_printable(line) for line in one.text.splitlines()] for one in (before, study))
    was, would_be = (f"{one.plan.name} {one.digest[:12]}" for one in (before, study))
    yield from difflib.unified_diff(old, new, was, would_be, "approved here", "to be approved", lineterm="")


def _show(study: SignedText, signed: SignedStudy | None, config: SiteConfig, book: ApprovalBook, roster: Roster) -> list[Rule]:
    """Print everything that somebody who decides should know. Returns the rules that the plan breaks."""
    from wardround.common.explain import sentences

    print("\n".join(sentences(study)))
    print("\n".join(_who_signed(signed, roster)))
    rules = rules_of(study, config)
    print(f"\nThe rules of {config.site}:")
    for rule in rules:
        print(f"  {'NO ' if rule.refusal else 'yes'}  {rule.wants}{f': {rule.refusal}' if rule.refusal else ''}")
    before = book.approved_before(study)
    if before is None:
        print(f"\nNo plan called {study.plan.name} was approved here before.")
    elif before.digest == study.digest:
        print("\nThis very plan was approved here before.")
    else:
        print("\nSince the plan that was approved here last:", *difference(before, study), sep="\n")
    return [rule for rule in rules if rule.refusal]


def _who_signed(signed: SignedStudy | None, roster: Roster) -> Iterator[str]:
    if signed is None:
        yield "It is not signed by the coordinator yet; an approval is of this text and no other."
        return
    yield "Signed by the coordinator."
    for approval in signed.approvals():
        try:
            approval.holds(roster, datetime.now(UTC))
            yield f"Approved by {approval.site}{f' until {approval.until}' if approval.until else ''}."
        except TrustRefused as error:
            yield f"Said to be approved by {approval.site}, which cannot be told here: {error}."


def _agrees(site: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask at; read the plan, then say it with --yes")
    return typer.confirm(f"\nDoes {site} approve this plan?", default=False)


def _taken_back(book: ApprovalBook, what: str) -> list[Page]:
    standing = [page for page in book.pages() if page.approval is not None]
    by_name = [page for page in standing if page.study.plan.name == what]
    by_digest = [page for page in standing if page.study.digest.startswith(what) and len(what) >= _LEAST_PREFIX]
    found = by_name or by_digest
    if not found or (not by_name and len(found) > 1):
        known = ", ".join(f"{page.study.plan.name} {page.study.digest[:12]}" for page in standing) or "none"
        raise ConfigError(f"--revoke {what}: {len(found)} approvals begin so; there are: {known}")
    return found


def _day(until: str | None, now: datetime) -> date | None:
    if until is None:
        return None
    try:
        day = date.fromisoformat(until)
    except ValueError:
        raise ConfigError(f"--until {until}: wanted a day such as {now.year + 1}-03-31") from None
    if day < now.date():
        raise ConfigError(f"--until {until}: that day is over")
    return day


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line)
