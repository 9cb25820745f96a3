"""``export``: instances as DICOM files, data sets bit for bit as they arrived."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from storage.attributes import is_uid
from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.control import Client
from storescp.errors import LOCKED, NOTHING, PARTLY, StrongroomError


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
    help="File to write, for one instance.",
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
    as_json: bool,
) -> int:
    r"""Write instances as DICOM files (Part 10), data sets bit for bit as they arrived.

    Files are written in clear, as the user that runs this command, under STUDY/SERIES/INSTANCE.dcm. What is there
    already stays, so a stopped export goes on where it was.

    \b
    Examples:
      $ strongroom export --study 1.2.840.113619.2.5 --to /mnt/transfer
      $ strongroom export --sop 1.2.840.113619.2.5.1.1 --output slice.dcm
    Exit status: 0 done, 3 some failed, 4 locked, 5 nothing matched.
    """
    chosen = {k: v for k, v in (("study", study), ("series", series), ("sop", sop)) if v is not None}
    if len(chosen) + everything != 1:
        raise click.UsageError("name exactly one of --study, --series, --sop and --all")
    if (folder is None) == (file is None):
        raise click.UsageError("name either --to FOLDER or --output FILE")
    with vault(config_of(given)) as client:
        rows = list(client.lines("POST", "/v1/search", {"level": "instance", "filters": chosen}))
        if not rows:
            click.echo("nothing matched", err=True)
            return NOTHING
        if file is not None:
            if len(rows) != 1:
                raise click.UsageError(f"--output writes one instance, and {len(rows)} match; use --to")
            if file.exists():
                raise StrongroomError(f"{file} exists already", hint="remove it, or name another file")
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
    from storescp.part10 import header

    content = client.stream("GET", f"/v1/instances/{row['pack']}/{row['object_id']}")
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as out:
            out.write(
                header(
                    sop_class=row["sop_class"],
                    sop_instance=row["sop"],
                    transfer_syntax=row["transfer_syntax"],
                    source=row["calling"],
                )
            )
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
