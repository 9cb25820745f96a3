"""``hold place|release|list`` and ``approve``: what nobody may erase, and acts of two people."""

from __future__ import annotations

import sys
from typing import Any

import click

from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.cli.watch import operation, shown
from storescp.errors import NOTHING


@click.group("hold")
def hold_command() -> None:
    """Holds: studies and patients that nobody may erase, whatever the rules say and whoever asks."""


@hold_command.command("place")
@click.option("--study", default="", metavar="UID", help="Hold one study, also before it arrives.")
@click.option(
    "--patient-id", default="", metavar="ID", help="Hold a patient's studies; '-' reads it from standard input."
)
@click.option("--issuer", default="", help="Issuer of the Patient ID; without one, whoever issued it.")
@click.option("--reason", required=True, help="Why; it stands in the audit chain.")
@click.option("--reference", default="", help="A case number or the like.")
@click.pass_obj
def place(given: str | None, /, study: str, patient_id: str, issuer: str, reason: str, reference: str) -> None:
    r"""Place a hold. It wins over retention, over 'erase' and over discarding from quarantine, until it is released.

    \b
    Examples:
      $ strongroom hold place --study 1.2.840.113619.2.5 --reason "court order" --reference "12 O 34/26"
      $ echo 4711 | strongroom hold place --patient-id - --reason "complaint"
    """
    if bool(study) == bool(patient_id):
        raise click.UsageError("name either --study or --patient-id")
    if patient_id == "-":
        patient_id = sys.stdin.readline().strip()
    asked = {"study": study, "patient_id": patient_id, "issuer": issuer, "reason": reason, "reference": reference}
    with vault(config_of(given)) as client:
        made = client.json("POST", "/v1/holds", asked)
    click.echo(f"hold {made['id']} is placed")


@hold_command.command("release")
@click.argument("hold_id", metavar="ID")
@click.option("--reason", required=True, help="Why; it stands in the audit chain.")
@click.pass_obj
def release(given: str | None, /, hold_id: str, reason: str) -> None:
    r"""Release a hold. With retention.second_approver another user must approve it.

    \b
    Example:
      $ strongroom hold release 3f2a9c01b2d4 --reason "case closed"
    Exit status: 0 released, 3 it waits for a second person, 4 locked, 5 no such hold.
    """
    with vault(config_of(given)) as client, shown("releasing") as show:
        for event in operation(client, "/v1/holds/release", {"id": hold_id, "reason": reason}, "the release"):
            show(event)


@hold_command.command("list")
@click.option("--released", is_flag=True, help="Those that were released, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def list_holds(given: str | None, /, released: bool, as_json: bool) -> int:
    r"""List holds: on what, why, since when and by whom.

    \b
    Example:
      $ strongroom hold list
    Exit status: 0 there are some, 4 locked, 5 none.
    """
    with vault(config_of(given)) as client:
        items = client.json("GET", "/v1/holds/all" if released else "/v1/holds")["items"]
    if as_json:
        output.document({"format": 1, "items": items})
    elif items:
        keys = ("id", "study", "patient_id", "issuer", "reason", "reference", "uid", "placed", "released")
        columns = ["Hold", "Study UID", "Patient ID", "Issuer", "Reason", "Reference", "By", "Placed", "Released"]
        output.table(columns, ([item[key] for key in keys] for item in items))
    else:
        click.echo("there is no hold", err=True)
    return 0 if items else NOTHING


@click.command("approve")
@click.argument("approval_id", metavar="ID", required=False)
@click.option("--list", "listing", is_flag=True, help="List what waits.")
@click.option("--withdraw", is_flag=True, help="Drop the request instead.")
@click.option("--json", "as_json", is_flag=True, help="With --list: one JSON document.")
@click.pass_obj
def approve_command(given: str | None, /, approval_id: str | None, listing: bool, withdraw: bool, as_json: bool) -> int:
    r"""Approve, as another user than who asked, an erasure or a release of a hold; it is done at once.

    \b
    Examples:
      $ strongroom approve --list
      $ strongroom approve 3f2a9c01
    Exit status: 0 done, 1 not possible, 4 locked, 5 nothing waits.
    """
    if (approval_id is None) != listing:
        raise click.UsageError("name a request, or give --list")
    with vault(config_of(given)) as client:
        if approval_id is None:
            return _list(client.json("GET", "/v1/approvals")["items"], as_json)
        if withdraw:
            client.json("POST", "/v1/approvals/withdraw", {"id": approval_id})
            click.echo(f"request {approval_id} is withdrawn")
            return 0
        with shown("erasing") as show:
            for event in operation(client, "/v1/approvals", {"id": approval_id}, "what was approved"):
                show(event)
    return 0


def _list(items: list[dict[str, Any]], as_json: bool) -> int:
    if as_json:
        output.document({"format": 1, "items": items})
    elif items:
        keys = ("id", "act", "subject", "reason", "uid", "asked")
        output.table(["Request", "Act", "Of", "Reason", "Asked by", "Asked"], ([i[key] for key in keys] for i in items))
    else:
        click.echo("nothing waits for an approval", err=True)
    return 0 if items else NOTHING
