"""`wardround sign`: the coordinator puts its name to a study, and hospitals' approvals beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sign(
    study: Annotated[str, typer.Argument(help="A shipped study, the path of a study's TOML file, or an earlier NAME.signed.")],
    coordinator: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="The coordinator's folder: sign.key, and public/ with everybody's certificates."),
    ] = Path("coordinator"),
    approval: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A hospital's approval; may be given many times.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where it goes; default: NAME.signed here.")] = None,
) -> None:
    """Sign a study plan. Hospitals take part in nothing that the coordinator did not sign.

    wardround sign heart.toml --coordinator coordinator

    wardround sign heart.signed --approval va-heart.approval --approval cleveland-heart.approval

    Approvals that came with an earlier NAME.signed are kept; a newer one of the same hospital takes its place, and one that no
    longer holds is left out.
    """
    from datetime import UTC, datetime

    from wardround.common.agreement import Approval, SignedStudy
    from wardround.common.config import read_text
    from wardround.common.errors import ConfigError, SignatureRefused, TrustRefused
    from wardround.common.explain import sentences
    from wardround.common.plan import SignedText
    from wardround.common.studies import find_study
    from wardround.common.trust.certificates import COORDINATOR
    from wardround.common.trust.roster import Roster
    from wardround.common.trust.signing import Signer

    now, roster = datetime.now(UTC), Roster(coordinator / "public")
    signer = Signer.load(COORDINATOR, coordinator / "sign.key")
    earlier = SignedStudy.load(Path(study)) if study.endswith(".signed") else None
    plan = earlier.study if earlier else SignedText.load(find_study(study))
    approvals: dict[str, Approval] = {}
    for kept in earlier.signatures if earlier else ():
        if kept.kind == "approval":
            try:
                one = Approval.of(kept)
                one.holds(roster, now)
                approvals[one.site] = one
            except TrustRefused as error:
                print(f"Left out: {error}.")
    for path in approval or []:
        try:
            given = Approval.parse(read_text(path))
            given.holds(roster, now)
        except TrustRefused as error:
            raise SignatureRefused(f"{path}: {error}", detail=error.detail) from None
        approvals[given.site] = given
    signed = SignedStudy.sign(plan, signer, [approvals[site] for site in sorted(approvals)])
    signed.check(roster, need=0, now=now)
    file = out or Path(f"{plan.plan.name}.signed")
    if file.suffix == ".toml":
        raise ConfigError(f"--out {file}: a signed study is no TOML file; wanted a name such as {plan.plan.name}.signed")
    signed.save(file)
    print("\n".join(sentences(plan)))
    needed, given_by = plan.plan.min_approvals, ", ".join(sorted(approvals)) or "nobody"
    print(f"Signed by {COORDINATOR}: {file}. Approved by {given_by}{f'; {needed} are needed' if needed else ''}.")
    if len(approvals) < needed:
        print(f"{needed - len(approvals)} more must approve it before it can be trained: send them {file}.")
