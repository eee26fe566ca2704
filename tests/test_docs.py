"""What the documents say is so: files parse, links lead somewhere, commands exist."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import typer.main

from wardround.client.policy import Compute, DataSource, Network, SiteConfig, SitePolicy
from wardround.common.cli import application
from wardround.common.plan import LocalPlan, LossPlan, PrivacyPlan, StepPlan, StudyPlan, ValidationPlan
from wardround.server.network.config import CoordinatorConfig

ROOT = Path(__file__).parent.parent
SECTIONS = (Compute, DataSource, Network, SitePolicy, LocalPlan, LossPlan, PrivacyPlan, StepPlan, ValidationPlan)
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(text) for _, text in found]


def test_toml_in_the_documents_parses_as_what_it_claims_to_be():
    found = [block for path in DOCUMENTS for block in blocks(path, "toml")]
    kinds = {"# study": StudyPlan, "# site": SiteConfig, "# coordinator": CoordinatorConfig}
    read = [kinds[block.splitlines()[0]].parse(block) for block in found]
    assert {type(config) for config in read} == set(kinds.values())


def test_every_key_of_every_file_is_documented():
    text = (ROOT / "docs" / "files.md").read_text()
    for model in (StudyPlan, SiteConfig, CoordinatorConfig):
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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_only_verbs_and_options_that_exist_are_named(path: Path):
    for block in blocks(path, "(?:bash)?"):
        for line in re.findall(r"^(?:\S*/bin/)?wardround (.*)$", block, re.MULTILINE):
            assert misnamed(line) == "", line


def misnamed(line: str) -> str:
    """The first verb or option of a command line that does not exist."""
    command = typer.main.get_command(application())
    words = line.split("#")[0].split()
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            return words[0]
        command = command.commands[words.pop(0)]
    known = {option for p in command.params for option in p.opts}
    return next((word for word in words if word.startswith("--") and word not in known), "")


def test_a_verb_or_an_option_that_does_not_exist_is_found():
    assert misnamed("serves coordinator.toml") == "serves"
    assert misnamed("vault shut x") == "shut"
    assert misnamed("doctor site.toml --bundel x") == "--bundel"
    assert misnamed("doctor site.toml --bundle x  # --bundel") == ""


def test_the_two_commands_of_the_readme_are_what_ci_runs():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- command: run -->") == readme.count("<!-- command: test -->") == 1
    ci = (ROOT / ".ci" / "run").read_text()
    assert "command_of run" in ci
    assert "command_of test" in ci
