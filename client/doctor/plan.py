"""A plan at this site, before it comes: what the rules say, whether it was approved, whether a step fits, and its time."""

from __future__ import annotations

import math
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from wardround.client.doctor.findings import Case, Finding, Unwell
from wardround.common.errors import TrustRefused

if TYPE_CHECKING:
    from wardround.common.plan import PrivacyPlan
    from wardround.common.tasks import Records, Task

_MOST = 64  # made-up patients of the step that is timed; more take their time in proportion
_GIB = 2**30


def readable(case: Case) -> Finding:
    """The plan is one."""
    study = case.study
    return Finding("ok", f"{study.plan.name}, digest {study.digest[:12]}")


def rules(case: Case) -> Finding:
    """Every rule of [allow], and how the plan keeps it."""
    found = case.config.rules(case.study.plan)
    lines = "\n".join(f"{'no: ' + rule.refusal if rule.refusal else 'yes'}  ({rule.wants})" for rule in found)
    broken = [rule.refusal for rule in found if rule.refusal]
    if broken:
        raise Unwell("; ".join(broken), "the plan must change, or [allow] in the site file", lines)
    return Finding("ok", f"it keeps all {len(found)} rules", local=lines)


def approval(case: Case) -> Finding:
    """The plan was approved here, or is admitted by its name."""
    from wardround.client.approvals import ApprovalBook

    study = case.study
    if study.plan.name in case.config.allow.studies:
        return Finding("ok", "admitted by its name (allow.studies), without an approval")
    try:
        ApprovalBook(case.config.state, case.folder.roster(), case.config.site).allows(study.digest)
    except TrustRefused:
        raise
    except Exception as error:
        raise Unwell("it is not approved here", "wardround approve-plan PLAN --site SITE.toml", str(error)) from None
    return Finding("ok", "approved here")


def hours(case: Case) -> Finding:
    """An order that comes when this site is closed can wait until it opens, or the plan does not wait so long."""
    opening, deadline = case.config.compute.hours, case.study.plan.deadline_seconds
    if opening is None:
        return Finding("ok", "training may begin at any time")
    minutes = [datetime(2000, 1, 1) + timedelta(minutes=minute) for minute in range(24 * 60)]
    longest = max(case.config.compute.closed_for(minute) for minute in minutes)
    if longest <= deadline:
        return Finding("ok", f"training begins within {opening}")
    return Finding(
        "warn",
        f"training begins within {opening}; at other hours the plan waits {deadline / 3600:.2g} h of {longest / 3600:.2g}",
        "rounds are then held without this site: widen compute.hours, or ask for a longer deadline_seconds",
    )


def step(case: Case) -> Finding:
    """One real step on made-up records, on the device that training will use: whether it fits, and minutes a round."""
    import torch

    from wardround.common.devices import device
    from wardround.common.tasks import task_of

    plan, compute = case.study.plan, case.config.compute
    here, task = device(compute.device), task_of(plan)
    torch.set_num_threads(compute.threads)
    if here.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(compute.gpu_share, here)
        torch.cuda.reset_peak_memory_stats(here)
    wanted = _patients(case)
    try:
        _timed(case, task, here, min(wanted, 8))  # finds the engine and warms up
        seconds = _timed(case, task, here, min(wanted, _MOST))
    except torch.OutOfMemoryError:
        raise Unwell(
            "a step does not fit into the GPU's memory", "free it, raise compute.gpu_share, or take a larger GPU"
        ) from None
    except MemoryError:
        raise Unwell("a step does not fit into memory", "free memory, or raise compute.memory_gib") from None
    scale = max(1.0, wanted / _MOST)
    each = seconds * scale
    whole = plan.local.steps * each
    time_taken = f"{whole / 60:.0f} minutes" if whole >= 90 else f"{whole:.2g} seconds"
    text = f"about {time_taken} a round on {here}, {plan.local.steps} x {each:.2g} s"
    text += f", estimated from {_MOST} patients" if scale > 1 else ""
    if here.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated(here) / _GIB:.1f} GiB of its memory"
    if whole > plan.deadline_seconds:
        raise Unwell(
            f"{text}; the plan waits {plan.deadline_seconds / 60:.0f} minutes",
            "use a GPU or more compute.threads, or ask for a longer deadline_seconds",
        )
    return Finding("ok", text)


def _patients(case: Case) -> int:
    """Of a step, as expected by the plan's public numbers."""
    plan = case.study.plan
    declared = plan.sites.get(case.config.site, 0)
    if plan.privacy is not None:
        return max(1, math.ceil(plan.privacy.sampling_rate * declared))
    size = plan.local.batch_size
    return max(1, declared if size == "all" else min(size, declared))


def _timed(case: Case, task: Task, here: object, patients: int) -> float:
    """Seconds of one local step for so many patients, each with as many records as may be drawn of one."""
    import torch

    from wardround.client.dp import OsCoins, preflight, refuse_coupled
    from wardround.client.training import plain_update, private_update
    from wardround.client.training.supervised import working_model
    from wardround.common.weights import trainable

    assert isinstance(here, torch.device)
    plan, site = case.study.plan, case.config.site
    model, once = working_model(task, plan.model, here), plan.local.model_copy(update={"steps": 1})
    weights = {name: tensor.detach().clone() for name, tensor in trainable(model).items()}
    records = _made_up(task, patients, plan.privacy).to(here)
    if plan.privacy is None:
        refuse_coupled(model)
    else:
        preflight(task.private_part(model), task.loss, task.blank(1).to(here))
    began = time.perf_counter()
    if plan.privacy is None:
        plain_update(task, model, weights, records, local=once, seed=plan.seed, site=site, round=1)
    else:
        everybody = plan.privacy.model_copy(update={"sampling_rate": 1.0})
        private_update(
            task, model, weights, records, local=once, privacy=everybody, noise_multiplier=plan.noise_multiplier(),
            declared_patients=patients, coins=OsCoins(),
        )  # fmt: skip
    if here.type == "cuda":
        torch.cuda.synchronize(here)
    return time.perf_counter() - began


def _made_up(task: Task, patients: int, privacy: PrivacyPlan | None) -> Records:
    import torch

    from wardround.client.dp.proof import made_up

    each = privacy.records_per_patient if privacy else 1
    return made_up(task.blank(1), torch.arange(patients).repeat_interleave(each))
