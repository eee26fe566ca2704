"""A study as it is handed round: the plan's text, the coordinator's signature over it, and hospitals' approvals.

One JSON file, `NAME.signed`. What is signed is the SHA-256 of the text, so nothing in the plan can change without every
signature falling. Whether a signature is good is asked anew each time, of the roster as it is then: an approval whose signer
was revoked, or whose last day has passed, counts no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from wardround.common.config import LARGEST_FILE, read_text
from wardround.common.errors import ConfigError, SignatureRefused, TrustRefused
from wardround.common.files import write_atomically
from wardround.common.plan import SignedText
from wardround.common.trust.signing import Signed, Signer

if TYPE_CHECKING:
    from wardround.common.trust.roster import Roster

LARGEST_SIGNED_STUDY = 4 * LARGEST_FILE  # bytes: a plan and its signatures
_FORMAT = "wardround signed study 1"
_FIELDS = {"format": str, "plan": str, "study": str, "approvals": list}
_STUDY = {"study", "name"}
_APPROVAL = {"study", "site", "time", "until"}
_MOST_APPROVALS = 1000


@dataclass(frozen=True)
class Approval:
    """One hospital's yes to one plan, as read from a signature.

    Attributes:
        signed: the signature, kind "approval".
        study: SHA-256 of the plan's text.
        site: who approves.
        time: when, UTC.
        until: the last day, UTC, on which it holds; None: as long as the signer's certificate.
    """

    signed: Signed
    study: str
    site: str
    time: datetime
    until: date | None

    @classmethod
    def of(cls, signed: Signed) -> Self:
        """Read an approval; raises `SignatureRefused` where it is none. Whether it holds is another question."""
        body = signed.body
        if signed.kind != "approval" or body.keys() != _APPROVAL or any(type(value) is not str for value in body.values()):
            raise SignatureRefused("the approval cannot be read")
        try:
            time = datetime.fromisoformat(body["time"])
            until = date.fromisoformat(body["until"]) if body["until"] else None
        except ValueError:
            raise SignatureRefused("the approval has a date that is none") from None
        if time.tzinfo is None or body["site"] != signed.signer:
            raise SignatureRefused("the approval is not of the site that signed it")
        return cls(signed, body["study"], body["site"], time, until)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The approval in a file's text; raises `SignatureRefused` where it is none."""
        return cls.of(Signed.parse(text.strip(), kind="approval"))

    @classmethod
    def sign(cls, study: SignedText, site: Signer, now: datetime, until: date | None) -> Self:
        """The yes of `site`, dated `now`, good up to and including the day `until`."""
        when = now.astimezone(UTC).isoformat(timespec="seconds")
        body = {"study": study.digest, "site": site.name, "time": when, "until": until.isoformat() if until else ""}
        return cls.of(site.sign("approval", body))

    def holds(self, roster: Roster, now: datetime) -> None:
        """Return if it holds now; raises `SignatureRefused` or `TrustRefused` with the reason."""
        if self.until is not None and now.astimezone(UTC).date() > self.until:
            raise SignatureRefused(f"the approval of {self.site} ended on {self.until}")
        roster.check(self.signed, role="site")


