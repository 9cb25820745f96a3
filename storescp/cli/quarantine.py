"""``quarantine list|show|resolve|export``: what was not admitted, and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from storescp.cli import output
from storescp.cli.export import write
from storescp.cli.session import config_of, vault
from storescp.control import Client
from storescp.errors import NOTHING, StrongroomError


@click.group("quarantine")
def quarantine_command() -> None:
    """Look at and decide about what was not admitted: other content under a held UID, another patient."""


@quarantine_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def list_items(given: str | None, /, as_json: bool) -> int:
    r"""List what is in quarantine, and why.

    \b
    Example:
      $ strongroom quarantine list
    Exit status: 0 listed, 4 locked, 5 nothing is there.
    """
    with vault(config_of(given)) as client:
        items = client.json("GET", "/v1/quarantine")["items"]
    if as_json:
        output.document({"format": 1, "items": items})
    elif items:
        keys = ("id", "reason", "calling", "received_at", "held_calling", "sop")
        columns = ["Id", "Reason", "From", "Received", "Held one is from", "SOP Instance UID"]
        output.table(columns, ([item.get(key) for key in keys] for item in items))
    if not items:
        click.echo("nothing is in quarantine", err=True)
        return NOTHING
    return 0


@quarantine_command.command("show")
@click.argument("item_id", metavar="ID")
@click.pass_obj
def show(given: str | None, /, item_id: str) -> None:
    r"""Show all that is known about one item, and about the instance that is held under its UID.

    \b
    Example:
      $ strongroom quarantine show 3f9a1c22b0d4-1
    """
    with vault(config_of(given)) as client:
        output.document(_find(client, item_id))


@quarantine_command.command("resolve")
@click.argument("item_id", metavar="ID")
@click.option("--accept", "kind", flag_value="accept", help="It is held from now on; the other one stays as replaced.")
@click.option("--discard", "kind", flag_value="discard", help="It and its key are removed.")
@click.option("--reason", required=True, help="Why; it is kept in the ledger with your user id.")
@click.pass_obj
def resolve(given: str | None, /, item_id: str, kind: str | None, reason: str) -> None:
    r"""Decide about one item. Nothing is decided by itself, and nothing that is held is removed by a decision.

    \b
    Examples:
      $ strongroom quarantine resolve 3f9a1c22b0d4-1 --discard --reason "sent twice by a test"
      $ strongroom quarantine resolve 3f9a1c22b0d4-1 --accept --reason "corrected by the modality"
    """
    if kind is None:
        raise click.UsageError("name --accept or --discard")
    with vault(config_of(given)) as client:
        client.json("POST", "/v1/quarantine", {"id": item_id, "kind": kind, "reason": reason})
    click.echo(f"{item_id}: {'held from now on' if kind == 'accept' else 'removed'}")


@quarantine_command.command("export")
@click.argument("item_id", metavar="ID")
@click.option("--output", "file", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to write.")
@click.pass_obj
def export(given: str | None, /, item_id: str, file: Path) -> None:
    r"""Write one item as a DICOM file, in clear, to look at it before deciding.

    \b
    Example:
      $ strongroom quarantine export 3f9a1c22b0d4-1 --output look.dcm
    """
    if file.exists():
        raise StrongroomError(f"{file} exists already", hint="remove it, or name another file")
    with vault(config_of(given)) as client:
        item = _find(client, item_id)
        if not item["opens"]:
            raise StrongroomError(f"{item_id} does not open, so it cannot be exported")
        write(client, item, file)
    click.echo(f"exported 1 instance to {file}")


def _find(client: Client, item_id: str) -> dict[str, Any]:
    items = client.json("GET", "/v1/quarantine")["items"]
    found = next((item for item in items if item["id"] == item_id), None)
    if found is None:
        raise StrongroomError(
            f"nothing in quarantine is called {item_id}", hint="'strongroom quarantine list'", status=NOTHING
        )
    return dict(found)
