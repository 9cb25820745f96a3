"""``keys reencrypt``: new study keys for what is archived."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.cli.watch import operation
from storescp.errors import PARTLY


@click.command("reencrypt")
@click.option("--study", metavar="UID", help="The packs of a study, and others under the same study keys.")
@click.option("--version", type=click.IntRange(min=1), metavar="V", help="The packs whose study keys V wraps now.")
@click.option("--all", "everything", is_flag=True, help="All packs.")
@click.option("--reason", default="", help="Why; it stands in the audit chain. Not needed to go on.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, in the end.")
@click.pass_obj
def reencrypt_command(
    given: str | None, /, study: str | None, version: int | None, everything: bool, reason: str, as_json: bool
) -> int:
    r"""Give packs new study keys: each is written anew and verified before the old one goes.

    Answers: a study key that leaked, or everything that a version's root opened. Does not answer: who has a copy of the
    old packs opens them with the old key for ever, old backups among them; a leaked passphrase (slot reroot); an old
    backup without keys (rotate).

    The server keeps receiving and giving out; what arrives meanwhile has keys of its own and is not concerned. It needs
    room for the largest pack once more. Stop it at any time: without --reason a second run goes on where this one
    stopped. A pack that is damaged stays as it is, and is named.

    \b
    Examples:
      $ strongroom keys reencrypt --study 1.2.840.113619.2.5 --reason "its key was in a core dump"
      $ strongroom keys reencrypt --all --reason "the machine was broken into"
      $ strongroom keys reencrypt
    Exit status: 0 done, 1 stopped in the middle, 3 some packs are as they were, 4 locked, 5 nothing matched.
    """
    if sum(map(bool, (study, version, everything))) > 1:
        raise click.UsageError("name one of --study, --version and --all")
    asked = {"study": study or "", "version": version or 0, "everything": everything, "reason": reason}
    left: list[dict[str, Any]] = []
    end: dict[str, Any] = {}
    console = Console(stderr=True)
    columns = (TextColumn("re-encrypting"), BarColumn(), MofNCompleteColumn(), TextColumn("packs, {task.fields[size]}"))
    said = ""
    with (
        vault(config_of(given)) as client,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("re-encrypting", total=None, size=output.size(0))
        for event in operation(client, "/v1/keys/reencrypt", asked, "the re-encryption"):
            match event["kind"]:
                case "progress":
                    size = output.size(event["bytes"])
                    progress.update(task, completed=event["done"], total=event["total"], size=size)
                case "left":
                    left.append({k: event[k] for k in ("pack", "study", "reason")})
                    click.echo(f"pack {event['pack']} stays as it is: {event['reason']}", err=True)
                case "waiting" if event["text"] != said:
                    said = event["text"]
                    click.echo(said, err=True)
                case "step" if not as_json:
                    click.echo(event["text"])
                case "summary":
                    end = event
    if as_json:
        output.document({"format": 1, **{k: v for k, v in end.items() if k not in {"kind", "left"}}, "left": left})
    else:
        for line in told(end, left):
            click.echo(line)
    return PARTLY if left else 0


def told(end: dict[str, Any], left: list[dict[str, Any]]) -> list[str]:
    """Return what a re-encryption achieved, and what it did not, line by line."""
    count = end["packs"]
    size = f", {output.size(end['bytes'])}" if end["bytes"] else ""
    lines = [f"{output.plural(count, 'pack')} {'is' if count == 1 else 'are'} under {_keys(count)}{size}"]
    if left:
        lines.append(
            f"{output.plural(len(left), 'pack')} stay under the old keys: restore the files from a backup, have what "
            "'strongroom verify' names sent again or erase it; then run this again"
        )
    if end["waiting"]:
        lines.append(
            f"{output.plural(end['waiting'], 'pack')} still being received into: under the keys that the gate gave "
            "them; run this again when they are admitted if these are concerned"
        )
    made = f"{output.plural(end['backups'], 'backup')} made here and others" if end["backups"] else "those made before"
    versions = f"version{'' if len(end['versions']) == 1 else 's'} {', '.join(map(str, end['versions']))}"
    lines.append(
        f"old backups ({made}) still hold old packs, and their study keys wrapped under key {versions} or older: dead "
        "when these are destroyed ('strongroom keys rotate'), but never for who has an old study key itself"
    )
    lines.append("blocks that a flash disk or a copy-on-write file system keeps of removed files are out of reach")
    return lines


def _keys(count: int) -> str:
    return "a new study key" if count == 1 else "new study keys"
