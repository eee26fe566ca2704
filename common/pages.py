"""Pages that are one file: a template filled in, with every text in it escaped."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def filled(template: Path, **values: object) -> str:
    """The page of `template`, a Jinja file that may include those beside it.

    Raises:
        UndefinedError: the template asks for what `values` does not hold.
    """
    room = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return room.get_template(template.name).render(values)
