"""``doctor``: this installation against the practices that hospitals are told to follow; or a server from outside."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from storescp import clock
from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.config import Config
from storescp.control import Client
from storescp.errors import StrongroomError
from storescp.log import escape

_ANSWER_SECONDS = 30.0
_TARGET = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)):([0-9]{1,5})", re.ASCII)


@click.command("doctor")
@click.option("--exposure", "target", metavar="HOST:PORT", help="Look at one of your own servers from outside instead.")
@click.option("--seconds", default=5, show_default=True, metavar="N", help="With --exposure: for each question.")
@click.option("--all", "everything", is_flag=True, help="Also what is as it should be.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, with everything.")
@click.pass_obj
def doctor_command(given: str | None, /, target: str | None, seconds: int, everything: bool, as_json: bool) -> int:
    r"""Check this installation: what was found, why it matters, and the command that mends it.

    Looks at disks, swap, owners, listeners, certificates, keys, recovery, backups and what else runs here
    (docs/doctor.md). Changes nothing. As root it sees all of the machine; what cannot be seen is 'unknown'. Of a locked
    vault it sees little.

    With --exposure it needs no store: it connects as a scanner would, without TLS, without a client certificate, with
    AE titles that nobody knows, and says what it saw. For your own servers only: others may take it for an attack.

    \b
    Examples:
      $ sudo strongroom doctor
      $ strongroom doctor --exposure 192.0.2.10:2762
    Exit status: 0 nothing to mend or advice only, 6 something critical or a warning. Unknown alone is 0, and counted.
    """
    now = datetime.now(UTC)
    made: dict[str, Any] = {"format": 1, "time": clock.text(now)}
    if target is not None:
        from storescp.doctor import exposure, probe

        host, port = _split(target)
        click.echo(f"looking at {target}: for your own servers only, others may take this for an attack", err=True)
        found = exposure.judge(probe.look(host, port, max(1, seconds)), now)
        made["exposure"] = target
    else:
        from storescp.doctor import judge

        found = judge.judge(_facts(config_of(given), now))
    from storescp.doctor import findings

    counts = findings.counts(found)
    if as_json:
        items = [{k: escape(v) for k, v in msgspec.to_builtins(finding).items()} for finding in found]
        output.document(made | {"findings": items, "summary": counts})
    else:
        # Of a server that was looked at from outside every answer is told.
        _tell([f for f in found if everything or target is not None or f.grade != findings.OK])
        click.echo(", ".join(f"{count} {grade}" for grade, count in counts.items()))
    return findings.status(found)


def _facts(config: Config, now: datetime) -> Any:
    from storescp.doctor import machine, store
    from storescp.doctor.facts import Facts

    answers = _answers(config)
    return Facts(
        now=now, machine=machine.look(config.file, store.ports(config)), store=store.look(config), answers=answers
    )


def _answers(config: Config) -> Any:
    """Ask the running vault, or one that is started for this command; what none tells is unknown."""
    from storescp.doctor import asked

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_ANSWER_SECONDS)
    try:
        connection.connect(os.fspath(config.socket))
        return asked.answers(Client(connection))
    except (FileNotFoundError, ConnectionRefusedError):
        try:
            with vault(config, unlocked=False) as client:
                return asked.answers(client)
        except (StrongroomError, OSError) as error:
            return asked.nobody(f"no vault runs, and none can be started: {error}")
    except OSError as error:
        return asked.nobody(f"the vault's socket cannot be used: {error.strerror or error}; run the doctor as root")
    finally:
        connection.close()


def _split(target: str) -> tuple[str, int]:
    found = _TARGET.fullmatch(target)
    try:
        if found is None or not 0 < int(found[4]) < 65_536:
            raise ValueError
        return str(ipaddress.IPv6Address(found[1])) if found[1] else found[2], int(found[4])
    except ValueError as error:
        raise click.BadParameter(f"'{target}' is no HOST:PORT, as in 192.0.2.10:2762 or [::1]:2762") from error


def _tell(found: list[Any]) -> None:
    grade = ""
    for finding in found:
        if finding.grade != grade:
            grade = finding.grade
            click.echo(f"{grade.upper()}")
        click.echo(f"  {finding.practice}: {escape(finding.found)}")
        source = f" ({finding.source})" if finding.source else ""
        click.echo(f"    why:  {finding.why}{source}")
        if finding.mend:
            click.echo(f"    mend: {escape(finding.mend)}")
    if found:
        click.echo()
