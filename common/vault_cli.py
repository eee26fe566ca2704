"""`wardround vault`: keys for files at rest, and what is sealed with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

vault = typer.Typer(no_args_is_help=True, help="Keys for checkpoints and models at rest, and what is sealed with them.")

Key = Annotated[str, typer.Option(metavar="KEY", help="A key file, passphrase:FILE, or credential:NAME (of systemd).")]
Sealed = Annotated[Path, typer.Argument(help="A sealed file.")]


@vault.command()
def new_key(file: Annotated[Path, typer.Argument(help="Where the key goes; it is never written over.")]) -> None:
    """Write a new random key that only you may read. Without it what it seals is gone: keep a copy elsewhere."""
    from wardround.common.key_sources import new_key_file

    new_key_file(file)
    print(file)


@vault.command()
def rotate(
    folder: Annotated[Path, typer.Argument(help="Every *.sealed file in it and below it.")],
    old: Key,
    new: Key,
) -> None:
    """Seal a folder's files for a new key; whatever sealed them must not run meanwhile.

    Only the files' own keys are wrapped anew. What was interrupted is finished by the same command.
    """
    from wardround.common.errors import ConfigError, VaultBroken
    from wardround.common.vault import Vault

    before, after = Vault.open(old), Vault.open(new)
    files = sorted(folder.rglob("*.sealed"))
    if not files:
        raise ConfigError(f"{folder} holds no sealed file")
    waiting = [path for path in files if not after.holds(path)]
    for path in waiting:
        if not before.holds(path):
            raise VaultBroken(f"{path.name} is sealed with neither key; nothing was changed", detail=str(path))
    for path in waiting:
        before.hand_over(path, after)
    print(f"{len(waiting)} of {len(files)} sealed files now need the new key; the others already did.")


@vault.command("open")
def open_sealed(
    file: Sealed,
    out: Annotated[Path, typer.Argument(help="Where the plain file goes; it is never written over.")],
    key: Key,
) -> None:
    """Write what a sealed file holds to a plain one that only you may read."""
    from wardround.common.files import replace_atomically
    from wardround.common.vault import Vault

    _free(out)
    replace_atomically(out, Vault.open(key).stream(file), mode=0o600)


@vault.command("seal")
def seal_plain(
    file: Annotated[Path, typer.Argument(help="A plain file; it stays where it is.")],
    out: Annotated[Path, typer.Argument(help="Where the sealed file goes; it is never written over.")],
    key: Key,
) -> None:
    """Seal a plain file under the name of OUT, as the coordinator would have."""
    from wardround.common.vault import Vault

    _free(out)
    Vault.open(key).write(out, file.read_bytes(), label=out.name)


def _free(path: Path) -> None:
    from wardround.common.errors import ConfigError

    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists and is not written over")
