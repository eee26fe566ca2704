"""What a study would find here: records that fit their task, and privacy that is left. How many patients is never told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wardround.client.doctor.findings import Case, Finding, Unwell

if TYPE_CHECKING:
    from wardround.client.ledger import StudyAccount
    from wardround.common.plan import StudyPlan


def contract(task_name: str, case: Case) -> Finding:
    """The records of one [data] section, opened as training opens them.

    What follows from the number of patients is said on this console alone.
    """
    from wardround.client.data import open_records
    from wardround.common.errors import DataRefused
    from wardround.common.registry import look_up
    from wardround.common.tasks import TASKS

    source, allow = case.config.data[task_name], case.config.allow
    try:
        training, _ = open_records(source, look_up("task", task_name, TASKS))
    except DataRefused as error:
        raise Unwell(
            "the records do not fit the task",
            "see the reason on the site's own console; docs/data.md says what is wanted",
            f"{error}{f' ({error.detail})' if error.detail else ''}",
        ) from None
    enough = training.patients >= allow.min_patients
    local = (
        f"at least {allow.min_patients} patients to train on"
        if enough
        else (f"fewer than {allow.min_patients} patients to train on (allow.min_patients); think again")
    )
    if task_name not in allow.tasks:
        return Finding(
            "warn", "the records fit, but the task is not allowed", "add it to allow.tasks if it is meant to be", local
        )
    if source.declared_patients is None:
        return Finding(
            "warn", "the records fit, but declared_patients is not set", "declare it: plans must then agree with it", local
        )
    return Finding("ok", "the records fit the task", local=local)


def budget(cohort: str, case: Case) -> Finding:
    """What is left of a cohort's lifetime budget; with a plan of that cohort, whether it suffices."""
    from wardround.common.privacy import filtered

    allow = case.config.allow
    if allow.epsilon_lifetime is None:
        return Finding(
            "warn", "no budget is set, so no private study is admitted", "set allow.epsilon_lifetime and epsilon_per_study"
        )
    accounts = [account for account in _accounts(case) if account.cohort == cohort]
    charged = [account.charged for account in accounts]
    now, limit = filtered(charged, allow.delta), allow.epsilon_lifetime
    left = f"epsilon {max(0.0, limit - now):.2f} left of {limit:g}"
    plan = _planned(case, cohort)
    if plan is None:
        if now >= limit:
            raise Unwell("nothing is left", "no more private studies on these patients", left)
        return Finding("ok", "something is left", local=left)
    if any(account.study == case.study.digest and not account.settled for account in accounts):
        return Finding("ok", "this plan was reserved before", local=left)
    after = filtered([*charged, plan.cost()], allow.delta)
    if not after <= limit:
        raise Unwell("this plan costs more than is left", "the plan must ask for less", f"{left}; {after:.2f} with this plan")
    return Finding("ok", "this plan costs less than is left", local=f"{left}; {after:.2f} charged with this plan")


def _planned(case: Case, cohort: str) -> StudyPlan | None:
    if case.plan is None:
        return None
    plan = case.study.plan
    source = case.config.data.get(plan.task)
    return plan if plan.privacy is not None and source is not None and source.cohort == cohort else None


def _accounts(case: Case) -> list[StudyAccount]:
    from wardround.client.ledger import PrivacyLedger

    path = case.config.state / "ledger.sqlite"
    if not path.exists():  # the doctor begins no ledger
        return []
    with PrivacyLedger(path) as ledger:
        return ledger.accounts()
