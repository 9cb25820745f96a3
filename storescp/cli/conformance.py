"""``conformance``: the DICOM conformance statement of this configuration."""

from __future__ import annotations

from pathlib import Path

import click

from storescp.cli.session import config_of
from storescp.errors import StrongroomError


@click.command("conformance")
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False), help="Write it to a file, and replace that one.")
@click.pass_obj
def conformance_command(given: str | None, /, to: Path | None) -> None:
    r"""Write the DICOM conformance statement (PS3.2 Annex N) of this configuration and its peers, as Markdown.

    Classes, transfer syntaxes, statuses and TLS are those that the gate's own code has. It names no peer, needs no
    running server, and is only as true as the configuration that the server was started with.

    \b
    Example:
      $ strongroom conformance --to conformance.md
    Exit status: 0 written, 1 a peer file is malformed or the file cannot be written, 2 configuration.
    """
    from storescp import conformance, peers
    from storescp.peers import PeerError

    config = config_of(given)
    try:
        text = conformance.statement(config, peers.read_all(config.peers))
    except PeerError as error:
        raise StrongroomError(str(error)) from error
    if to is None:
        click.echo(text, nl=False)
        return
    try:
        to.write_text(text, "utf-8")
    except OSError as error:
        raise StrongroomError(f"{to} cannot be written: {error.strerror}") from error
    click.echo(f"written: {to}")
