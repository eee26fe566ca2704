"""Name to thing. A plan names registered things only; it can never name code to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from wardround.common.config import suggest
from wardround.common.errors import ConfigError


class Named(Protocol):
    """Anything that carries its own registered name."""

    @property
    def name(self) -> str:
        """The name used in TOML files."""


Thing = TypeVar("Thing", bound=Named)


def registry(*things: Thing) -> dict[str, Thing]:
    """Things by name; a name given twice is a programming error.

    Raises:
        ValueError: two things share a name.
    """
    found = {thing.name: thing for thing in things}
    if len(found) != len(things):
        raise ValueError("two registered things share a name")
    return found


T = TypeVar("T")


def look_up(kind: str, name: str, known: Mapping[str, T]) -> T:
    """The registered thing called `name`.

    >>> look_up("task", "heart-diseas", {"heart-disease": 1})
    Traceback (most recent call last):
    wardround.common.errors.ConfigError: no task is called 'heart-diseas' (did you mean heart-disease?); \
there are: heart-disease
    """
    try:
        return known[name]
    except KeyError:
        names = ", ".join(sorted(known))
        hint = suggest(name, list(known))
        raise ConfigError(f"no {kind} is called {name!r}{hint}; there are: {names}") from None
