"""The vault process: one vault a store, admission in a loop, the control API."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

from keys import keyring, slots
from keys.anchors import AnchorError
from keys.keyring import KeyringError
from keys.token import TokenError
from storescp import notify
from storescp.config import Config
from storescp.control import Server
from storescp.errors import StrongroomError
from storescp.harden import check_vault
from storescp.stopping import Stop
from storescp.vault.alarms import Alarms
from storescp.vault.api import Access
from storescp.vault.api.desk import DeskAccess, group_of
from storescp.vault.api.status import total_loss
from storescp.vault.erase import Erase
from storescp.vault.forward import Forward
from storescp.vault.forwardstate import remember_erasures
from storescp.vault.jobs import jobs_of
from storescp.vault.numbers import Numbers
from storescp.vault.retain import Retain
from storescp.vault.rotate import Rotate
from storescp.vault.schedule import Schedule
from storescp.vault.state import Vault

_TICK_SECONDS = 1.0
# How often it is looked whether an old key version's time has come.
_LOOK_SECONDS = 60.0
# Admission yields to a gate that receives; those who ask something run in threads of their own, as fast as ever.
_NICE = 10

log = logging.getLogger(__name__)


def run(config: Config, *, single: socket.socket | None = None) -> None:
    """Run the vault until SIGTERM or SIGINT, or on one connection until that ends.

    Raises:
        StrongroomError: It cannot start.
    """
    stop = Stop()
    if single is None:
        stop.on(signal.SIGTERM, signal.SIGINT)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    check_vault(config)
    with _store_lock(config):
        vault = Vault(config)
        vault.after_unlock = Erase(vault).resume
        remember_erasures(vault)
        vault.background = single is None
        _unlock_by_itself(config, vault)
        schedule = Schedule(vault, jobs_of(vault))
        server = Server(Access(vault, schedule).handle, config.settings.control.group)
        if single is not None:
            server.serve(single)
            vault.lock()
            vault.auditor.close()
            return
        try:
            server.listen(config.socket)
        except OSError as error:
            raise StrongroomError(f"the vault cannot listen on {config.socket}: {error}") from error
        desk = _desk(config, vault)
        for warning in total_loss(vault.opened, len(keyring.read_header(config.keyring).slots)):
            log.warning("%s", warning)
        vault.auditor.started()
        notify.ready()
        _work(vault, schedule, stop, desk)
        notify.stopping()
        server.close()
        schedule.close()
        vault.lock()
        vault.auditor.tell("vault-stopped")
        vault.auditor.close()
        with contextlib.suppress(FileNotFoundError):
            config.socket.unlink()
        log.info("stopped")


def _work(vault: Vault, schedule: Schedule, stop: Stop, desk: DeskAccess | None) -> None:
    """Admit, and do what comes with time, until the vault is to stop."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICE))
    done, looked = True, time.monotonic()
    watchdog = notify.Watchdog()
    alarms, numbers, forward = Alarms(vault), Numbers(vault, schedule), Forward(vault)
    # Between two turns whoever waits for the vault's state gets it.
    while not stop.wait(_TICK_SECONDS if done else 0.01):
        try:
            done = vault.advance(_TICK_SECONDS)
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                Rotate(vault).destroy_due()
                Erase(vault).resume()
                Retain(vault).look_at_clock()
                if desk is not None:
                    desk.grants.settle()
        except Exception:
            # A full disk or a damaged file must not end the vault: deposits stay where they are.
            log.exception("admission failed and is tried again")
            done = True
        if desk is not None:
            desk.turn()
        alarms.turn()
        schedule.tick()
        forward.turn()
        numbers.turn()
        watchdog.turn()


def _desk(config: Config, vault: Vault) -> DeskAccess | None:
    """Begin to answer the desk, if there is one.

    Raises:
        StrongroomError: Its socket cannot be made.
    """
    if not config.settings.desk.runs:
        return None
    access = DeskAccess(vault)
    try:
        Server(access.handle, group_of(config)).listen(config.desk_socket)
    except OSError as error:
        raise StrongroomError(f"the vault cannot listen on {config.desk_socket}: {error}") from error
    return access


def _unlock_by_itself(config: Config, vault: Vault) -> None:
    if config.key_file is None and not config.credential:
        log.warning("locked: no way to unlock is configured; 'strongroom unlock' opens the vault")
        return
    try:
        secret = slots.read_key_file(config.key_file) if config.key_file else slots.Credential(config.credential)
        vault.unlock(secret)
    except (slots.KeyFileError, slots.UnlockError, KeyringError, AnchorError, TokenError, StrongroomError) as error:
        log.error("locked: %s", error)


@contextlib.contextmanager
def _store_lock(config: Config) -> Iterator[None]:
    """Hold the store's lock: one vault a store."""
    try:
        descriptor = os.open(config.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StrongroomError(f"the store {config.store_path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StrongroomError(
            f"another vault runs on the store {config.store_path}",
            hint=f"use it through {config.socket}, or stop it",
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
