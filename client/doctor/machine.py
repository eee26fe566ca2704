"""What this machine gives: a folder that can be written, room on the disk, the processor or GPU asked for, the import guard."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from wardround.client.doctor.findings import Case, Finding, Unwell

_GIB = 2**30
_SPARE = _GIB  # bytes beside three models: logs, the ledger, Flower's own
_COPIES = 3  # of a model in the state folder: the kept answer, its draft, what is under way
_NUMBER = 4  # bytes of one number of a model
_MODULE = "wardround_doctor_stranger"


def state(case: Case) -> Finding:
    """The state folder can be written by this user, and by nobody else."""
    folder = case.config.state
    if not folder.is_dir():
        raise Unwell("the state folder is not there", "wardround enroll makes it, as the user who will run wardround join")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Unwell(
            f"the state folder cannot be written ({error.strerror})",
            "run this as the user who runs wardround join, who must own it",
        ) from None
    if folder.stat().st_mode & 0o022:
        return Finding("warn", "others may write into the state folder", "chmod 700 it")
    return Finding("ok", "it can be written")


def disk(case: Case) -> Finding:
    """Room for three models and a gibibyte."""
    free = shutil.disk_usage(case.config.state).free
    numbers = case.config.allow.parameters
    if case.plan is not None:
        from wardround.common.tasks import task_of

        numbers = task_of(case.study.plan).size(case.study.plan.model)
    needed = _COPIES * _NUMBER * numbers + _SPARE
    of = "this plan's model" if case.plan else "the largest model that is allowed"
    text = f"{free / _GIB:.1f} GiB free, {needed / _GIB:.1f} wanted for {of}"
    if free >= needed:
        return Finding("ok", text)
    do = "make room on the disk of the state folder, or put it on a larger one"
    raise Unwell(text, do, level="fail" if case.plan or free < _SPARE else "warn")


def compute(case: Case) -> Finding:
    """The device that is asked for is there."""
    import torch

    from wardround.common.devices import device
    from wardround.common.errors import ConfigError

    wanted = case.config.compute
    try:
        found = device(wanted.device)
    except ConfigError:
        raise Unwell(
            f"{wanted.device} was asked for, and {torch.cuda.device_count()} GPUs were found",
            "nvidia-smi must show it to this user, and torch must be built for CUDA; or set compute.device to cpu",
        ) from None
    if found.type == "cuda":
        free, whole = torch.cuda.mem_get_info(found)
        share = wanted.gpu_share * whole
        text = f"{torch.cuda.get_device_name(found)}: {free / _GIB:.0f} of {whole / _GIB:.0f} GiB free"
        if free < share:
            return Finding(
                "warn",
                f"{text}, {share / _GIB:.0f} may be taken",
                "see with nvidia-smi who else uses it, or lower compute.gpu_share",
            )
        return Finding("ok", text)
    there, cores = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, os.cpu_count() or 1
    text = f"processor, {wanted.threads} of {cores} cores may be used, {there:.0f} GiB of memory"
    if wanted.threads > cores:
        return Finding("warn", text, "lower compute.threads: more threads than cores are slower")
    if wanted.memory_gib is not None and wanted.memory_gib > there:
        return Finding("warn", text, "compute.memory_gib is more than the machine has")
    return Finding("ok", text)


def guard(case: Case) -> Finding:
    """In a process of its own: the import guard refuses a module from the state folder, and another program."""
    with tempfile.TemporaryDirectory(dir=case.config.state, prefix=".doctor-") as folder:
        (Path(folder) / f"{_MODULE}.py").write_text("")
        done = subprocess.run(
            [sys.executable, "-m", "wardround.client.doctor.stranger", str(case.config.state), folder, _MODULE],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    if done.stdout.split() != ["import", "program"]:
        raise Unwell(
            "the import guard does not hold on this machine",
            "do not run wardround join; send the bundle to support",
            done.stderr[-500:],
        )
    return Finding("ok", "code from the state folder and other programs are refused")
