"""One TOML text in, one frozen model out, or every problem in it."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from wardround.common.errors import ConfigError

LARGEST_FILE = 1 << 20  # bytes; a plan is a page, so a larger file is a mistake or an attack
_LONGEST_VALUE = 200  # characters of a file that one line of an error quotes


class Config(BaseModel):
    """A frozen, strict section of a TOML file: no unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `path`; raises `ConfigError` naming every problem with its key, what it got and what it wanted."""
        return cls.parse(read_text(path), source=str(path))

    @classmethod
    def parse(cls, text: str, *, source: str = "text") -> Self:
        """Parse TOML `text`; `source` names it in errors."""
        try:
            table = tomllib.loads(text)
        except ValueError as error:  # a TOMLDecodeError, or an integer of thousands of digits
            raise ConfigError(f"{source} is not valid TOML: {_shown(str(error))}") from None
        except RecursionError:
            raise ConfigError(f"{source} is not valid TOML: it is nested too deeply") from None
        return cls.build(table, source=source)

    @classmethod
    def build(cls, table: dict[str, Any], *, source: str) -> Self:
        """Validate a parsed table; the same errors as `parse`."""
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            problems = "\n".join(f"  {_sentence(cls, problem)}" for problem in error.errors())
            raise ConfigError(f"{source} is not a valid {cls.__name__}:\n{problems}") from None


def read_text(path: Path, most: int = LARGEST_FILE) -> str:
    """The UTF-8 text of a file of at most `most` bytes; raises `ConfigError` for anything else."""
    try:
        if path.stat().st_size > most:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {most}")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def suggest(name: str, known: list[str]) -> str:
    """A hint for a misspelt `name`.

    >>> suggest("min_site", ["min_sites", "rounds"])
    ' (did you mean min_sites?)'
    >>> suggest("xyz", ["min_sites"])
    ''
    """
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _shown(text: str) -> str:
    """`text` fit for a terminal: short, and without control characters."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _sentence(model: type[BaseModel], problem: ErrorDetails) -> str:
    key = ".".join(_shown(str(part)) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, problem["loc"][:-1])
        return f"{key}: no such key{suggest(str(problem['loc'][-1]), known)}"
    if problem["type"] == "missing":
        return f"{key}: is missing"
    if problem["type"] == "value_error":  # raised by our own validators, which say everything themselves
        text = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {text}" if key else text
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]} (got {_shown(repr(problem['input']))})"


def _keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            return []
        nested = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        nested = [t for t in nested if issubclass(t, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
