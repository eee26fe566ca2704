"""What `wardround explain` does once its options are read (apart, so that `--help` need not import torch)."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass
from pathlib import Path

import torch

from wardround.client.interpret.answers import MEANINGS, answers, class_name, exact_model, exact_records, score_of
from wardround.client.interpret.attributions import attribute, captum
from wardround.client.interpret.choice import choose
from wardround.client.interpret.likeness import likeness
from wardround.client.interpret.pages import Explained, Shown, page_of, table_of, write_private
from wardround.client.interpret.study import Files, Opened, open_study
from wardround.client.interpret.views import views
from wardround.common.errors import ConfigError
from wardround.common.tasks import Records, Task
from wardround.common.weights import digest


@dataclass(frozen=True)
class Request:
    """The options of one call; `site` is a name beside a run folder, and a file without one."""

    run: Path | None = None
    site: str | None = None
    plan: Path | None = None
    model: Path | None = None
    records: int = 6
    out: Path | None = None
    json: bool = False

    @property
    def files(self) -> Files:
        """What is to be read.

        Raises:
            ConfigError: options that contradict each other, or too few of them.
        """
        if self.run is not None:
            for option, given in (("--plan", self.plan), ("--model", self.model)):
                if given is not None:
                    raise ConfigError(f"{option}: the run folder {self.run} brings its own; leave one of the two out")
            return Files.of_run(self.run, self.site)
        for option, wanted in (("--site", self.site), ("--plan", self.plan), ("--model", self.model)):
            if wanted is None:
                raise ConfigError(f"{option}: is missing; give a run folder, or all of --site, --plan and --model")
        assert self.site is not None
        assert self.plan is not None
        assert self.model is not None
        return Files(Path(self.site), self.plan, self.model)


def explain(request: Request) -> Path:
    """Explain some of a hospital's held-out records, and write the page; returns its path.

    Raises:
        ConfigError: an option or a file does not hold, captum is missing, or the network cannot be explained.
        DataRefused: the records do not fit the task.
    """
    torch.set_num_threads(1)
    captum()
    files = request.files
    if request.out is not None and request.run is not None:
        _refuse_shared(request.out, request.run, files.site.parent)
    opened = open_study(files)
    explained = explained_of(opened, request.records)
    folder = opened.site.state / "explain" if request.out is None else request.out
    name = f"{opened.study.plan.name}-{opened.site.site}-{explained.model[:8]}.html"
    path = write_private(folder / name, page_of(explained))
    if request.json:
        print(json_module.dumps({"page": str(path), **table_of(explained)}, indent=1, allow_nan=False))
    else:
        print(f"{path}\n{len(explained.shown)} records of patients are shown in it: it must stay at {opened.site.site}.")
    return path


def explained_of(opened: Opened, count: int) -> Explained:
    """The explanation of at most `count` records."""
    task, plan = opened.task, opened.study.plan
    model = task.model(plan.model, plan.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in opened.weights:
                parameter.copy_(opened.weights[name])
    model, untrained = exact_model(model), exact_model(task.model(plan.model, plan.seed + 1))
    records = exact_records(opened.records)
    found = answers(task, model, records)
    shown, pairs = [], []
    for chosen in choose(found, records.label, count):
        record = records.take(torch.tensor([chosen.position]))
        with torch.no_grad():
            score = score_of(task, model(**record.fields))
        attributions = attribute(task, model, record, score)
        pairs.append((attributions, attribute(task, untrained, record, score)))
        shown.append(
            Shown(
                number=int(opened.number[chosen.position]),
                patient=opened.owner[chosen.position] if opened.owner else "",
                why=chosen.why,
                answer=class_name(task, int(found.answer[chosen.position])) if found.target == "class" else "",
                truth=_truth(task, record) if found.target == "class" else "",
                certainty=float(found.certainty[chosen.position]) if found.target == "class" else None,
                loss=float(found.loss[chosen.position]),
                attribution=attributions,
                views=views(task, record, attributions, opened.words[chosen.position] if opened.words else None),
            )
        )
    return Explained(
        study=plan.name, title=plan.title or task.title, digest=opened.study.digest, task=task.name, site=opened.site.site,
        model=digest(opened.weights), meaning=MEANINGS[found.target], held_out=len(records), likeness=likeness(pairs),
        shown=shown,
    )  # fmt: skip


def _truth(task: Task, record: Records) -> str:
    return class_name(task, int(record.label[0]))


def _refuse_shared(out: Path, run: Path, home: Path) -> None:
    """Keep patients' records out of the part of a run folder that is everybody's."""
    out, run, home = out.resolve(), run.resolve(), home.resolve()
    if out.is_relative_to(run) and not out.is_relative_to(home):
        raise ConfigError(
            f"--out {out}: lies in what the hospitals of this run share; the page shows patients, so give another"
        )
