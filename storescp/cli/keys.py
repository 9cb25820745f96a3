"""``keys status|rotate|…`` and ``keys slot …``: key versions over their life, and the ways to unlock."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from keys import encoding, slots
from storescp.cli import output
from storescp.cli.compromise import compromise_command
from storescp.cli.keyreport import report_command
from storescp.cli.reencrypt import reencrypt_command
from storescp.cli.session import ask_hidden, ask_secret, config_of, secret_document, vault
from storescp.errors import StrongroomError

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group("keys")
def keys_command() -> None:
    """Key versions: which there are, and a new one. Slots: the ways to unlock. What answers which leak."""


for _verb in (reencrypt_command, compromise_command, report_command):
    keys_command.add_command(_verb)


@keys_command.command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def status(given: str | None, /, as_json: bool) -> None:
    r"""Say which key versions and slots there are, what names each, and what a rotation still waits for.

    \b
    Example:
      $ strongroom keys status
    Exit status: 0 said, 4 locked.
    """
    with vault(config_of(given)) as client:
        found = client.json("GET", "/v1/keys")
    if as_json:
        output.document(found)
        return
    output.table(
        ["Version", "State", "Created", "Anchor", "NIST SP 800-88", "Study keys"],
        ([v[k] for k in ("version", "state", "created", "anchor", "grade", "study_keys")] for v in found["versions"]),
    )
    for version in found["versions"]:
        if version["former_anchors"]:
            former = ", ".join(f"{a['id']} ({a['anchor']})" for a in version["former_anchors"])
            click.echo(f"version {version['version']} had other anchors before the store was rebuilt: {former}")
    for rotation in found["rotations"]:
        if not rotation["proof"]:
            click.echo(
                f"rotation to version {rotation['version']} is under way: 'strongroom keys rotate' goes on with it"
            )
        elif rotation["waits_for"]:
            click.echo(f"the anchor of version {rotation['old']} stays until {rotation['waits_for']}")
        elif rotation["destroyed"]:
            click.echo(f"version {rotation['old']} was destroyed at {rotation['destroyed']}")
    for one in found["reencryptions"]:
        packs = f"{one['done']} of {output.plural(one['packs'], 'pack')}"
        known = f"re-encryption {one['id']}, begun {one['begun']}: {packs}"
        left = f", {len(one['left'])} left as they were" if one["left"] else ""
        more = "" if one["ended"] else "; 'strongroom keys reencrypt' goes on with it"
        click.echo(f"{known} under a new study key{left}{more}")


@keys_command.command("rotate")
@click.option("--reason", default="", help="Why; it stands in the audit chain. Not needed to go on with a rotation.")
@click.option("--without-export", metavar="REASON", help="Do not wait for a confirmed recovery export.")
@click.option("--without-backup", metavar="REASON", help="Do not wait for a confirmed backup.")
@click.pass_obj
def rotate(given: str | None, /, reason: str, without_export: str | None, without_backup: str | None) -> None:
    r"""Wrap every study key under a new key version.

    Answers: a quarterly duty, an old backup that leaked. Does not answer: a leaked study key, or a leaked passphrase.
    No object is rewritten and the server keeps receiving. Stop it at any time: a second run goes on where this one
    stopped. The old version's anchor is destroyed keys.destroy_after_days after the proof, when an export and a backup
    with the new version are confirmed or waived; from then on nothing that was only under the old version ever opens.

    \b
    Examples:
      $ strongroom keys rotate --reason "quarterly"
      $ strongroom keys rotate --without-export "none made yet" --without-backup "snapshot of 2 May"
    Exit status: 0 done or waiting for its time, 1 stopped in the middle, 4 locked.
    """
    waived = {kind: why for kind, why in (("export", without_export), ("backup", without_backup)) if why}
    console = Console(stderr=True)
    columns = (TextColumn("rewrapping"), BarColumn(), MofNCompleteColumn())
    ended = False
    with (
        vault(config_of(given)) as client,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("rewrapping", total=None)
        for event in client.lines("POST", "/v1/keys/rotate", {"reason": reason, "waived": waived}):
            ended = _told(event, progress, task) or ended
    if not ended:
        raise StrongroomError("the rotation broke off", hint="'strongroom keys rotate' goes on where it stopped")


@keys_command.group("slot")
def slot_command() -> None:
    """Slots: the ways to unlock. Each opens the same keyring; the last one cannot be removed."""


def _secret_options(command: Any) -> Any:
    for option in (
        click.option("--token", metavar="MODULE:TOKEN", help="A PKCS#11 token; asks for its PIN."),
        click.option("--credential", metavar="NAME", help="A systemd credential of the vault's unit."),
        click.option("--key-file", type=_FILE, help="A key file; 'add' writes a new one."),
        click.option("--passphrase-file", type=_FILE, help="Read the passphrase from a file; else it is asked for."),
    ):
        command = option(command)
    return command


@slot_command.command("add")
@click.option("--label", default="", help="What to call it.")
@_secret_options
@click.pass_obj
def slot_add(
    given: str | None,
    /,
    label: str,
    passphrase_file: Path | None,
    key_file: Path | None,
    credential: str | None,
    token: str | None,
) -> None:
    r"""Add a way to unlock; it is opened once before it counts.

    \b
    Examples:
      $ strongroom keys slot add --label "second admin"
      $ strongroom keys slot add --key-file /media/usb/strongroom.key
      $ strongroom keys slot add --token /usr/lib/softhsm/libsofthsm2.so:strongroom
    """
    if key_file is not None:
        if key_file.exists():
            raise StrongroomError(f"{key_file} exists already", hint="name another file: 'add' writes a new one")
        encoding.create(key_file, slots.new_key_file())
    secret = _secret(passphrase_file, key_file, credential, token, confirm=True)
    with vault(config_of(given)) as client:
        made = client.json("POST", "/v1/slots", {"secret": secret, "label": label})
    click.echo(f"slot {made['id']} ({made['type']}) added")


@slot_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def slot_list(given: str | None, /, as_json: bool) -> None:
    r"""List the slots.

    \b
    Example:
      $ strongroom keys slot list
    """
    with vault(config_of(given), unlocked=False) as client:
        found = client.json("GET", "/v1/status")["slots"]
    if as_json:
        output.document({"format": 1, "items": found})
        return
    output.table(
        ["Id", "Type", "Label", "Created"], ([s[k] for k in ("id", "type", "label", "created")] for s in found)
    )


@slot_command.command("remove")
@click.argument("slot_id", metavar="ID")
@click.pass_obj
def slot_remove(given: str | None, /, slot_id: str) -> None:
    r"""Remove a way to unlock. Older copies of the keyring still open with it: 'reroot' answers a secret that leaked.

    \b
    Example:
      $ strongroom keys slot remove 0f3c…
    """
    with vault(config_of(given)) as client:
        removed = client.json("POST", "/v1/slots/remove", {"id": slot_id})
    click.echo(f"slot {removed['id']} ({removed['type']}) removed")


@slot_command.command("test")
@_secret_options
@click.pass_obj
def slot_test(
    given: str | None,
    /,
    passphrase_file: Path | None,
    key_file: Path | None,
    credential: str | None,
    token: str | None,
) -> None:
    r"""Say which slot a secret opens.

    \b
    Example:
      $ strongroom keys slot test --key-file /media/usb/strongroom.key
    """
    secret = _secret(passphrase_file, key_file, credential, token)
    with vault(config_of(given)) as client:
        found = client.json("POST", "/v1/slots/test", secret)
    click.echo(f"it opens slot {found['id']} ({found['type']}) {found['label']}".rstrip())


@slot_command.command("reroot")
@click.option("--passphrase", "passphrases", default=0, help="How many passphrases to ask for.")
@click.option("--passphrase-file", "passphrase_files", type=_FILE, multiple=True, help="Read one from a file.")
@click.option("--key-file", "key_files", type=_FILE, multiple=True, help="A key file of a slot that stays.")
@click.option("--credential", "credentials", multiple=True, metavar="NAME", help="A credential of a slot that stays.")
@click.option("--token", "tokens", multiple=True, metavar="MODULE:TOKEN", help="The token of a slot that stays.")
@click.option("--remove", multiple=True, metavar="ID", help="A slot that goes instead.")
@click.pass_obj
def slot_reroot(
    given: str | None,
    /,
    passphrases: int,
    passphrase_files: tuple[Path, ...],
    key_files: tuple[Path, ...],
    credentials: tuple[str, ...],
    tokens: tuple[str, ...],
    remove: tuple[str, ...],
) -> None:
    r"""Put a new root key under all slots: what a leaked passphrase or key file opened, it opens no more.

    Answers: a leaked slot secret together with a copy of the keyring, from now on. Does not answer: what was read with
    it before, and key versions that were in the keyring then (rotate). Needs the secret of every slot that stays.

    \b
    Example:
      $ strongroom keys slot reroot --key-file /root/strongroom.key --passphrase 1 --remove 0f3c…
    """
    asked = [_secret(file, None, None, None) for file in passphrase_files]
    asked += [_secret(None, None, None, None) for _ in range(passphrases)]
    asked += [_secret(None, file, None, None) for file in key_files]
    asked += [_secret(None, None, name, None) for name in credentials]
    asked += [_secret(None, None, None, token) for token in tokens]
    with vault(config_of(given)) as client:
        left = client.json("POST", "/v1/slots/reroot", {"secrets": asked, "remove": list(remove)})["slots"]
    click.echo(f"a new root key is under {output.plural(len(left), 'slot')}")


def _secret(
    passphrase_file: Path | None,
    key_file: Path | None,
    credential: str | None,
    token: str | None,
    *,
    confirm: bool = False,
) -> dict[str, Any]:
    """Return a secret as the vault takes it, asking for what is not in a file."""
    if sum(1 for way in (passphrase_file, key_file, credential, token) if way is not None) > 1:
        raise click.UsageError("name one of --passphrase-file, --key-file, --credential and --token")
    if credential is not None:
        return secret_document(slots.Credential(credential))
    if token is not None:
        module, _, label = token.rpartition(":")
        if not module:
            raise click.UsageError("a token is MODULE:TOKEN, the module's path and the token's label")
        pin = ask_hidden("PIN")
        if not pin:
            raise StrongroomError("no PIN was given", hint="type it on a terminal, or pipe it in")
        return secret_document(slots.Token(pin, slots.TokenPlace(module, label)))
    if passphrase_file is None and key_file is None:
        if not sys.stdin.isatty():
            # A prompt would take what is piped, and say on the way that it may be shown.
            raise StrongroomError(
                "there is no terminal to ask for a passphrase on",
                hint="--passphrase-file FILE reads its first line; --key-file FILE takes a key file",
            )
        text = click.prompt("Passphrase", hide_input=True, err=True, confirmation_prompt=confirm)
        return secret_document(slots.Passphrase(text))
    return secret_document(ask_secret(key_file, passphrase_file))


def _told(event: dict[str, Any], progress: Progress, task: Any) -> bool:
    match event["kind"]:
        case "progress":
            progress.update(task, completed=event["done"], total=event["total"])
        case "error":
            raise StrongroomError(event["message"], hint=event["hint"], status=event["status"])
        case "waiting":
            click.echo(event["text"], err=True)
        case "end":
            return True
        case _:
            click.echo(event["text"])
            sys.stdout.flush()
    return False
