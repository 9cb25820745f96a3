"""``jobs``: what the vault does by itself, when it did it and how that ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import click

from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.cli.watch import operation, shown
from storescp.config import Config
from storescp.control import Client
from storescp.errors import FINDINGS, StrongroomError

# Whoever asks whether somebody is alive does not wait for ever.
_ANSWER_SECONDS = 30.0


@click.group("jobs")
def jobs_command() -> None:
    """List the schedule's jobs, do one now, see how they ended, and whether the schedule is alive."""


@jobs_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def list_jobs(given: str | None, /, as_json: bool) -> None:
    r"""List the jobs: when each is due, and how it ended the last time. Also while the vault is locked.

    Times are in UTC; expressions are in the zone of schedule.timezone.

    \b
    Example:
      $ strongroom jobs list
    """
    with vault(config_of(given), unlocked=False) as client:
        found = client.json("GET", "/v1/jobs")
    if as_json:
        output.document(found)
        return
    columns = ["Job", "When", "Next", "Last", "Result", "Seconds", "What it said"]
    output.table(columns, (_row(item) for item in found["items"]))
    windows = f"; heavy jobs begin in: {'; '.join(found['windows'])}" if found["windows"] else ""
    click.echo(f"times of expressions and windows: {found['timezone']}{windows}", err=True)
    if found["locked"]:
        click.echo("the vault is locked: nothing is done until 'strongroom unlock'", err=True)


def _row(item: dict[str, Any]) -> list[Any]:
    last = item["last"] or {}
    following = item["next"] or "never"
    if item["running"]:
        following = "at work"
    elif item["waits_for"]:
        following = f"{following}, waits for {item['waits_for']}"
    return [
        item["job"],
        item["expression"] or "never",
        following,
        last.get("began", ""),
        last.get("result", ""),
        last.get("seconds", ""),
        last.get("text", ""),
    ]


@jobs_command.command("run")
@click.argument("name", metavar="JOB")
@click.pass_obj
def run_job(given: str | None, /, name: str) -> int:
    r"""Do a job now, as the schedule does it, also outside of the maintenance windows; it is recorded as yours.

    What was due for it up to now is done with that. Jobs go one after the other.

    \b
    Example:
      $ strongroom jobs run checkpoint
    Exit status: 0 done, 1 failed or another is at work, 2 a setting is missing, 4 locked, 5 no such job, 6 findings.
    """
    end: dict[str, Any] = {}
    with vault(config_of(given)) as client, shown(name) as show:
        for event in operation(client, "/v1/jobs/run", {"job": name}, f"job {name}"):
            show(event)
            if event["kind"] in {"finding", "pending"}:
                click.echo(event["text"])
            end = event
    click.echo(f"job {name}: {end['result']}", err=True)
    return FINDINGS if end["result"] == "findings" else 0


@jobs_command.command("history")
@click.option("--job", "name", default="", metavar="JOB", help="Of one job only.")
@click.option("--last", default=50, show_default=True, metavar="N", help="So many of them; 0 for all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def history(given: str | None, /, name: str, last: int, as_json: bool) -> None:
    r"""List how jobs ended, the newest first; the last 1,000 are kept.

    Missed is how many due times went by besides the one that the job was due for.

    \b
    Example:
      $ strongroom jobs history --job backup
    """
    with vault(config_of(given)) as client:
        found = client.json("GET", "/v1/jobs/history")
    items = [item for item in found["items"] if not name or item["job"] == name]
    found["items"] = items[:last] if last else items
    if as_json:
        output.document(found)
        return
    keys = ("job", "due", "missed", "began", "seconds", "by", "result", "text")
    columns = ["Job", "Due", "Missed", "Began", "Seconds", "By", "Result", "What it said"]
    output.table(columns, ([item[key] for key in keys] for item in found["items"]))


@jobs_command.command("alive")
@click.option("--minutes", default=15, show_default=True, metavar="N", help="How long the schedule may be silent.")
@click.pass_obj
def alive(given: str | None, /, minutes: int) -> int:
    r"""Say whether the schedule is alive: the vault runs, its schedule goes, and no job is overdue.

    Overdue is what could have begun longer ago than its own period and has not. A vault that is locked is no error by
    itself; what it does not do meanwhile is. strongroom-alive.timer asks this, beside the vault.

    \b
    Example:
      $ strongroom jobs alive || mail -s "strongroom" admin@example.org
    Exit status: 0 alive, 1 no vault runs or answers, 6 the schedule stands still, or a job is overdue.
    """
    found = _asked(config_of(given))
    said = list(complaints(found, minutes))
    for line in said:
        click.echo(line, err=True)
    if said:
        return FINDINGS
    dues = [(item["next"], item["job"]) for item in found["items"] if item["next"]]
    following = f"; next is {min(dues)[1]}, due at {min(dues)[0]}" if dues else "; no job has a time"
    click.echo(f"the schedule is alive{' and the vault is locked' if found['locked'] else ''}{following}")
    return 0


def complaints(found: dict[str, Any], minutes: int) -> Iterator[str]:
    """Yield what is wrong with a schedule, as the vault tells of it.

    Args:
        found: What ``GET /v1/jobs`` answers.
        minutes: How long it may be silent.
    """
    if found["ticked_seconds"] > minutes * 60:
        yield f"the schedule stands still: it was looked at last at {found['ticked']}; the vault's log says more"
    for item in found["items"]:
        if item["overdue"]:
            why = f"; it waits for {item['waits_for']}" if item["waits_for"] else ""
            yield f"job {item['job']} is overdue: it was due at {item['next']}{why}"


def _asked(config: Config) -> Any:
    """Ask the running vault, and no other: one that were started for this would say that it runs.

    Raises:
        StrongroomError: None runs or answers.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_ANSWER_SECONDS)
    client = Client(connection)
    try:
        connection.connect(os.fspath(config.socket))
        return client.json("GET", "/v1/jobs")
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise StrongroomError(
            "no vault is running: nothing of the schedule is done",
            hint="'systemctl status strongroom-vault' or the log of 'strongroom serve' says why",
        ) from error
    except OSError as error:
        raise StrongroomError(f"the vault's socket {config.socket} cannot be used: {error}") from error
    finally:
        client.close()
