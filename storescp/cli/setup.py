"""``init``, ``unlock``, ``lock`` and ``status``."""

from __future__ import annotations

import os
import pwd
import socket as sockets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from keys import slots
from storescp.cli import output
from storescp.cli.session import ask_secret, config_of, is_running, read_passphrase, running, unlock, vault
from storescp.config import is_ae_title, parse_address, split_token
from storescp.errors import StrongroomError

_WARNING = """\
Two things now exist once in the world:
  {keyring}   the keyring: without it no study opens
  {anchors}   the anchors: without them the keyring's key versions do not open
Lose either, or every way to unlock, and every study is lost, backups included. Back up the keyring with the store.
Never back up the anchors: destroying one is what proves that a key version is gone.
ONE FAILURE FROM TOTAL LOSS until a recovery export is confirmed off this machine ('strongroom recovery init') and
there are two slots ('strongroom keys slot add')."""


@click.command("init")
@click.option(
    "--listen",
    default=["127.0.0.1:2762"],
    multiple=True,
    help="Address and port of the gate; may be repeated.",
)
@click.option("--ae-title", default="STRONGROOM", show_default=True, help="The server's own AE title.")
@click.option("--key-file", type=click.Path(path_type=Path), help="Make a key file here and a slot that opens with it.")
@click.option("--passphrase-file", type=click.Path(path_type=Path), help="Read the passphrase of a slot from a file.")
@click.option(
    "--with-pki",
    is_flag=True,
    help="Make a certificate authority of the store's own and a server certificate.",
)
@click.option("--vault-user", help="The vault's user, where gate and vault are two; needs root.")
@click.option("--gate-user", help="The gate's user, where gate and vault are two; needs root.")
@click.option("--server-name", multiple=True, help="Name or address in the server certificate; may be repeated.")
@click.option("--anchor-token", metavar="MODULE:TOKEN", help="Keep the anchors on a PKCS#11 token; asks for its PIN.")
@click.option("--anchor-pin-file", type=click.Path(path_type=Path), help="The token's PIN is, and stays, in this file.")
@click.pass_obj
def init_command(
    given: str | None,
    /,
    listen: tuple[str, ...],
    ae_title: str,
    key_file: Path | None,
    passphrase_file: Path | None,
    with_pki: bool,
    vault_user: str | None,
    gate_user: str | None,
    server_name: tuple[str, ...],
    anchor_token: str | None,
    anchor_pin_file: Path | None,
) -> None:
    r"""Make a new store beside its configuration file.

    Without --key-file and --passphrase-file a passphrase is asked for. A store is never made over another one.

    With --anchor-token the key versions' anchors are keys of a token that never leave it (docs/anchors.md).

    With --vault-user and --gate-user each gets what is its own; 'serve' as root then runs the two as these users.

    \b
    Example:
      $ strongroom --config /srv/strongroom/strongroom.toml init --with-pki --listen 192.0.2.10:2762
    Exit status: 0 made, 1 something is there already, 2 usage.
    """
    from storescp.vault.create import PIN_CREDENTIAL, Plan, create

    for address in listen:
        try:
            parse_address(address)
        except ValueError as error:
            raise click.BadParameter(f"'{address}' is no address with a port, as in 127.0.0.1:2762") from error
    if not is_ae_title(ae_title):
        raise click.BadParameter(f"'{ae_title}' is no AE title: 1 to 16 ASCII characters, no backslash")
    users = users_of(vault_user, gate_user)
    pin = _anchor_pin(anchor_token, anchor_pin_file)
    passphrase = _new_passphrase(key_file, passphrase_file)
    names = list(server_name) or names_of(listen)
    # A new one in the current folder where nothing is said, whatever there is elsewhere.
    file = Path(given or os.environ.get("STRONGROOM_CONFIG") or "strongroom.toml").absolute()
    config = create(
        Plan(
            file,
            list(listen),
            ae_title,
            passphrase,
            key_file.absolute() if key_file else None,
            names,
            with_pki,
            users,
            anchor_token or "",
            pin,
            anchor_pin_file.absolute() if anchor_pin_file else None,
        )
    )
    click.echo(f"made a store: {config.store_path}")
    click.echo(f"configuration: {file}")
    if key_file:
        click.echo(f"key file: {key_file.absolute()}; whoever has it and the disks can read the store")
    if with_pki:
        click.echo(f"server certificate: {config.certificate} for {', '.join(names)}")
    else:
        click.echo(f"put the server's certificate at {config.certificate} and its key at {config.private_key}")
    if pin is not None:
        click.echo(
            f"the PIN was not kept: give it to the vault as {PIN_CREDENTIAL} (LoadCredentialEncrypted= in its unit), "
            "or name a file with it in keys.anchor_pin"
        )
    click.echo()
    anchors = f"{config.anchors} and the token {config.anchor_token[1]!r}" if config.anchor_token else config.anchors
    click.echo(_WARNING.format(keyring=config.keyring, anchors=anchors))


