"""Finding a study by name or path. Packages offer folders of studies through the entry point group `wardround.studies`."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from wardround.common.config import suggest
from wardround.common.errors import ConfigError


def find_study(name_or_path: str) -> Path:
    """The TOML file of a shipped study, or the path itself when it is one.

    Raises:
        ConfigError: neither a file nor a shipped study; lists what there is.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return path
    shipped = {file.stem: file for folder in _folders() for file in sorted(folder.glob("*.toml"))}
    if name_or_path in shipped:
        return shipped[name_or_path]
    hint = suggest(name_or_path, list(shipped))
    raise ConfigError(
        f"no study is called {name_or_path!r}{hint}; there are: {', '.join(shipped)}; or give the path of a .toml file"
    )


def _folders() -> list[Path]:
    return [entry.load() for entry in entry_points(group="wardround.studies")]
