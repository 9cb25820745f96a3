"""``serve``, ``gate`` and ``vault``: the long-running processes."""

from __future__ import annotations

import socket
import sys

import click

from storescp import log
from storescp.cli.session import config_of
from storescp.config import Config
from storescp.harden import harden


@click.command("serve")
@click.pass_obj
def serve_command(given: str | None, /) -> None:
    r"""Run gate and vault under one supervisor, as one user, until SIGTERM.

    Receives DICOM over TLS from the configured peers. With an unlock.key_file in the configuration the vault
    unlocks by itself; without one it receives all the same and waits for 'strongroom unlock'.

    \b
    Example:
      $ strongroom --config /srv/strongroom/strongroom.toml serve
    Exit status: 0 stopped, 1 cannot start, 2 configuration.
    """
    from storescp import supervisor

    config = _started("serve", given)
    supervisor.run(config)


@click.command("gate")
@click.pass_obj
def gate_command(given: str | None, /) -> None:
    r"""Run the gate alone: receives and deposits with its workers, opens nothing.

    \b
    Example:
      $ strongroom gate
    Exit status: 0 stopped, 1 cannot start, 2 configuration.
    """
    _lean()
    from storescp import child
    from storescp.gate import service

    config = _started("gate", given)
    child.die_with_parent()
    service.run(config)


@click.command("gate-worker", hidden=True)
@click.option("--channel", type=int, required=True, help="The inherited channel to the gate's first process.")
@click.option("--replaces", is_flag=True, help="Another worker died.")
@click.pass_obj
def gate_worker_command(given: str | None, /, channel: int, replaces: bool) -> None:
    """Run a worker of the gate; the gate starts its workers itself."""
    _lean()
    from storescp import child
    from storescp.gate import worker

    config = _started("gate", given)
    child.die_with_parent()
    worker.run(config, socket.socket(fileno=channel), replaces=replaces)


@click.command("desk")
@click.pass_obj
def desk_command(given: str | None, /) -> None:
    r"""Run the desk alone: answers queries and gives studies back to the peers that may, opens nothing by itself.

    \b
    Example:
      $ strongroom desk
    Exit status: 0 stopped, 1 cannot start, 2 configuration.
    """
    from storescp import child
    from storescp.desk import service

    config = _started("desk", given)
    child.die_with_parent()
    service.run(config)


@click.command("vault")
@click.option("--connection", type=int, hidden=True, help="Serve one inherited connection only.")
@click.pass_obj
def vault_command(given: str | None, /, connection: int | None) -> None:
    r"""Run the vault alone: admits deposits and answers this command line. It opens no network port.

    \b
    Example:
      $ strongroom vault
    Exit status: 0 stopped, 1 cannot start, 2 configuration.
    """
    from storescp import child
    from storescp.vault import service

    config = _started("vault", given, quiet=connection is not None)
    child.die_with_parent()
    single = socket.socket(fileno=connection) if connection is not None else None
    service.run(config, single=single)


def _lean() -> None:
    """Keep out what pydicom loads where it is installed, for pixels and downloads: a gate needs neither."""
    for name in ("numpy", "PIL", "requests"):
        # An import of it fails as if it were not there.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _started(process: str, given: str | None, *, quiet: bool = False) -> Config:
    config = config_of(given)
    # Deposits must be readable by their group, which is the vault's where those who make them are other users.
    harden(0o027 if process in {"gate", "desk"} else 0o077)
    settings = config.settings.log
    log.set_up(process, settings.format, "error" if quiet else settings.level)
    return config