@click.command("unlock")
@click.option("--key-file", type=click.Path(path_type=Path), help="Unlock with a key file.")
@click.option("--passphrase-file", type=click.Path(path_type=Path), help="Read the passphrase from a file.")
@click.option("--token", is_flag=True, help="Unlock with the token of a slot; asks for its PIN.")
@click.pass_obj
def unlock_command(given: str | None, /, key_file: Path | None, passphrase_file: Path | None, token: bool) -> None:
    r"""Unlock the running vault, which then admits what waits. Asks for the passphrase unless a file is named.

    \b
    Examples:
      $ strongroom unlock
      $ strongroom unlock --token
    Exit status: 0 unlocked, 1 failed, 4 this does not unlock the store.
    """
    with running(config_of(given)) as client:
        if not client.json("GET", "/v1/locked")["locked"]:
            click.echo("unlocked already")
            return
        if token:
            unlock(client, slots.Token(click.prompt("PIN of the token", hide_input=True, err=True)))
        else:
            unlock(client, ask_secret(key_file, passphrase_file))
    click.echo("unlocked")


@click.command("lock")
@click.pass_obj
def lock_command(given: str | None, /) -> None:
    r"""Lock the running vault: it forgets its keys. Receiving goes on.

    \b
    Example:
      $ strongroom lock
    """
    with running(config_of(given)) as client:
        client.json("POST", "/v1/lock")
    click.echo("locked")


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def status_command(given: str | None, /, as_json: bool) -> None:
    r"""Say how the store is: locked or not, what waits, what is held, who stored last, how much disk is left.

    \b
    Example:
      $ strongroom status --json
    """
    from storescp.gate import validity

    config = config_of(given)
    # One that is started for this command says how the store is, and nothing of a server.
    served = is_running(config)
    with vault(config, unlocked=False) as client:
        status = client.json("GET", "/v1/status")
    if not served:
        status["receiving"] = False
        status["warnings"].insert(
            0, "no server is running, so nothing is received: 'strongroom serve', or its services"
        )
    # The vault knows nothing of TLS: what the gate's files say is read here.
    status["warnings"] += validity.warnings(config, datetime.now(UTC))
    if as_json:
        output.document(status)
        return
    for line in _lines(status):
        click.echo(line)


def _lines(status: dict[str, Any]) -> list[str]:
    lines = [f"store {status['store_id']}"]
    lines.append(
        f"LOCKED since {status['locked_since']}"
        if status["locked"]
        else f"unlocked, key version {status['key_version']}"
    )
    deposits = status["deposits"]
    waiting = f"{output.plural(deposits['packs'], 'pack')} waiting"
    since = f" for {deposits['lag_seconds']:.0f} s, since {deposits['oldest']}"
    size = f"; {output.size(deposits['bytes'])} with the space allocated ahead"
    lines.append(waiting + (since + size if deposits["oldest"] else ""))
    if not status["locked"]:
        counts = status["counts"]
        held = [
            output.plural(counts[n], s, p)
            for n, s, p in (
                ("studies", "study", "studies"),
                ("series", "series", "series"),
                ("instances", "instance", ""),
            )
        ]
        lines.append(f"{', '.join(held)} held in {output.plural(counts['packs'], 'pack')}")
        extra = {n: counts[n] for n in ("encodings", "unreadable", "undecoded") if counts[n]}
        extra |= {"in quarantine": status["quarantine"]} if status["quarantine"] else {}
        if extra:
            lines.append(", ".join(f"{number} {name}" for name, number in extra.items()))
        for title, when in status["last_store"].items():
            lines.append(f"last store from {title}: {when}")
    for name, disk in status["disk"].items():
        lines.append(f"{name}: {output.size(disk['free'])} of {output.size(disk['total'])} free")
    lines += [f"WARNING: {text}" for text in status["warnings"]]
    return lines


def _new_passphrase(key_file: Path | None, passphrase_file: Path | None) -> str | None:
    if passphrase_file is not None:
        text = read_passphrase(passphrase_file)
    elif key_file is not None:
        return None
    else:
        text = click.prompt("Passphrase for the new store", hide_input=True, confirmation_prompt=True, err=True)
    try:
        slots.check_passphrase(text)
    except slots.WeakPassphraseError as error:
        raise StrongroomError(str(error), hint="four or more unrelated words are good and can be remembered") from error
    return text


def _anchor_pin(token: str | None, pin_file: Path | None) -> str | None:
    """Return the token's PIN as typed; None where there is no token, or a file with its PIN."""
    if token is None:
        if pin_file is not None:
            raise click.UsageError("--anchor-pin-file is for --anchor-token")
        return None
    try:
        split_token(token)
    except ValueError as error:
        raise click.BadParameter(f"'{token}' is not MODULE:TOKEN, an absolute path and a token's label") from error
    return None if pin_file else click.prompt("PIN of the token", hide_input=True, err=True)


def users_of(vault: str | None, gate: str | None) -> tuple[str, str] | None:
    if vault is None and gate is None:
        return None
    if vault is None or gate is None or vault == gate:
        raise click.UsageError("name both --vault-user and --gate-user, and two different ones")
    if os.geteuid() != 0:
        raise StrongroomError("a store of two users can be made by root alone", hint="run this with sudo")
    for name in (vault, gate):
        try:
            pwd.getpwnam(name)
        except KeyError as error:
            hint = f"'systemd-sysusers' with systemd/strongroom.sysusers makes both, or 'useradd --system {name}'"
            raise StrongroomError(f"there is no user {name} on this machine", hint=hint) from error
    return vault, gate


def names_of(listen: tuple[str, ...]) -> list[str]:
    hosts = [parse_address(address)[0] for address in listen]
    named = [host for host in hosts if host not in {"0.0.0.0", "::"}]  # noqa: S104
    return list(dict.fromkeys([sockets.gethostname(), *named, *(["localhost"] if "127.0.0.1" in named else [])]))
