"""The coordinator's own file: where it listens, where its state, keys and the consortium's public folder are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints

from wardround.common.config import Config
from wardround.common.plan import Count
from wardround.common.vault import Vault

Port = Annotated[int, Field(ge=1, le=65535)]


class CoordinatorConfig(Config):
    """What `wardround serve` needs to know; relative paths start at the file's own folder."""

    host: Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9.:_-]+$")] = "0.0.0.0"
    port: Port = 8443  # hospitals call this one
    control_port: Port = 8444  # on loopback alone: the coordinator's own studies
    state: Annotated[Path, Field(strict=False)] = Path("state")  # studies, checkpoints, Flower's database, the audit log
    keys: Annotated[Path, Field(strict=False)] = Path()  # the folder with tls.key and sign.key
    trust: Annotated[Path, Field(strict=False)] = Path(
        "public"
    )  # the consortium's public folder, as `approve` and `revoke` leave it
    studies_at_once: Count = 1  # others wait in the order they were started
    requests_per_second: Count = 200  # of one site, in the long run
    vault: Annotated[str, StringConstraints(pattern=r"^(file|passphrase|credential):.+$")] | None = None  # seals checkpoints

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file; raises `ConfigError` with every problem in it."""
        config = super().load(path)
        home = path.resolve().parent
        folders = {name: home / getattr(config, name) for name in ("state", "keys", "trust")}
        kind, _, name = (config.vault or "").partition(":")
        vault = f"{kind}:{home / name}" if kind in ("file", "passphrase") else config.vault
        return config.model_copy(update={**folders, "vault": vault})

    def opened_vault(self) -> Vault:
        """What seals checkpoints and the model; raises `ConfigError` where there is no such key."""
        return Vault.none() if self.vault is None else Vault.open(self.vault)
