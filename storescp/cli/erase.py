"""``erase`` and ``certificate list|show|verify``: a study gone, and the proof."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import click

from keys import signed
from keys.signed import SignedError
from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.cli.watch import operation, shown
from storescp.errors import FAILED, FINDINGS, NOTHING, StrongroomError

_LABEL = "certificate"


@click.command("erase")
@click.option("--study", required=True, metavar="UID", help="The study.")
@click.option("--reason", required=True, help="Why; it stands in the audit chain.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def erase_command(given: str | None, /, study: str, reason: str, yes: bool) -> None:
    r"""Erase a study for ever: its keys, its packs, its rows. A certificate stays.

    What arrives for the study afterwards is a new study. The certificate is pending until the key versions that could
    have wrapped the study's keys are destroyed: 'strongroom keys rotate' after the erasure, and its time, do that.
    An erasure that was interrupted goes on by itself, or with the same command.

    \b
    Example:
      $ strongroom erase --study 1.2.840.113619.2.5 --reason "request of the patient, 4711"
    Exit status: 0 erased, 1 it waits for a gate, 4 locked, 5 no such study.
    """
    if not reason.strip():
        raise click.BadParameter("say why", param_hint="'--reason'")
    with vault(config_of(given)) as client:
        if not yes:
            rows = list(client.lines("POST", "/v1/search", {"level": "study", "filters": {"study": study}}))
            held = ", ".join(f"{row['instance_count']} instances" for row in rows) or "nothing that can be listed"
            click.confirm(f"erase study {study} ({held}) for ever?", abort=True, err=True)
        with shown("erasing") as show:
            for event in operation(client, "/v1/erase", {"study": study, "reason": reason}, "the erasure"):
                show(event)


@click.group("certificate")
def certificate_command() -> None:
    """Certificates of erasure: which there are, what they say, whether they hold."""


@certificate_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def list_certificates(given: str | None, /, as_json: bool) -> int:
    r"""List erasures, how far each is, and what a pending one waits for.

    \b
    Example:
      $ strongroom certificate list
    """
    with vault(config_of(given)) as client:
        items = client.json("GET", "/v1/erasures")["items"]
    if as_json:
        output.document({"format": 1, "items": items})
    elif items:
        output.table(
            ["Id", "State", "Begun", "Erased", "Instances", "Waits for the end of versions"],
            ([e["id"], _state(e), e["begun"], e["erased"], e["instances"], _versions(e)] for e in items),
        )
    if not items:
        click.echo("nothing was erased", err=True)
        return NOTHING
    return 0


@certificate_command.command("show")
@click.argument("certificate_id", metavar="ID")
@click.pass_obj
def show(given: str | None, /, certificate_id: str) -> None:
    r"""Print a certificate, signed, as it can be given away.

    \b
    Example:
      $ strongroom certificate show 3f9a1c22b0d46677 > certificate.json
    """
    path = config_of(given).store_path / "certificates" / f"{Path(certificate_id).name}.json"
    try:
        click.echo(path.read_bytes().decode("ascii", "replace"), nl=False)
    except OSError as error:
        raise StrongroomError(
            f"there is no certificate {certificate_id}: {error.strerror}",
            hint="'strongroom certificate list'",
            status=NOTHING,
        ) from error


@certificate_command.command("verify")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--key", metavar="KEY", help="The store's public signing key, 'ed25519:…'; else the configuration's.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def verify(given: str | None, /, file: Path, key: str | None, as_json: bool) -> int:
    r"""Check a certificate with the store's public key alone, anywhere, and say what it certifies.

    \b
    Example:
      $ strongroom certificate verify certificate.json --key ed25519:Zm9v…
    Exit status: 0 it holds, 6 it does not.
    """
    try:
        document = signed.read(_LABEL, file.read_bytes(), _key(key) if key else config_of(given).signing_key)
    except OSError as error:
        raise StrongroomError(f"{file} cannot be read: {error.strerror}", status=FAILED) from error
    except SignedError as error:
        click.echo(f"{file}: {error}", err=True)
        return FINDINGS
    if as_json:
        output.document(document)
        return 0
    click.echo(f"signed by store {document['store_id']} at {document['signed']}")
    amount = f"{document['instances']} instances in {len(document['packs'])} packs"
    click.echo(f"erasure {document['id']}: {amount}, erased {document['erased']}")
    for one in document["versions"]:
        when = f"destroyed {one['destroyed']}" if one["destroyed"] else "not destroyed yet"
        click.echo(f"key version {one['version']}: {when}; {one['anchor']} anchor, NIST SP 800-88: {one['grade']}")
    click.echo("not covered: " + "; ".join(document["not_covered"]))
    click.echo("FINAL" if document["state"] == "final" else "PENDING: copies of keys in backups still open it")
    return 0


def _key(text: str) -> bytes:
    try:
        key = base64.b64decode(text.removeprefix("ed25519:"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise click.BadParameter(
            "the key is 'ed25519:' and 32 bytes in base64, as store.signing_key in the configuration"
        )
    return key


def _state(erasure: dict[str, Any]) -> str:
    return "final" if erasure["final"] else "pending" if erasure["erased"] else "under way"


def _versions(erasure: dict[str, Any]) -> str:
    # Version 0 stands for a key that another study goes on using.
    names = (str(version) if version else "a key that is shared" for version in erasure["versions"])
    return "" if erasure["final"] else ", ".join(names)
