"""``export``: instances as DICOM files, data sets bit for bit as they arrived; or a study sealed for a mail."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from keys import encoding
from storage.attributes import is_uid
from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.control import Client
from storescp.errors import LOCKED, NOTHING, PARTLY, StrongroomError

_PASSPHRASE_LIMIT = 4096
_FILE = click.Path(path_type=Path, dir_okay=False)


class _Mail(msgspec.Struct, frozen=True):
    """A message to make, as the options say it."""

    study: str
    recipients: tuple[Path, ...]
    sign: Path
    signer_key: Path | None
    passphrase_file: Path | None
    most: int
    file: Path


@click.command("export")
@click.option("--study", metavar="UID", help="Export a study.")
@click.option("--series", metavar="UID", help="Export a series.")
@click.option("--sop", metavar="UID", help="Export one instance.")
@click.option("--all", "everything", is_flag=True, help="Export everything that is held.")
@click.option("--to", "folder", type=click.Path(path_type=Path, file_okay=False), help="Folder to write into.")
@click.option(
    "--output",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write, for one instance or a message.",
)
@click.option(
    "--cms",
    "recipients",
    metavar="RECIPIENT.pem",
    multiple=True,
    type=_FILE,
    help="Seal a study as a mail message for who has this certificate; may be repeated.",
)
@click.option("--sign", metavar="SIGNER.pem", type=_FILE, help="The certificate that the message is signed with.")
@click.option("--signer-key", metavar="KEY.pem", type=_FILE, help="Its private key, where SIGNER.pem does not hold it.")
@click.option("--signer-passphrase-file", type=_FILE, help="Read that key's passphrase from a file; else it is asked.")
@click.option(
    "--most-mb",
    type=click.IntRange(1, 200),
    default=25,
    show_default=True,
    help="The largest message, in MB: mail servers refuse larger ones.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document about what was written.")
@click.pass_obj
def export_command(
    given: str | None,
    /,
    study: str | None,
    series: str | None,
    sop: str | None,
    everything: bool,
    folder: Path | None,
    file: Path | None,
    recipients: tuple[Path, ...],
    sign: Path | None,
    signer_key: Path | None,
    signer_passphrase_file: Path | None,
    most_mb: int,
    as_json: bool,
) -> int:
    r"""Write instances as DICOM files (Part 10), data sets bit for bit as they arrived.

    Files are written in clear, as the user that runs this command, under STUDY/SERIES/INSTANCE.dcm. What is there
    already stays, so a stopped export goes on where it was.

    With --cms and --sign a study becomes one mail message (S/MIME), signed and sealed for the recipients, that a mail
    program with their key opens. It is written whole or not at all, never over another file; nothing is sent, and
    nothing is written in clear (docs/email-export.md).

    \b
    Examples:
      $ strongroom export --study 1.2.840.113619.2.5 --to /mnt/transfer
      $ strongroom export --sop 1.2.840.113619.2.5.1.1 --output slice.dcm
      $ strongroom export --study 1.2.840.113619.2.5 --cms dr-lee.pem --sign radiology.pem \
          --signer-key radiology.key --output study.eml
    Exit status: 0 done, 3 some failed, 4 locked, 5 nothing matched.
    """
    if recipients or sign or signer_key or signer_passphrase_file:
        if not recipients or sign is None:
            raise click.UsageError("a message needs both --cms RECIPIENT.pem and --sign SIGNER.pem")
        if study is None or series or sop or everything or folder or file is None:
            raise click.UsageError("a message holds one study: name --study UID and --output FILE, and nothing else")
        mail = _Mail(study, recipients, sign, signer_key, signer_passphrase_file, most_mb * 1_000_000, file)
        return _seal(given, mail, as_json)
    chosen = {k: v for k, v in (("study", study), ("series", series), ("sop", sop)) if v is not None}
    if len(chosen) + everything != 1:
        raise click.UsageError("name exactly one of --study, --series, --sop and --all")
    if (folder is None) == (file is None):
        raise click.UsageError("name either --to FOLDER or --output FILE")
    _check_uids(chosen)
    # What is written is in the clear: nobody else's to read.
    os.umask(0o077)
    with vault(config_of(given)) as client:
        rows = list(client.lines("POST", "/v1/search", {"level": "instance", "filters": chosen}))
        if not rows:
            click.echo("nothing matched", err=True)
            return NOTHING
        if file is not None:
            if len(rows) != 1:
                raise click.UsageError(f"--output writes one instance, and {len(rows)} match; use --to")
            _check_free(file)
            write(client, rows[0], file)
            written, present, failed = 1, 0, 0
        else:
            written, present, failed = _write_all(client, rows, folder or Path())
    if as_json:
        output.document({"format": 1, "written": written, "already_there": present, "failed": failed})
    else:
        more = f", {present} were already there" if present else ""
        click.echo(f"exported {output.plural(written, 'instance')}{more}{f', {failed} FAILED' if failed else ''}")
    return PARTLY if failed else 0


def _check_uids(chosen: dict[str, str]) -> None:
    for option, uid in chosen.items():
        if not is_uid(uid):
            raise click.BadParameter(f"'{uid}' is no UID; --all exports everything", param_hint=f"--{option}")


def _write_all(client: Client, rows: list[dict[str, Any]], folder: Path) -> tuple[int, int, int]:
    written = present = failed = 0
    for row in _progress(rows):
        target = folder / _name(row["study"]) / _name(row["series"]) / f"{_name(row['sop'])}.dcm"
        if target.exists():
            present += 1
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(client, row, target)
            written += 1
        except StrongroomError as error:
            if error.status == LOCKED:
                raise
            failed += 1
            click.echo(f"strongroom: error: instance {row['sop']}: {error}", err=True)
    return written, present, failed


def write(client: Client, row: dict[str, Any], target: Path) -> None:
    """Write one instance as a DICOM file, whole or not at all.

    Raises:
        StrongroomError: It does not open, or the file cannot be written.
    """
    content = _pieces(client, row)
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as out:
            for piece in content:
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        os.rename(part, target)
    except OSError as error:
        raise StrongroomError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def _pieces(client: Client, row: dict[str, Any]) -> Iterator[bytes]:
    """Yield an instance as a DICOM file."""
    from storescp.part10 import header

    yield header(
        sop_class=row["sop_class"],
        sop_instance=row["sop"],
        transfer_syntax=row["transfer_syntax"],
        source=row["calling"],
    )
    yield from client.stream("GET", f"/v1/instances/{row['pack']}/{row['object_id']}")


def _seal(given: str | None, mail: _Mail, as_json: bool) -> int:
    """Write a study as a message."""
    from storescp import cms, mailkeys
    from storescp.harden import harden

    if not is_uid(mail.study):
        raise click.UsageError("--study takes one whole UID here, no pattern")
    if len(mail.recipients) > cms.MOST_RECIPIENTS:
        raise click.UsageError(f"a message has at most {cms.MOST_RECIPIENTS} recipients")
    _check_free(mail.file)
    # Plaintext and a private key come into this process: neither may leave it for a disk.
    harden(0o077)
    now = datetime.now(UTC)
    # One that is named twice is one.
    found = {holder.fingerprint: holder for holder in (mailkeys.read_recipient(path, now) for path in mail.recipients)}
    holders = tuple(found.values())
    signer = mailkeys.read_signer(mail.sign, mail.signer_key, now, lambda: _passphrase(mail.passphrase_file))
    with vault(config_of(given)) as client:
        rows = list(client.lines("POST", "/v1/search", {"level": "instance", "filters": {"study": mail.study}}))
        if not rows:
            click.echo("nothing matched", err=True)
            return NOTHING
        whom = {"to": list(found), "signer": signer.holder.fingerprint}
        client.json("POST", "/v1/export-begun", {"study": mail.study, **whom})
        attachment = cms.Attachment(mail.most)
        for row in _progress(rows):
            attachment.add(_pieces(client, row))
    content = cms.message(attachment.close(), attachment.files, holders, signer, datetime.now(UTC), most=mail.most)
    _place(content, mail.file)
    if as_json:
        made = {"bytes": len(content), **whom}
        output.document({"format": 1, "written": len(rows), "already_there": 0, "failed": 0, "message": made})
        return 0
    click.echo(f"wrote {mail.file}: {output.plural(len(rows), 'instance')} in {len(content) / 1e6:.1f} MB")
    for role, holder in (("signed by", signer.holder), *(("for", holder) for holder in holders)):
        click.echo(f"  {role} {holder.address or 'nobody with an address'}, certificate {holder.fingerprint}")
    return 0


def _passphrase(file: Path | None) -> str:
    if file is None:
        if not sys.stdin.isatty():
            raise StrongroomError(
                "the signer's key is encrypted, and there is no terminal to ask for its passphrase",
                hint="--signer-passphrase-file names a file with it",
            )
        return str(click.prompt("Passphrase of the signer's key", hide_input=True, err=True))
    try:
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_mode & 0o077:
                raise StrongroomError(f"the passphrase file {file} is open to others; 'chmod 600 {file}'")
            return opened.read(_PASSPHRASE_LIMIT).decode("utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is no text"
        raise StrongroomError(f"the passphrase file {file} cannot be read: {said}") from error


def _check_free(file: Path) -> None:
    if os.path.lexists(file):
        raise StrongroomError(f"{file} exists already", hint="remove it, or name another file")
    if not file.parent.is_dir():
        raise StrongroomError(f"there is no folder {file.parent} to write {file.name} into", hint="make it first")


def _place(content: bytes, target: Path) -> None:
    """Write a new file that appears whole or not at all, durably, and open to nobody else."""
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        encoding.create(part, content)
        # Unlike a rename this replaces nothing.
        os.link(part, target)
        encoding.sync_folder(target.parent)
    except FileExistsError as error:
        raise StrongroomError(f"{target} exists already", hint="remove it, or name another file") from error
    except OSError as error:
        plain = error.errno in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
        hint = "this file system has no modes or no links, as many USB sticks: write it elsewhere and copy it there"
        raise StrongroomError(f"{target} cannot be written: {error.strerror}", hint=hint if plain else "") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def _progress(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    console = Console(stderr=True)
    columns = (TextColumn("exporting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(rows)


def _name(uid: str) -> str:
    # The vault checks this too; a path is made of nothing that was not checked right here.
    if not is_uid(uid):
        raise StrongroomError("a UID in the index is malformed")
    return uid
