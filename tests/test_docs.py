"""What the documents say is so: files parse, links lead somewhere, commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from wardround.client.policy import Compute, DataSource, SiteConfig, SitePolicy
from wardround.common.cli import application
from wardround.common.plan import LocalPlan, LossPlan, PrivacyPlan, StepPlan, StudyPlan, ValidationPlan

ROOT = Path(__file__).parent.parent
SECTIONS = (Compute, DataSource, SitePolicy, LocalPlan, LossPlan, PrivacyPlan, StepPlan, ValidationPlan)
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def test_toml_in_the_documents_parses_as_what_it_claims_to_be():
    found = [block for path in DOCUMENTS for block in blocks(path, "toml")]
    kinds = {"# study": StudyPlan, "# site": SiteConfig}
    read = [kinds[block.splitlines()[0]].parse(block) for block in found]
    assert {type(config) for config in read} == {StudyPlan, SiteConfig}


def test_every_key_of_a_study_and_a_site_file_is_documented():
    text = (ROOT / "docs" / "files.md").read_text()
    for model in (StudyPlan, SiteConfig):
        for name in keys(model):
            assert re.search(rf"\b{name}\b", text), f"docs/files.md does not mention {name}"


def keys(model: type) -> set[str]:
    found: set[str] = set()
    for name, field in model.model_fields.items():  # type: ignore[attr-defined]
        found.add(name)
        for inner in re.findall(r"[A-Z]\w+", repr(field.annotation)):
            nested = {cls.__name__: cls for cls in SECTIONS}.get(inner)
            found |= keys(nested) if nested else set()
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_readme_names_only_verbs_and_options_that_exist():
    app = typer.main.get_command(application())
    for block in blocks(ROOT / "README.md", "bash"):
        for line in re.findall(r"^(?:\.venv/bin/)?wardround (.*)$", block, re.MULTILINE):
            verb, *rest = line.split("#")[0].split()
            known = {option for p in app.commands[verb].params for option in p.opts}  # type: ignore[attr-defined]
            assert {word for word in rest if word.startswith("--")} <= known


def test_the_two_commands_of_the_readme_are_what_ci_runs():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- command: run -->") == readme.count("<!-- command: test -->") == 1
    ci = (ROOT / ".ci" / "run").read_text()
    assert "command_of run" in ci
    assert "command_of test" in ci
