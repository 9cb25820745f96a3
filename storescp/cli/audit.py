"""``audit show|who|verify|restart``: who did what, and the proof of it; ``audit-forwarder``: who tells others."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

import click

from keys.versions import store_id_of
from storage import audit
from storage.audit import Head, Verified
from storescp.cli import output
from storescp.cli.review import review_command
from storescp.cli.session import config_of, vault
from storescp.config import Config
from storescp.control import Client
from storescp.errors import FINDINGS, NOTHING, USAGE, StrongroomError
from storescp.log import escape

_OWN = {"number", "time", "type"}
_SINCE = re.compile(r"\d{4}-\d\d-\d\d(T\d\d(:\d\d(:\d\d(\.\d{1,6})?)?)?Z?)?", re.ASCII)
_HEAD = re.compile(r"(0|[1-9][0-9]{0,15}):([0-9a-f]{64})", re.ASCII)
_APPEND_SECONDS = 0.1


@click.group("audit")
def audit_command() -> None:
    """Read and check the audit chain: who connected, was refused, stored, looked, exported, unlocked, changed peers."""


audit_command.add_command(review_command)


@audit_command.command("show")
@click.option("--after", default=0, metavar="NUMBER", help="Only records behind this one.")
@click.option(
    "--since", default="", metavar="TIME", help="Only from this time on, UTC, as 2026-01-31 or 2026-01-31T08:00."
)
@click.option("--type", "types", multiple=True, help="Only records of this type; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="A JSON document a line.")
@click.pass_obj
def show(given: str | None, /, after: int, since: str, types: tuple[str, ...], as_json: bool) -> int:
    r"""Show the records of the audit chain, the oldest first. That you read them is recorded, too.

    \b
    Examples:
      $ strongroom audit show --since 2026-01-31
      $ strongroom audit show --type gate-events --json
    Exit status: 0 shown, 4 locked, 5 nothing matched.
    """
    count = 0
    asked = {"after": after, "since": _time(since), "types": list(types)}
    with vault(config_of(given)) as client:
        for record in client.lines("POST", "/v1/audit", asked):
            count += 1
            if as_json:
                click.echo(json.dumps(record, ensure_ascii=False))
                continue
            for line in _lines(record):
                click.echo(line)
    if not count:
        click.echo("nothing matched", err=True)
        return NOTHING
    return 0


@audit_command.command("who")
@click.option("--patient", default="", metavar="ID", help="Patient ID; - reads it from standard input.")
@click.option(
    "--study", "studies", multiple=True, metavar="UID", help="A study, also one that is erased; may be repeated."
)
@click.option("--since", default="", metavar="TIME", help="Only from this time on, UTC, as 2026-01-31.")
@click.option("--json", "as_json", is_flag=True, help="A JSON document a line, the summary last.")
@click.pass_obj
def who(given: str | None, /, patient: str, studies: tuple[str, ...], since: str, as_json: bool) -> int:
    r"""Say who sent, saw, exported or erased a patient's studies. That you ask is recorded, too.

    The audit chain names studies, and the index whose they are: of a study that was erased nobody knows any more whose
    it was. Ask for one by its UID. A list that somebody made counts as seen if it would show the patient now.

    \b
    Examples:
      $ strongroom audit who --patient - --since 2026-01-01
      $ strongroom audit who --study 1.2.840.99.7 --json
    Exit status: 0 shown, 4 locked, 5 nobody did anything.
    """
    if patient == "-":
        patient = sys.stdin.readline().rstrip("\r\n")
    if not patient and not studies:
        raise StrongroomError(
            "this asks about a patient or a study", hint="name one: --patient ID, --study UID", status=USAGE
        )
    rows, summary = [], {"studies": 0, "others_erased": 0}
    with vault(config_of(given)) as client:
        asked = {"patient": patient, "studies": list(studies), "since": _time(since)}
        for row in client.lines("POST", "/v1/audit/who", asked):
            if as_json:
                click.echo(json.dumps(row, ensure_ascii=False))
            if row["kind"] == "summary":
                summary = row
            else:
                rows.append(row)
    if not as_json and rows:
        cells = [
            [
                str(r["number"]),
                r["time"][:19] + "Z",
                r["kind"],
                r["who"],
                r["study"],
                _count(r),
                r["what"],
            ]
            for r in rows
        ]
        output.table(["Record", "Time", "Did", "Who", "Study", "Instances", "What"], cells)
    if patient and not as_json:
        click.echo(f"{output.plural(summary['studies'], 'study', 'studies')} of this patient held", err=True)
        if erased := summary["others_erased"]:
            click.echo(
                f"{output.plural(erased, 'study', 'studies')} erased whose patient is not known any more: --study asks",
                err=True,
            )
    if not rows:
        click.echo("nobody did anything", err=True)
        return NOTHING
    return 0


@audit_command.command("verify")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Another folder: a copy, a backup.")
@click.option("--head", metavar="NUMBER:HASH", help="A head that you kept: the chain must have come through it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def verify(given: str | None, /, folder: Path | None, head: str | None, as_json: bool) -> int:
    r"""Check that every record follows from the one before and that the store signed it. Works while it is locked.

    Note the head that it prints, away from this machine: with it, a later check finds what was cut or rewritten since.

    \b
    Examples:
      $ strongroom audit verify
      $ strongroom audit verify --folder /mnt/backup/audit --head 90412:5f2c...
    Exit status: 0 whole, 1 cannot be read, 6 the chain is broken: the first broken record is named.
    """
    config = config_of(given)
    kept = _head(head) if head is not None else None
    try:
        found = _checked(config, folder, kept)
    except OSError as error:
        raise StrongroomError(
            f"the audit chain cannot be read: {error}", hint="run this as root, or as the user that the vault runs as"
        ) from error
    fault = found.fault
    checkpoint = found.checkpoint
    if as_json:
        output.document(
            {
                "format": 1,
                "whole": not fault,
                "fault": fault,
                "head": {"number": found.head.number, "hash": found.head.hash.hex()},
                "checkpoint": {"number": checkpoint.number, "time": checkpoint.time} if checkpoint else None,
                "unsigned": found.unsigned,
            }
        )
        return FINDINGS if fault else 0
    click.echo(
        f"{output.plural(found.head.number, 'record')} in order; head {found.head.number}:{found.head.hash.hex()}"
    )
    if checkpoint:
        click.echo(f"signed up to record {checkpoint.number} at {checkpoint.time}")
    if found.unsigned:
        click.echo(f"{output.plural(found.unsigned, 'record')} not signed yet: the vault signs when it is unlocked")
    if fault:
        click.echo(f"BROKEN: {fault}")
        return FINDINGS
    click.echo("whole")
    return 0


@audit_command.command("restart")
@click.option("--reason", required=True, help="Why; it becomes the new chain's first record.")
@click.pass_obj
def restart(given: str | None, /, reason: str) -> None:
    r"""Put a broken chain aside, where it stays, and begin a new one, so that admins can act again.

    \b
    Example:
      $ strongroom audit restart --reason "disk failure of 3 May, ticket 4711"
    """
    with vault(config_of(given), unlocked=False) as client:
        aside = client.json("POST", "/v1/audit/restart", {"reason": reason})["aside"]
    click.echo(f"the old chain is {aside}; keep it. A new one began")


@click.command("audit-forwarder")
@click.pass_obj
def audit_forwarder_command(given: str | None, /) -> None:
    r"""Run the sender of audit messages alone: reads the vault's spool, sends by syslog over TLS, opens no store.

    'serve' starts it by itself where audit.forward is set.

    \b
    Example:
      $ strongroom audit-forwarder
    Exit status: 0 stopped, 1 cannot start, 2 configuration.
    """
    from storescp import child, log
    from storescp.errands import forward
    from storescp.harden import harden

    config = config_of(given)
    harden(0o077)
    log.set_up("audit-forwarder", config.settings.log.format, config.settings.log.level)
    child.die_with_parent()
    forward.run(config)


def _checked(config: Config, folder: Path | None, kept: Head | None) -> Verified:
    for last in (False, False, True):
        # Asked before the chain is read: what the vault wrote until then must be in it.
        written = None if folder else _written(config)
        found = audit.verify(
            folder or config.store_path / "audit", store_id_of(config.signing_key), config.signing_key, known=written
        )
        # A running vault may be in the middle of an append, of which half a line is there for a moment.
        if not found.fault or written is None or last:
            break
        time.sleep(_APPEND_SECONDS)
    if kept is None or found.fault:
        return found
    return audit.verify(
        folder or config.store_path / "audit", store_id_of(config.signing_key), config.signing_key, known=kept
    )


def _written(config: Config) -> Head | None:
    """Return the head that the running vault wrote last; None where none runs that can be asked.

    None is started for this: it would write to what is to be checked.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client = Client(connection)
    try:
        connection.connect(os.fspath(config.socket))
        head = client.json("GET", "/v1/audit")["head"]
    except (OSError, StrongroomError):
        return None
    finally:
        client.close()
    return Head(head["number"], bytes.fromhex(head["hash"])) if head else None


