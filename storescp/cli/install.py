"""``install``: services of systemd for a store of two users."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import msgspec

from storescp.cli.setup import _new_passphrase, names_of
from storescp.config import is_ae_title, parse_address


@click.command("install")
@click.option("--dry-run", is_flag=True, help="Print the steps and change nothing.")
@click.option("--remove", is_flag=True, help="Take the services away; store, anchors, spool, keys, settings stay.")
@click.option(
    "--root", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Into a scratch root: an image's."
)
@click.option("--config-dir", default="/etc/strongroom", show_default=True, help="The configuration's folder.")
@click.option("--program", help="The strongroom command that units start; else this one's.")
@click.option(
    "--unlock",
    type=click.Choice(["credential", "passphrase"]),
    default="credential",
    show_default=True,
    help="How a new store's vault unlocks: by itself, or by 'strongroom unlock'.",
)
@click.option("--passphrase-file", type=click.Path(path_type=Path), help="A passphrase for a slot of the new store.")
@click.option("--listen", default=["127.0.0.1:2762"], multiple=True, help="A new store's address; may be repeated.")
@click.option("--ae-title", default="STRONGROOM", show_default=True, help="A new store's own AE title.")
@click.option("--with-pki", is_flag=True, help="A new store gets an authority of its own and a server certificate.")
@click.option("--server-name", multiple=True, help="Name or address in that certificate; may be repeated.")
@click.pass_obj
def install_command(
    given: str | None,
    /,
    dry_run: bool,
    remove: bool,
    root: Path | None,
    config_dir: str,
    program: str | None,
    unlock: str,
    passphrase_file: Path | None,
    listen: tuple[str, ...],
    ae_title: str,
    with_pki: bool,
    server_name: tuple[str, ...],
) -> None:
    r"""Install gate and vault as services of systemd: users, folders, units, and a store where there is none.

    Each step is printed. What is there already stays: run it again to mend, after a change of gate.listen, and after
    an upgrade of the program. A file that somebody changed is never overwritten; the new one is put beside it. Nothing
    is started or stopped, but for --remove. With --unlock credential the vault's key is a credential that systemd
    encrypts for this machine: add a second slot, for the day on which the machine is gone.

    \b
    Examples:
      $ strongroom install --dry-run
      # strongroom install --with-pki --listen 192.0.2.10:2762
      # strongroom install --remove
    Exit status: 0 done, 1 a step failed or it is not possible, 2 usage.
    """
    from storescp import install, installer, unitfiles

    if given:
        raise click.UsageError("install takes --config-dir, not --config")
    _check(listen, ae_title)
    options = install.Options(
        program=program or f"{sys.prefix}/bin/strongroom",
        config=config_dir.rstrip("/"),
        root=str(root.resolve()) if root is not None and root.resolve() != Path("/") else "",
        unlock=unlock,
        listen=listen,
        ae_title=ae_title,
        names=server_name or tuple(names_of(listen)),
        with_pki=with_pki,
    )
    files = unitfiles.read()
    facts = installer.look(options, files)
    if dry_run:
        # What root would do; an ordinary user may look.
        facts = msgspec.structs.replace(facts, is_root=facts.is_root or not options.root)
    decide = install.removal if remove else install.plan
    steps = decide(options, facts, files)
    if dry_run:
        click.echo("nothing is changed; these are the steps:")
        for step in steps:
            click.echo(installer.told(step))
        return
    makes = any(isinstance(step, install.MakeStore) for step in steps)
    passphrase = _passphrase(unlock, passphrase_file) if makes else None
    # Folders on the way to what is made are for everybody to pass; what is not has its mode.
    os.umask(0o022)
    installer.carry_out(steps, options, click.echo, passphrase)
    if makes:
        click.echo("ONE FAILURE FROM TOTAL LOSS until there are a second slot and a recovery export off this machine:")
        click.echo("'strongroom keys slot add' and 'strongroom recovery init'. Never back up the anchors")


def _passphrase(unlock: str, file: Path | None) -> str | None:
    # Without a file it is asked for, where nothing else opens the store.
    return None if unlock == "credential" and file is None else _new_passphrase(None, file)


def _check(listen: tuple[str, ...], ae_title: str) -> None:
    for address in listen:
        try:
            parse_address(address)
        except ValueError as error:
            raise click.BadParameter(f"'{address}' is no address with a port, as in 127.0.0.1:2762") from error
    if not is_ae_title(ae_title):
        raise click.BadParameter(f"'{ae_title}' is no AE title: 1 to 16 ASCII characters, no backslash")
