"""``recovery init|export|list|confirm|retire``: what rebuilds the keyring when this machine is gone."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import msgspec

from keys import encoding, recovery, shares
from keys.shares import RecoveryError
from keys.versions import store_id_of
from storescp import clock
from storescp.cli import output
from storescp.cli.backup import drill_command
from storescp.cli.session import config_of, vault
from storescp.errors import NOTHING, StrongroomError

_PAGE = """\
Strongroom recovery share {number} of {total}
store {store}
recovery key {key}, made {created}
{threshold} of the {total} shares rebuild the keyring. Keep each with another person, in another place, on paper.

{words}

{code}
"""
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group("recovery")
def recovery_command() -> None:
    """Recovery shares on paper, and exports that only they open: what rebuilds the keyring on another machine."""


recovery_command.add_command(drill_command)


@recovery_command.command("init")
@click.option("--shares", "count", default=5, show_default=True, help="How many shares.")
@click.option("--threshold", default=3, show_default=True, help="How many of them rebuild the keyring.")
@click.option("--printer", metavar="NAME", help="Print each share, words and QR code, on this printer (lp).")
@click.option("--file", type=_FILE, help="Write them into a file in memory (tmpfs) instead, to be printed from there.")
@click.pass_obj
def init(given: str | None, /, count: int, threshold: int, printer: str | None, file: Path | None) -> None:
    r"""Make a recovery key. It exists as shares only; enough of them are asked back before the store takes it.

    Do this with nobody else on the machine: the library that splits the key promises nothing about side channels.

    \b
    Examples:
      $ strongroom recovery init --shares 5 --threshold 3 --printer office
      $ strongroom recovery init --file /dev/shm/shares.txt
    """
    if (printer is None) == (file is None):
        raise click.UsageError("name either --printer NAME or --file PATH; shares are shown nowhere else")
    if file is not None and not shares.memory_backed(file):
        raise StrongroomError(
            f"{file} is not in memory (tmpfs): shares must not reach a disk",
            hint="'findmnt -t tmpfs' lists what is in memory",
        )
    if printer is not None and shutil.which("lp") is None:
        raise StrongroomError("there is no 'lp' to print with", hint="install CUPS' client, or use --file")
    config = config_of(given)
    with vault(config) as client:
        store = store_id_of(config.signing_key).hex()
        try:
            key, made = shares.new_recovery(bytes.fromhex(store), count, threshold, created=clock.now())
        except RecoveryError as error:
            raise StrongroomError(str(error)) from error
        pages = [
            _PAGE.format(
                number=number + 1,
                total=count,
                store=store,
                key=key.id,
                created=key.created,
                threshold=threshold,
                words=_in_lines(words),
                code=shares.qr_terminal(words),
            )
            for number, words in enumerate(made)
        ]
        made.clear()
        _give_out(pages, printer, file)
        click.echo(
            f"{count} shares are on paper or in the file. Type {threshold} of them back, 33 words each:", err=True
        )
        try:
            typed = [click.prompt(f"Share {n + 1}", hide_input=True, err=True) for n in range(threshold)]
            shares.check_typed_back(key, typed)
        except RecoveryError as error:
            raise StrongroomError(f"the store does not take this recovery key: {error}", hint="begin again") from error
        client.json("POST", "/v1/recovery", {"key": msgspec.to_builtins(key, builtin_types=(bytes,))})
    click.echo(f"recovery key {key.id}: {threshold} of {count} shares")
    if file is not None:
        click.echo(f"print {file}, then remove it: shred -u {file}")
    click.echo("now: strongroom recovery export --to FILE, carry the file away, strongroom recovery confirm FILE")


@recovery_command.command("export")
@click.option("--to", "file", type=_FILE, required=True, help="File to write; carry it off this machine.")
@click.pass_obj
def export(given: str | None, /, file: Path) -> None:
    r"""Write what rebuilds the keyring elsewhere, sealed to the recovery key. Needs no share.

    \b
    Example:
      $ strongroom recovery export --to /mnt/usb/strongroom.export
    """
    if file.exists():
        raise StrongroomError(f"{file} exists already", hint="name another file")
    with vault(config_of(given)) as client:
        made = client.json("POST", "/v1/recovery/export")["items"]
    for number, item in enumerate(made):
        target = file if number == 0 else file.with_name(f"{file.name}.{number}")
        encoding.create(target, base64.b64decode(item["content"]))
        click.echo(f"export {item['id']} for recovery key {item['recovery']}: {target}")


@recovery_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def list_exports(given: str | None, /, as_json: bool) -> int:
    r"""List recovery keys and the exports that were made, with the key versions that each opens.

    \b
    Example:
      $ strongroom recovery list
    """
    with vault(config_of(given)) as client:
        found = client.json("GET", "/v1/recovery")
    if as_json:
        output.document(found)
        return 0
    for key in found["keys"]:
        click.echo(f"recovery key {key['id']}: {key['threshold']} of {key['shares']} shares, made {key['created']}")
    if found["exports"]:
        columns = ["Export", "Recovery key", "Made", "Key versions", "Confirmed off host", "Retired"]
        output.table(columns, (_row(e) for e in found["exports"]))
    if not found["keys"]:
        click.echo("no recovery key: 'strongroom recovery init' makes one", err=True)
        return NOTHING
    return 0


@recovery_command.command("confirm")
@click.argument("file", type=_FILE)
@click.pass_obj
def confirm(given: str | None, /, file: Path) -> None:
    r"""Confirm that a copy of an export is off this machine: FILE is that copy, which is checked whole.

    \b
    Example:
      $ strongroom recovery confirm /mnt/safe/strongroom.export
    """
    config = config_of(given)
    try:
        header = recovery.read_header(file.read_bytes(), config.signing_key)
    except OSError as error:
        raise StrongroomError(f"{file} cannot be read: {error.strerror}") from error
    except RecoveryError as error:
        raise StrongroomError(f"{file}: {error}", hint="export again, and copy that") from error
    if os.stat(file).st_dev == os.stat(config.store_path).st_dev:
        click.echo("NOTE: this copy lies on the same file system as the store; it must survive this machine", err=True)
    with vault(config) as client:
        client.json("POST", "/v1/recovery/confirm", {"id": header.export_id})
    versions = ", ".join(str(v) for v in header.versions)
    click.echo(f"export {header.export_id} is confirmed: it opens key versions {versions}")


@recovery_command.command("retire")
@click.argument("recovery_id", metavar="ID")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def retire(given: str | None, /, recovery_id: str, yes: bool) -> None:
    r"""Say that a recovery key's shares are destroyed. Make the next one first.

    An erasure is final only when no recovery key opens the versions that it waits for.

    \b
    Example:
      $ strongroom recovery retire 5c1f…
    """
    if not yes:
        click.confirm("are all of its shares destroyed?", abort=True, err=True)
    with vault(config_of(given)) as client:
        client.json("POST", "/v1/recovery/retire", {"id": recovery_id})
    click.echo(f"recovery key {recovery_id} is retired")


@recovery_command.command("rebuild")
@click.option("--export", "file", type=_FILE, required=True, help="The recovery export.")
@click.option("--key-file", type=_FILE, required=True, help="New key file to write, which opens the new keyring.")
@click.option("--file-anchors", is_flag=True, help="Make the anchors as files, though the configuration names a token.")
@click.pass_obj
def rebuild(given: str | None, /, file: Path, key_file: Path, file_anchors: bool) -> None:
    r"""Rebuild the keyring and the anchors from an export and enough shares: on a new machine, or after a lost disk.

    The configuration and what else of the store there is (keys.db, ledger and packs in store/; peers, TLS) come from
    a backup of files. No vault may run. A keyring that is there is put aside.

    \b
    Example:
      $ strongroom recovery rebuild --export /mnt/safe/strongroom.export --key-file /root/strongroom.key
    """
    from storescp.vault import rebuild as rebuilding

    config = config_of(given)
    try:
        content = file.read_bytes()
        header = recovery.read_header(content, config.signing_key)
    except OSError as error:
        raise StrongroomError(f"{file} cannot be read: {error.strerror}") from error
    except RecoveryError as error:
        raise StrongroomError(f"{file}: {error}") from error
    click.echo(f"export {header.export_id} of {header.created}, for recovery key {header.recovery_id}", err=True)
    typed: list[str] = []
    while not typed or typed[-1]:
        typed.append(click.prompt(f"Share {len(typed) + 1} (empty when done)", default="", hide_input=True, err=True))
    versions = rebuilding.rebuild(
        config, content, [words for words in typed if words], key_file, file_anchors=file_anchors
    )
    click.echo(f"keyring and anchors are rebuilt, with key versions {', '.join(str(v) for v in versions)}")
    click.echo(f"key file: {key_file}; 'strongroom serve', then 'strongroom verify'")


def _give_out(pages: list[str], printer: str | None, file: Path | None) -> None:
    if file is not None:
        try:
            encoding.create(file, "\f".join(pages).encode())
        except OSError as error:
            raise StrongroomError(f"{file} cannot be written: {error.strerror}") from error
        return
    command = [shutil.which("lp") or "lp", "-d", str(printer), "-"]
    for page in pages:
        # On standard input: nothing of it in an argument or a file.
        done = subprocess.run(command, input=page.encode(), capture_output=True, check=False)
        if done.returncode:
            raise StrongroomError(f"printing on {printer} failed", hint="'lpstat -p' lists printers; begin again")


def _in_lines(words: str) -> str:
    found = words.split()
    return "\n".join(
        "  ".join(f"{i + 1:>2} {w:<10}" for i, w in list(enumerate(found))[n : n + 6]) for n in range(0, 33, 6)
    )


def _row(made: dict[str, Any]) -> list[Any]:
    versions = ", ".join(str(v) for v in made["versions"])
    return [made["id"], made["recovery"], made["created"], versions, made["confirmed"], made["retired"]]
