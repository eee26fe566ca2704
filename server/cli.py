"""`wardround check`: a study plan in sentences, before anybody agrees to it."""

from __future__ import annotations

from typing import Annotated

import typer


def check(
    study: Annotated[str, typer.Argument(help="A shipped study or the path of a study's TOML file.")],
    json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
) -> None:
    """Say what a study plan means: who takes part, what a patient pays, what leaves a hospital. Or every problem in it."""
    import json as json_module

    from wardround.common.plan import SignedText
    from wardround.common.studies import find_study
    from wardround.server.explain import facts, sentences

    found = SignedText.load(find_study(study))
    print(json_module.dumps(facts(found), indent=2) if json else "\n".join(sentences(found)))