@dataclass(frozen=True)
class SignedStudy:
    """A study plan and who put their name to it.

    Attributes:
        study: the plan with its text.
        signatures: of kind "study", by the coordinator, and "approval", by hospitals; none of them is believed unchecked.
    """

    study: SignedText
    signatures: tuple[Signed, ...] = ()

    @classmethod
    def sign(cls, study: SignedText, coordinator: Signer, approvals: Sequence[Approval] = ()) -> Self:
        """The study with the coordinator's signature and the approvals at hand."""
        signed = coordinator.sign("study", {"study": study.digest, "name": study.plan.name})
        return cls(study, (signed, *(approval.signed for approval in approvals)))

    @property
    def text(self) -> str:
        """The plan's TOML."""
        return self.study.text

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's text: the study's identity."""
        return self.study.digest

    def to_text(self) -> str:
        """What stands in a `.signed` file; the same bytes for the same study and signatures."""
        first = next((signed.text() for signed in self.signatures if signed.kind == "study"), "")
        approvals = [signed.text() for signed in self.signatures if signed.kind == "approval"]
        fields = {"format": _FORMAT, "plan": self.text, "study": first, "approvals": approvals}
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `to_text` wrote.

        Raises:
            SignatureRefused: no such text, or a signature in it that cannot be read.
            ConfigError: the plan in it is not valid.
        """
        if len(text) > LARGEST_SIGNED_STUDY:
            raise SignatureRefused(f"a signed study of {len(text)} characters is refused; the most is {LARGEST_SIGNED_STUDY}")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise SignatureRefused("the text is not a signed study") from None
        if type(found) is not dict or {key: type(value) for key, value in found.items()} != _FIELDS:
            raise SignatureRefused("the text is not a signed study")
        if found["format"] != _FORMAT:
            raise SignatureRefused(f"the signed study has another format than {_FORMAT!r}")
        texts = found["approvals"]
        if len(texts) > _MOST_APPROVALS or any(type(one) is not str for one in texts):
            raise SignatureRefused("the approvals of the signed study cannot be read")
        signatures = [Signed.parse(found["study"], kind="study")] if found["study"] else []
        signatures += [Signed.parse(one, kind="approval") for one in texts]
        try:
            found["plan"].encode()
        except UnicodeEncodeError:
            raise SignatureRefused("the plan of the signed study is no text") from None
        read = cls(SignedText.received(found["plan"]), tuple(signatures))
        if read.to_text() != text:  # a key twice, other spaces: nothing in it may be read in two ways
            raise SignatureRefused("the signed study is not written as wardround writes it")
        return read

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `.signed` file.

        Raises:
            ConfigError: it cannot be read, is too large, or holds no signed study; the path is named.
        """
        text = read_text(path, LARGEST_SIGNED_STUDY)
        try:
            return cls.parse(text)
        except SignatureRefused as error:
            raise ConfigError(f"{path}: {error}") from None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; raises `OSError`."""
        write_atomically(path, self.to_text().encode())

    def check(self, roster: Roster, *, need: int | None = None, now: datetime | None = None) -> list[str]:
        """Return the sites whose approval holds now, if the coordinator signed this text and enough did.

        What has no place in the file (two signatures of one site, an approval of another study) refuses it whole. What was
        good once and has ended (an approval's last day, a certificate) only no longer counts.

        Args:
            roster: who is who now.
            need: so many approvals must hold; left out: as many as the plan says.
            now: left out: the clock's.

        Raises:
            SignatureRefused: every reason, one line each.
        """
        at, need = now or datetime.now(UTC), self.study.plan.min_approvals if need is None else need
        problems = [*self._about_the_study(roster), *self._about_approvals()]
        approved, fallen = [], []
        for approval in () if problems else self.approvals():
            try:
                approval.holds(roster, at)
                approved.append(approval.site)
            except TrustRefused as error:
                fallen.append(str(error))
        if len(approved) < need and not problems:
            problems = [f"{len(approved)} of the {need} approvals it needs hold", *fallen]
        if problems:
            raise SignatureRefused(f"study {self.study.plan.name} is not to be trained:\n  " + "\n  ".join(problems))
        return approved

    def _about_the_study(self, roster: Roster) -> Iterator[str]:
        found = [signed for signed in self.signatures if signed.kind == "study"]
        if len(found) != 1:
            yield "the coordinator did not sign it" if not found else "it is signed more than once"
            return
        signed = found[0]
        if signed.body != {"study": self.digest, "name": self.study.plan.name}:
            yield "the coordinator signed another text"
            return
        try:
            roster.check(signed, role="coordinator")
        except TrustRefused as error:
            yield str(error)

    def _about_approvals(self) -> Iterator[str]:
        seen: set[str] = set()
        if any(signed.kind not in ("study", "approval") for signed in self.signatures):
            yield "it holds signatures that are no approvals"
            return
        try:
            approvals = self.approvals()
        except SignatureRefused as error:
            yield str(error)
            return
        for approval in approvals:
            if approval.study != self.digest:
                yield f"the approval of {approval.site} is of another study"
            if approval.site not in self.study.plan.sites:
                yield f"the plan does not name {approval.site}, which approves it"
            if approval.site in seen:
                yield f"{approval.site} approves it twice"
            seen.add(approval.site)

    def approvals(self) -> list[Approval]:
        """Every approval in it, unchecked; raises `SignatureRefused` where one is none."""
        return [Approval.of(signed) for signed in self.signatures if signed.kind == "approval"]
