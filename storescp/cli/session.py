"""A command's connection to the vault: the running one, or one started for this command alone."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from keys import slots
from storescp.config import Config, load, locate
from storescp.control import Client
from storescp.errors import LOCKED, StrongroomError
from storescp.program import PROGRAM


def config_of(given: str | None) -> Config:
    """Return the configuration that a command uses.

    Raises:
        ConfigError: It is missing or has errors.
    """
    return load(locate(given))


@contextlib.contextmanager
def vault(config: Config, *, unlocked: bool = True) -> Iterator[Client]:
    """Connect to the vault.

    Args:
        config: The configuration.
        unlocked: The command needs an unlocked vault: one started for it asks for a passphrase if it must.

    Raises:
        StrongroomError: No vault can be reached or started, or it is locked.
    """
    running = _connect(config)
    if running is not None:
        client = Client(running)
        try:
            yield client
        finally:
            client.close()
        return
    with _started(config) as client:
        if unlocked and client.json("GET", "/v1/locked")["locked"]:
            unlock(client, ask_secret(None, None))
        yield client


@contextlib.contextmanager
def running(config: Config) -> Iterator[Client]:
    """Connect to the vault that runs, and start none: what is asked is about that one.

    Raises:
        StrongroomError: None runs.
    """
    connection = _connect(config)
    if connection is None:
        raise StrongroomError("no vault is running", hint="'strongroom serve', or the service, starts it")
    client = Client(connection)
    try:
        yield client
    finally:
        client.close()


def is_running(config: Config) -> bool:
    """Tell whether a vault runs."""
    connection = _connect(config)
    if connection is not None:
        connection.close()
    return connection is not None


def unlock(client: Client, secret: slots.Secret) -> None:
    """Unlock a vault.

    Raises:
        StrongroomError: The secret does not open it.
    """
    client.json("POST", "/v1/unlock", secret_document(secret))


def secret_document(secret: slots.Secret) -> dict[str, Any]:
    """Return a secret as the control API takes it."""
    match secret:
        case slots.Passphrase(text=text):
            return {"passphrase": text}
        case slots.KeyFile(secret=key):
            return {"key": key}
        case slots.Credential(name=name):
            return {"credential": name}
        case slots.Token(pin=pin, place=place):
            return {"pin": pin} | ({"place": msgspec.to_builtins(place)} if place else {})


def ask_secret(key_file: Path | None, passphrase_file: Path | None) -> slots.Secret:
    """Return a secret from a file, or asked for on the terminal.

    Raises:
        StrongroomError: The file is no good, or there is no terminal.
    """
    if key_file is not None:
        try:
            return slots.read_key_file(key_file)
        except slots.KeyFileError as error:
            raise StrongroomError(str(error)) from error
    if passphrase_file is not None:
        return slots.Passphrase(read_passphrase(passphrase_file))
    if not sys.stdin.isatty():
        raise StrongroomError(
            "the vault is locked, and there is no terminal to ask for a passphrase",
            hint="'strongroom unlock' with --key-file or --passphrase-file, or unlock.key_file in the configuration",
            status=LOCKED,
        )
    return slots.Passphrase(click.prompt("Passphrase", hide_input=True, err=True))


def ask_hidden(prompt: str) -> str:
    """Return a line that is typed without being shown, or comes from a pipe."""
    if sys.stdin.isatty():
        return str(click.prompt(prompt, default="", show_default=False, hide_input=True, err=True))
    return sys.stdin.readline().rstrip("\n")


def ask_shares() -> list[str]:
    """Return the recovery shares that somebody types, one after the other, an empty line behind the last."""
    typed: list[str] = []
    while not typed or typed[-1]:
        typed.append(ask_hidden(f"Share {len(typed) + 1} (empty when done)"))
    return typed[:-1]


def read_passphrase(file: Path) -> str:
    """Return the first line of a file.

    Raises:
        StrongroomError: It cannot be read.
    """
    try:
        return file.read_text("utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError) as error:
        raise StrongroomError(f"the passphrase file {file} cannot be read: {error}") from error


def _connect(config: Config) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(os.fspath(config.socket))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise StrongroomError(
            f"the vault's socket {config.socket} cannot be used: {error.strerror}",
            hint="run this command as root or as the user that the vault runs as",
        ) from error
    return connection


@contextlib.contextmanager
def _started(config: Config) -> Iterator[Client]:
    try:
        owner = config.store_path.stat().st_uid
    except OSError as error:
        raise StrongroomError(f"the store {config.store_path} cannot be found: {error.strerror}") from error
    if os.geteuid() not in {0, owner}:
        raise StrongroomError(
            "no vault is running, and only root or the store's owner may start one",
            hint="start the service, or run this command with sudo",
        )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [*PROGRAM, "--config", str(config.file)]
    command += ["vault", "--connection", str(theirs.fileno())]
    # As the store's owner, so that nothing in the store becomes root's.
    process = subprocess.Popen(
        command,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        user=owner if os.geteuid() != owner else None,
        group=pwd.getpwuid(owner).pw_gid if os.geteuid() != owner else None,
        extra_groups=[] if os.geteuid() != owner else None,
    )
    theirs.close()
    client = Client(ours)
    try:
        yield client
    finally:
        client.close()
        process.wait()
