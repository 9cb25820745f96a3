"""``backup``, ``restore`` and ``recovery drill``: the whole store in a folder, and back from it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from keys import encoding, shares
from storage.backup import BackupError, Folder
from storescp.cli import output
from storescp.cli.session import ask_shares, config_of, vault
from storescp.cli.setup import names_of, users_of
from storescp.cli.watch import operation, shown
from storescp.config import Config, load, locate
from storescp.errors import FINDINGS, PARTLY, StrongroomError

_FOLDER = click.Path(path_type=Path, file_okay=False)
_COUNT = click.IntRange(min=0)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group("backup", invoke_without_command=True)
@click.option("--to", "folder", type=_FOLDER, help="Folder for backups; made if it is not there.")
@click.option("--keep", type=_COUNT, default=0, metavar="N", help="Remove all but the N newest backups in the folder.")
@click.option("--without-export", default="", metavar="REASON", help="Make one though there is no recovery key.")
@click.pass_context
def backup_command(context: click.Context, /, folder: Path | None, keep: int, without_export: str) -> None:
    r"""Copy the store into a folder: keyring, keys.db, ledger, audit, a recovery export, and the packs, as they are.

    All of it stays sealed, and the anchors are not in it. The server goes on meanwhile; erasures wait. Packs that are
    there already are not copied again. What is not admitted yet is counted and not in it. Carry the folder off this
    machine, then 'strongroom backup confirm' says that you did.

    \b
    Examples:
      $ strongroom backup --to /srv/backup --keep 14
      $ strongroom backup confirm /mnt/offsite/backup
    Exit status: 0 made, 1 not made, 3 packs are missing or damaged, 4 locked.
    """
    if context.invoked_subcommand is not None:
        return
    if folder is None:
        raise click.UsageError("--to names the folder for backups")
    config = config_of(context.obj)
    folder = folder.absolute()
    _make(folder, config)
    made: dict[str, Any] = {}
    asked = {"folder": str(folder), "keep": keep, "without_export": without_export}
    with vault(config) as client, shown("copying packs") as show:
        for event in operation(client, "/v1/backups", asked, "the backup"):
            show(event)
            if event["kind"] == "made":
                made = event["manifest"]
            elif event["kind"] == "removed":
                gone = f"{output.plural(event['backups'], 'older backup')} and {output.plural(event['packs'], 'pack')}"
                click.echo(f"removed {gone}")
    packs = f"{output.plural(made['packs'], 'pack')}, {output.size(made['bytes'])}"
    click.echo(f"backup {made['id']} in {folder}: {packs}")
    if made["waiting"]:
        click.echo(f"{output.plural(made['waiting'], 'deposit')} not admitted yet: not in it")
    click.echo(f"now: carry it off this machine, then 'strongroom backup confirm {folder}' on the copy")


@backup_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def list_backups(given: str | None, /, as_json: bool) -> None:
    r"""List the backups that were made, and what is known of each.

    \b
    Example:
      $ strongroom backup list
    """
    with vault(config_of(given)) as client:
        found = client.json("GET", "/v1/backups")
    if as_json:
        output.document(found)
        return
    keys = ("id", "folder", "packs", "version", "waiting", "confirmed", "drilled")
    columns = ["Backup", "Folder", "Packs", "Key version", "Not covered", "Confirmed off host", "Drilled"]
    output.table(columns, ([made[key] for key in keys] for made in found["items"]))


@backup_command.command("confirm")
@click.argument("folder", type=_FOLDER)
@click.option("--backup", "name", default="", metavar="ID", help="Which backup; the newest one in the folder without.")
@click.pass_obj
def confirm(given: str | None, /, folder: Path, name: str) -> int:
    r"""Confirm that a copy of a backup is off this machine: FOLDER is that copy, which is checked.

    Its files are compared with the signed manifest, its packs counted and measured; 'strongroom recovery drill' opens
    them, too.

    \b
    Example:
      $ strongroom backup confirm /mnt/offsite/backup
    Exit status: 0 confirmed, 1 no backup, 6 it is damaged.
    """
    config = config_of(given)
    found = Folder(folder)
    try:
        generation = found.generation(name)
        manifest = found.read(generation, config.signing_key)
        problems = list(found.check(generation, manifest))
    except BackupError as error:
        raise StrongroomError(str(error), hint="name the copy of the folder that 'backup --to' wrote") from error
    if problems:
        for problem in problems:
            click.echo(problem)
        click.echo(f"backup {manifest.id} is not confirmed: {output.plural(len(problems), 'finding')}", err=True)
        return FINDINGS
    if os.stat(folder).st_dev == os.stat(config.store_path).st_dev:
        click.echo("NOTE: this copy lies on the same file system as the store; it must survive this machine", err=True)
    with vault(config) as client:
        client.json("POST", "/v1/backups/confirm", {"id": manifest.id})
    click.echo(f"backup {manifest.id} is confirmed: {output.plural(manifest.packs, 'pack')}, made {manifest.created}")
    return 0


@click.command("restore")
@click.option("--from", "folder", type=_FOLDER, required=True, help="The backup folder, or a copy of it.")
@click.option("--backup", "name", default="", metavar="ID", help="Which backup; the newest one without.")
@click.option("--key-file", type=_FILE, required=True, help="New key file to write, which opens the restored store.")
@click.option("--incomplete", is_flag=True, help="Restore what is there, though files or packs are missing.")
@click.option("--vault-user", help="The vault's user, where gate and vault are two; needs root.")
@click.option("--gate-user", help="The gate's user, where gate and vault are two; needs root.")
@click.option("--server-name", multiple=True, help="Name or address in the server certificate; may be repeated.")
@click.pass_obj
def restore_command(
    given: str | None,
    /,
    folder: Path,
    name: str,
    key_file: Path,
    incomplete: bool,
    vault_user: str | None,
    gate_user: str | None,
    server_name: tuple[str, ...],
) -> int:
    r"""Make a store from a backup and enough recovery shares, on a machine that has nothing else.

    The configuration file that --config names is used if it is there (its store must not be), else it is made, with
    the store beside it. A store with an authority of its own issues a new server certificate. What was erased after the
    backup was made is back: erase it again.

    \b
    Example:
      $ strongroom --config /srv/new/strongroom.toml restore --from /mnt/offsite/backup --key-file /root/strongroom.key
    Exit status: 0 restored, 1 not restored, 3 restored without what is missing.
    """
    from storescp.vault.restore import Machine, Source, find, restore

    file = Path(given or "strongroom.toml").absolute()
    names = server_name or tuple(names_of(("127.0.0.1:0",)))
    machine = Machine(file, key_file.absolute(), users_of(vault_user, gate_user), names)
    found, generation, exports = find(folder, name)
    click.echo(f"backup {generation.name}", err=True)
    typed = ask_shares()
    source = Source(found, generation, exports, typed)
    end: dict[str, Any] = {}
    with shown("copying packs") as show:
        for event in restore(source, machine, typed, incomplete=incomplete):
            show(event)
            end = event
    counts = end["counts"]
    held = f"{output.plural(counts['instances'], 'instance')} of {output.plural(counts['studies'], 'study', 'studies')}"
    click.echo(f"restored {held}: {file}")
    for problem in end["problems"]:
        click.echo(f"missing: {problem}", err=True)
    click.echo(f"key file: {key_file}; whoever has it and the disks can read the store")
    config = load(file)
    if not config.certificate.exists():
        click.echo(f"put the server's certificate at {config.certificate} and its key at {config.private_key}")
    click.echo("studies that were erased since that backup are back: erase them again (docs/backup.md)")
    click.echo(f"rules, schedule, alerts and the desk are a new store's: set them in {file}")
    click.echo("then 'strongroom verify', and 'strongroom serve'")
    return PARTLY if end["problems"] else 0


@click.command("drill")
@click.option("--from", "folder", type=_FOLDER, required=True, help="The backup folder, or a copy of it.")
@click.option("--backup", "name", default="", metavar="ID", help="Which backup; the newest one without.")
@click.option(
    "--sample", type=_COUNT, default=100, show_default=True, metavar="N", help="Open so many packs; 0 opens all."
)
@click.option("--scratch", type=_FOLDER, default=Path("/dev/shm"), show_default=True, help="Folder in memory to use.")  # noqa: S108
@click.option("--statement", type=_FILE, help="Write the signed statement to a file.")
@click.pass_obj
def drill_command(
    given: str | None, /, folder: Path, name: str, sample: int, scratch: Path, statement: Path | None
) -> int:
    r"""Try a recovery: rebuild the keyring from shares in memory, open a sample of the backup, sign what was seen.

    Works on a machine that has only the backup and the shares. Where the store's vault runs, it keeps the statement.

    \b
    Example:
      $ strongroom recovery drill --from /mnt/offsite/backup
    Exit status: 0 it would restore, 1 it would not, 6 findings.
    """
    from storescp.vault.drill import drill
    from storescp.vault.restore import Source, find

    if not shares.memory_backed(scratch / "x"):
        raise StrongroomError(
            f"{scratch} is not in memory (tmpfs): what opens the store must not reach a disk",
            hint="'findmnt -t tmpfs' lists what is in memory",
        )
    found, generation, exports = find(folder, name)
    click.echo(f"backup {generation.name}", err=True)
    typed = ask_shares()
    source = Source(found, generation, exports, typed)
    end: dict[str, Any] = {}
    # A terminal that was closed must not leave keys behind in memory.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    place = Path(tempfile.mkdtemp(prefix="strongroom-drill-", dir=scratch))
    try:
        with shown("opening packs") as show:
            for event in drill(source, typed, place, sample):
                show(event)
                end = event
    finally:
        shutil.rmtree(place)
    said, content = end["said"], end["statement"]
    opened = f"{output.plural(said['opened_instances'], 'instance')} in {output.plural(said['opened_packs'], 'pack')}"
    click.echo(f"opened {opened} of {said['packs']}; audit chain: {output.plural(said['audit_records'], 'record')}")
    for problem in said["problems"]:
        click.echo(f"finding: {problem}")
    if statement is not None:
        encoding.create(statement, content, mode=0o644)
        click.echo(f"signed statement: {statement}")
    click.echo(_keep(given, content))
    return FINDINGS if said["problems"] else 0


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _keep(given: str | None, content: bytes) -> str:
    """Give a statement to the vault, where there is one; say what became of it."""
    try:
        config = load(locate(given))
        with vault(config) as client:
            client.json("POST", "/v1/drills", {"statement": content})
    except StrongroomError as error:
        return f"not recorded in the store: {error}"
    return "recorded in the store's audit chain"


def _make(folder: Path, config: Config) -> None:
    """Make the folder for backups, the vault's own; whoever cannot leaves that to the vault."""
    if folder.exists() or os.geteuid() != 0:
        return
    try:
        folder.mkdir(mode=0o700, parents=True)
        owner = config.store_path.stat().st_uid
        os.chown(folder, owner, pwd.getpwuid(owner).pw_gid, follow_symlinks=False)
    except OSError as error:
        raise StrongroomError(f"{folder} cannot be made: {error.strerror}") from error
