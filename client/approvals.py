"""What a hospital said yes to, and what it took back: signed with its own key, one file a study, read anew at every order.

state/approvals/DIGEST.json    the plan's text, and every act on it in order: approval, revocation, approval, ...

The last act counts. An act that this site's certificate does not verify, a text that is not the one of the file's name, or
anything else that is not as it was written, and the study is not approved.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from wardround.common.agreement import Approval
from wardround.common.errors import ConfigError, PlanRefused, SignatureRefused, TrustRefused, WardroundError
from wardround.common.plan import SignedText
from wardround.common.trust.private_files import make_private_folder, read_private, replace_private
from wardround.common.trust.signing import Signed, Signer

if TYPE_CHECKING:
    from wardround.common.trust.roster import Roster

_FORMAT = "wardround approvals 1"
_REVOCATION = {"study", "site", "time"}
_LARGEST = 1 << 20  # bytes, what `read_private` reads


@dataclass(frozen=True)
class Page:
    """What was said here about one plan."""

    study: SignedText
    acts: tuple[Signed, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a file; raises `SignatureRefused` or `ConfigError` where it is none. Signatures are not checked yet."""
        try:
            found = json.loads(text)
            if found.keys() != {"format", "plan", "acts"} or found["format"] != _FORMAT or not found["acts"]:
                raise ValueError
            acts = [Signed.parse(act, kind=_kind(act)) for act in found["acts"]]
            found["plan"].encode()
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
            raise SignatureRefused("it cannot be read") from None
        return cls(SignedText.received(found["plan"]), tuple(acts))

    def to_text(self) -> str:
        """What stands in the file."""
        return json.dumps({"format": _FORMAT, "plan": self.study.text, "acts": [act.text() for act in self.acts]}, indent=1)

    @property
    def approval(self) -> Approval | None:
        """The last act, if it is a yes."""
        return Approval.of(self.acts[-1]) if self.acts[-1].kind == "approval" else None

    def check(self, roster: Roster, site: str, now: datetime) -> None:
        """Return if the last act is this site's approval and holds; raises `TrustRefused` with the reason."""
        for act in self.acts:
            if act.body.get("site") != site or act.body.get("study") != self.study.digest:
                raise SignatureRefused("it is not about this study at this site")
        last = self.acts[-1]
        if last.kind != "approval":
            raise SignatureRefused("it was taken back" + _on(last))
        Approval.of(last).holds(roster, now)


class ApprovalBook:
    """A hospital's approvals.

    Args:
        state: the site's state folder.
        roster: has the site's own signing certificate.
        site: the site's name.
    """

    def __init__(self, state: Path, roster: Roster, site: str) -> None:
        self.folder = state / "approvals"
        self._roster, self._site = roster, site

    def allows(self, digest: str, now: datetime | None = None) -> None:
        """Return if this hospital approved the plan with this digest, and the approval holds.

        Raises:
            PlanRefused: it was never approved, was taken back, has ended, or the file is not as it was written.
        """
        try:
            page = self._page(digest)
            if page is None:
                raise PlanRefused(f"study {digest[:12]} is not approved here")
            page.check(self._roster, self._site, now or datetime.now(UTC))
        except (TrustRefused, ConfigError) as error:
            why = "its file is damaged or open to others" if isinstance(error, ConfigError) else str(error)
            raise PlanRefused(f"study {digest[:12]} is not approved here: {why}", detail=str(error)) from None

    def admits(self, study: SignedText, named: Collection[str], now: datetime | None = None) -> None:
        """The same, of a study that may also be on the site file's list `named`; what was taken back stays refused.

        Raises:
            PlanRefused: as `allows`.
        """
        if study.plan.name not in named or (self.folder / f"{study.digest}.json").exists():
            self.allows(study.digest, now)

    def runs(self, digest: str) -> int | None:
        """How often the plan with this digest may be run here: once for every approval; None where the site file admits it."""
        page = self._page(digest)
        return None if page is None else sum(act.kind == "approval" for act in page.acts)

    def approve(self, study: SignedText, signer: Signer, now: datetime, until: date | None) -> Approval:
        """Sign and keep this hospital's yes; on disk when this returns.

        Raises:
            ConfigError: the file of this study is there and cannot be trusted; it must be moved away first.
        """
        approval = Approval.sign(study, signer, now, until)
        self._add(study, approval.signed)
        return approval

    def revoke(self, page: Page, signer: Signer, now: datetime) -> None:
        """Sign and keep that a yes is taken back."""
        when = now.astimezone(UTC).isoformat(timespec="seconds")
        body = {"study": page.study.digest, "site": signer.name, "time": when}
        self._add(page.study, signer.sign("revocation", body))

    def pages(self) -> list[Page]:
        """Every plan that was ever approved here, the last approved last; damaged files are passed over."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                page = self._page(path.stem)
            except WardroundError:
                continue
            if page is not None:
                found.append(page)
        return sorted(found, key=lambda page: str(page.acts[-1].body.get("time")))

    def approved_before(self, study: SignedText) -> SignedText | None:
        """The plan last approved here under the same name, by this site's signature; None where there is none."""
        for page in reversed(self.pages()):
            if page.study.plan.name == study.plan.name and page.approval is not None:
                try:
                    self._roster.check(page.approval.signed, role="site")
                except TrustRefused:
                    continue
                return page.study
        return None

    def _page(self, digest: str) -> Page | None:
        path = self.folder / f"{digest}.json"
        if not path.exists() and not path.is_symlink():
            return None
        try:
            page = Page.parse(read_private(path).decode())
        except UnicodeDecodeError:
            raise SignatureRefused("it cannot be read") from None
        if page.study.digest != digest:
            raise SignatureRefused("its plan was edited")
        return page

    def _add(self, study: SignedText, act: Signed) -> None:
        make_private_folder(self.folder)
        path = self.folder / f"{study.digest}.json"
        try:
            page = self._page(study.digest)
        except WardroundError as error:
            raise ConfigError(f"{path} is not as it was written ({error}); keep it as evidence, elsewhere") from None
        text = Page(study, (*(page.acts if page else ()), act)).to_text()
        if len(text) > _LARGEST:
            raise ConfigError(f"{path} would have {len(text)} bytes; at most {_LARGEST} are read")
        replace_private(path, text.encode())


def revocation_time(act: Signed) -> datetime | None:
    """When an approval was taken back; None where `act` is no proper revocation."""
    if act.kind != "revocation" or act.body.keys() != _REVOCATION:
        return None
    try:
        return datetime.fromisoformat(str(act.body["time"]))
    except ValueError:
        return None


def _on(act: Signed) -> str:
    at = revocation_time(act)
    return f" on {at:%Y-%m-%d}" if at else ""


def _kind(text: object) -> str:
    """The kind that a text claims, for `Signed.parse` to check."""
    kind = json.loads(text)["kind"] if isinstance(text, str) else None
    if kind not in ("approval", "revocation"):
        raise ValueError
    return str(kind)