def _head(text: str) -> Head:
    found = _HEAD.fullmatch(text)
    if found is None:
        raise click.BadParameter(f"'{text}' is no head: NUMBER:HASH, as 'audit verify' prints it")
    return Head(int(found[1]), bytes.fromhex(found[2]))


def _lines(record: dict[str, Any]) -> list[str]:
    lines = [f"{record['number']:>8}  {_words(record, 'events')}"]
    if isinstance(record.get("events"), list):
        lines += [f"{'':>8}    {_words(event)}" for event in record["events"]]
    return lines


def _count(row: dict[str, Any]) -> str:
    return str(row["instances"]) if row["instances"] else ""


def _words(record: dict[str, Any], *left_out: str) -> str:
    fields = [
        f"{k}={_value(v)}" for k, v in record.items() if k not in _OWN and k not in left_out and v not in ("", {}, [])
    ]
    return escape(" ".join([str(record.get("time", ""))[:19] + "Z", str(record.get("type", "")), *fields]))


def _value(value: Any) -> str:
    return value if isinstance(value, str) and " " not in value else json.dumps(value, ensure_ascii=False)


def _time(text: str) -> str:
    """Return the beginning of a time as records have it.

    Raises:
        click.BadParameter: It is none: nothing would match, and look as if nothing had happened.
    """
    if text and not _SINCE.fullmatch(text):
        raise click.BadParameter(f"'{text}' is no time; write 2026-01-31 or 2026-01-31T08:00", param_hint="--since")
    return text
