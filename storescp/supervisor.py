"""``strongroom serve``: gate and vault as two processes under one supervisor.

As one user by default, and the supervisor says so: the isolation between gate and vault holds only where they are
different users. Started by root on a store of two users, it runs each as its own.
"""

from __future__ import annotations

import logging
import os
import pwd
import secrets
import signal
import socket
import time

from storescp import snapshot
from storescp.child import Child
from storescp.config import Config
from storescp.errors import USAGE, StrongroomError
from storescp.stopping import Stop

_START_SECONDS = 30.0

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Run gate and vault until SIGTERM or SIGINT.

    Raises:
        StrongroomError: One of them cannot start.
    """
    stop = Stop()
    users = _users(config)
    vault = Child(config, "vault", ["vault"], user=users[0])
    gate = Child(config, "gate", ["gate"], user=users[1])
    errands = _errands(config, users)
    stop.on(signal.SIGTERM, signal.SIGINT)
    signal.signal(signal.SIGHUP, lambda *_: gate.signal(signal.SIGHUP))
    if users[1] is None:
        log.warning(
            "gate and vault run as one user: whoever breaks into the gate can reach the vault's files. "
            "Production runs them as two users"
        )
    try:
        for child in (vault, gate):
            _start(child, stop)
        if not stop.is_set():
            log.info("ready")
            # Not waited for: nothing is kept from being received because nobody can be told something.
            for errand in errands:
                errand.start()
        while not stop.wait(0.2):
            for child in (vault, gate, *errands):
                if child.is_due():
                    child.start()
    finally:
        for errand in errands:
            errand.signal(signal.SIGTERM)
        # The gate first: what it still receives while it drains, the vault still admits.
        gate.stop(config.settings.gate.drain_seconds + 10.0)
        vault.stop(30.0)
        for errand in errands:
            errand.stop(5.0)


def _errands(config: Config, users: tuple[int | None, str | None]) -> list[Child]:
    """Return the processes that speak to a network besides the gate, those that are configured."""
    errands = []
    # As the vault's user, who owns the outbox; the unit for systemd has a user of its own.
    if config.settings.alerts.sends:
        errands.append(Child(config, "alert sender", ["alert-sender"], user=users[0]))
    if config.settings.metrics.listen:
        if users[0] is not None and users[1] is not None:
            snapshot.prepare(config, users[0], users[1])
        # As the gate's user: whoever breaks in through this listener finds no more than behind the gate's.
        errands.append(Child(config, "metrics", ["metrics"], user=users[1]))
    if config.settings.desk.runs:
        errands.append(_desk(config, users))
    if config.settings.audit.forward:
        errands.append(Child(config, "audit forwarder", ["audit-forwarder"], user=users[0]))
    return errands


def _desk(config: Config, users: tuple[int | None, str | None]) -> Child:
    """Return the desk, and make the folders that it needs: of what it deposits, of the vault's socket for it.

    Raises:
        StrongroomError: Gate and vault are two users, and the desk has none of its own.
    """
    vault, gate = users
    # A store that an older release made has none.
    config.desk_incoming.mkdir(mode=0o700, exist_ok=True)
    if vault is None or gate is None:
        return Child(config, "desk", ["desk"])
    name = config.settings.desk.user
    if not name or name == gate:
        raise StrongroomError(
            "gate and vault are two users, and the desk needs a third",
            hint="desk.user names it; its group comes to the vault's socket for it",
            status=USAGE,
        )
    try:
        desk, group = pwd.getpwnam(name)[2:4]
    except KeyError as error:
        raise StrongroomError(f"desk.user: there is no user {name} on this machine", status=USAGE) from error
    folder = config.desk_socket.parent
    folder.mkdir(exist_ok=True)
    os.chown(folder, vault, group)
    # What the vault makes in it is the desk's group's.
    folder.chmod(0o2750)
    # As the gate's: what is deposited is the vault's group's.
    os.chown(config.desk_incoming, desk, pwd.getpwuid(vault).pw_gid, follow_symlinks=False)
    config.desk_incoming.chmod(0o2770)
    # It shows the gate's certificate, unless it has one of its own.
    return Child(config, "desk", ["desk"], user=name, groups=[] if config.settings.desk.private_key else [gate])


def _start(child: Child, stop: Stop) -> None:
    """Start a process and wait until it says that it is ready.

    Raises:
        StrongroomError: It ended instead, or took too long.
    """
    deadline = time.monotonic() + _START_SECONDS
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        # Abstract and random: nothing to clean up, and known to the child alone.
        name = f"strongroom-{secrets.token_hex(16)}"
        listening.bind("\0" + name)
        listening.settimeout(0.1)
        child.start(environment={"NOTIFY_SOCKET": "@" + name})
        while not stop.is_set():
            try:
                if listening.recv(256).startswith(b"READY=1"):
                    return
            except TimeoutError:
                if not child.runs:
                    raise StrongroomError(f"the {child.name} did not start; its log says why") from None
                if time.monotonic() > deadline:
                    raise StrongroomError(f"the {child.name} was not ready in time") from None


def _users(config: Config) -> tuple[int | None, str | None]:
    """Return as whom vault and gate are started: None for as whom this runs."""
    gate = config.settings.gate.user
    if not gate:
        return None, None
    if os.geteuid() != 0:
        raise StrongroomError(
            "this store has two users, gate and vault, and only root can run both",
            hint="run this as root, or 'strongroom vault' and 'strongroom gate' each as its own user",
        )
    return config.store_path.stat().st_uid, gate
