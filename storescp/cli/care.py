"""``verify``, ``scrub``, ``reindex`` and ``upgrade``: looking after a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from storescp.cli import output
from storescp.cli.session import ask_secret, config_of, secret_document, vault
from storescp.cli.watch import operation, shown
from storescp.errors import FINDINGS, USAGE, StrongroomError


@click.command("verify")
@click.option("--rate", default=0.0, metavar="MB/S", help="Read at most so many megabytes a second.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def verify_command(given: str | None, /, rate: float, as_json: bool) -> int:
    r"""Open every record of every pack; say what is missing, damaged, orphaned or waiting, by study and sender.

    What is damaged can be sent again by the peer that is named: a good copy takes its place by itself.

    \b
    Example:
      $ strongroom verify --rate 50
    Exit status: 0 all is well, 4 locked, 6 findings.
    """
    findings: list[dict[str, Any]] = []
    end: dict[str, Any] = {}
    console = Console(stderr=True)
    with vault(config_of(given)) as client, Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("verifying", total=None)
        for event in client.lines("POST", "/v1/verify", {"rate": rate}):
            if event["kind"] == "progress":
                progress.update(task, completed=event["done"], total=event["total"])
            elif event["kind"] == "finding":
                findings.append(event)
            else:
                end = event
                progress.update(task, completed=end["packs"], total=end["packs"])
    if not end:
        raise StrongroomError("verifying broke off; nothing is proved", hint="the vault's log says why")
    if as_json:
        output.document({"format": 1, "findings": findings, **{k: v for k, v in end.items() if k != "kind"}})
    else:
        _tell(findings, end)
    return FINDINGS if findings else 0


@click.group("scrub")
def scrub_command() -> None:
    """Scrub: packs are read again, a part at a time, so that damage is found while there is a backup."""


@scrub_command.command("run")
@click.option("--all", "whole", is_flag=True, help="Read all packs, not only the next part.")
@click.pass_obj
def scrub_run(given: str | None, /, whole: bool) -> int:
    r"""Read and open the next part of the packs; the schedule does this by itself. Stop it at any time: it goes on.

    \b
    Example:
      $ strongroom scrub run
    Exit status: 0 all is well, 4 locked, 6 findings.
    """
    findings: list[dict[str, Any]] = []
    with vault(config_of(given)) as client, shown("reading") as show:
        for event in operation(client, "/v1/scrub", {"whole": whole}, "the scrub"):
            show(event)
            if event["kind"] == "finding":
                findings.append(event)
    _damaged(findings)
    return FINDINGS if findings else 0


@scrub_command.command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def scrub_status(given: str | None, /, as_json: bool) -> int:
    r"""Say how far the scrub is, and what is damaged, by study and by the peer that sent it.

    \b
    Example:
      $ strongroom scrub status
    Exit status: 0 nothing is damaged, 4 locked, 6 something is.
    """
    with vault(config_of(given)) as client:
        found = client.json("GET", "/v1/scrub")
    if as_json:
        output.document(found)
    else:
        _damaged(found["damaged"])
        click.echo(f"last run: {found['last_run'] or 'never'}; last read to the end: {found['last_round'] or 'never'}")
        packs = output.plural(found["packs"], "pack")
        click.echo(f"this round: {found['packs_of_round']} of {packs}, all in {found['days']} days")
    return FINDINGS if found["damaged"] else 0


def _damaged(findings: list[dict[str, Any]]) -> None:
    rows = []
    for finding in findings:
        start = [finding["what"], finding["reason"], finding["pack"]]
        rows += [[*start, o["calling"], o["study"], o["sop"]] for o in finding["objects"]] or [[*start, "", "", ""]]
    if rows:
        output.table(["What", "Reason", "Pack", "Sent by", "Study UID", "SOP Instance UID"], rows)


@click.command("reindex")
@click.pass_obj
def reindex_command(given: str | None, /) -> None:
    r"""Rebuild the index from packs, key records and the ledger. Receiving goes on; searches wait until it is done.

    \b
    Example:
      $ strongroom reindex
    """
    counts: dict[str, Any] = {}
    with vault(config_of(given)) as client, shown("filling the index") as show:
        for event in operation(client, "/v1/reindex", {}, "filling the index"):
            show(event)
            counts = event
    click.echo(f"indexed {output.plural(counts['instances'], 'instance')} of {counts['studies']} studies")


@click.command("upgrade")
@click.option("--backup-made", is_flag=True, help="Say that a backup of store and keyring was made.")
@click.option("--key-file", type=click.Path(path_type=Path), help="Unlock with a key file.")
@click.option("--passphrase-file", type=click.Path(path_type=Path), help="Read the passphrase from a file.")
@click.pass_obj
def upgrade_command(
    given: str | None, /, backup_made: bool, key_file: Path | None, passphrase_file: Path | None
) -> None:
    r"""Bring a store of an older format to this release's. An upgrade that was interrupted can be run again.

    \b
    Example:
      $ strongroom upgrade --backup-made --key-file /root/strongroom.key
    Exit status: 0 done or nothing to do, 2 no backup was made, 4 this does not unlock the store.
    """
    if not backup_made:
        raise StrongroomError(
            "an upgrade changes the store, and an older release cannot use it any more",
            hint="make a backup of the store and its keyring, then run this with --backup-made",
            status=USAGE,
        )
    config = config_of(given)
    with vault(config, unlocked=False) as client:
        secret = ask_secret(key_file or (None if passphrase_file else config.key_file), passphrase_file)
        done = client.json("POST", "/v1/upgrade", secret_document(secret))["done"]
    for step in done:
        click.echo(step)
    click.echo("upgraded; 'strongroom unlock' or a restart opens it" if done else "the store has this format already")


def _tell(findings: list[dict[str, Any]], end: dict[str, Any]) -> None:
    _damaged(findings)
    waiting = f"; {output.plural(end['waiting'], 'pack')} waiting" if end["waiting"] else ""
    click.echo(
        f"verified {output.plural(end['records'], 'record')} in {output.plural(end['packs'], 'pack')}, "
        f"{output.size(end['bytes'])}: {output.plural(len(findings), 'finding')}{waiting}"
    )
