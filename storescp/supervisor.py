"""``strongroom serve``: gate and vault as two processes under one supervisor.

As one user by default, and the supervisor says so: the isolation between gate and vault holds only where they are
different users. Started by root on a store of two users, it runs each as its own.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pwd
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time

from storescp.config import Config
from storescp.errors import StrongroomError

_SUPERVISED = "STRONGROOM_SUPERVISED"
_START_SECONDS = 30.0
_BACKOFF_LIMIT = 30.0
_STEADY_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class _Child:
    """One process that is kept running."""

    def __init__(self, config: Config, verb: str, user: str | int | None) -> None:
        self.verb = verb
        self._user = user
        self._config = config
        self._failures = 0
        self._started = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.due = 0.0

    def start(self) -> socket.socket:
        """Start the process; return the socket on which it will say that it is ready."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # Abstract and random: nothing to clean up, and known to the child alone.
        name = f"strongroom-{secrets.token_hex(16)}"
        listening.bind("\0" + name)
        command = [sys.executable, "-m", "storescp", "--config", str(self._config.file), self.verb]
        environment = os.environ | {"NOTIFY_SOCKET": "@" + name, _SUPERVISED: str(os.getpid())}
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            user=self._user,
            group=_group(self._user),
            extra_groups=[] if self._user is not None else None,
        )
        return listening

    def wait_ready(self, listening: socket.socket, stop: threading.Event) -> None:
        """Wait until the process says that it is ready.

        Raises:
            StrongroomError: It ended instead, or took too long.
        """
        deadline = time.monotonic() + _START_SECONDS
        with listening:
            listening.settimeout(0.1)
            while not stop.is_set():
                try:
                    if listening.recv(256).startswith(b"READY=1"):
                        return
                except TimeoutError:
                    if self.process is None or self.process.poll() is not None:
                        raise StrongroomError(f"the {self.verb} did not start; its log says why") from None
                    if time.monotonic() > deadline:
                        raise StrongroomError(f"the {self.verb} was not ready in time") from None

    def signal(self, number: int) -> None:
        """Send the process a signal, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def look_after(self) -> None:
        """Start the process again if it ended, later each time it ends soon."""
        if self.process is not None and (status := self.process.poll()) is not None:
            steady = time.monotonic() - self._started > _STEADY_SECONDS
            self._failures = 0 if steady else self._failures + 1
            delay = min(2.0 ** (self._failures - 1), _BACKOFF_LIMIT) if self._failures else 0.0
            log.error("the %s ended with status %d; it is started again in %g s", self.verb, status, delay)
            self.process = None
            self.due = time.monotonic() + delay
        if self.process is None and time.monotonic() >= self.due:
            self.start().close()

    def stop(self, seconds: float) -> None:
        """End the process with SIGTERM, and with SIGKILL when it takes too long."""
        if self.process is None:
            return
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            log.error("the %s did not stop in %g s and is killed", self.verb, seconds)
            self.process.kill()
            self.process.wait()


def run(config: Config) -> None:
    """Run gate and vault until SIGTERM or SIGINT.

    Raises:
        StrongroomError: One of them cannot start.
    """
    stop = threading.Event()
    users = _users(config)
    vault, gate = _Child(config, "vault", users[0]), _Child(config, "gate", users[1])
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    signal.signal(signal.SIGHUP, lambda *_: gate.signal(signal.SIGHUP))
    if users[1] is None:
        log.warning(
            "gate and vault run as one user: whoever breaks into the gate can reach the vault's files. "
            "Production runs them as two users"
        )
    try:
        for child in (vault, gate):
            child.wait_ready(child.start(), stop)
        if not stop.is_set():
            log.info("ready")
        while not stop.wait(0.2):
            for child in (vault, gate):
                child.look_after()
    finally:
        # The gate first: what it still receives while it drains, the vault still admits.
        gate.stop(config.settings.gate.drain_seconds + 10.0)
        vault.stop(30.0)


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


def _group(user: str | int | None) -> int | None:
    if user is None:
        return None
    return (pwd.getpwnam(user) if isinstance(user, str) else pwd.getpwuid(user)).pw_gid


def die_with_parent() -> None:
    """End this process when its supervisor ends, however that happens."""
    parent = os.environ.get(_SUPERVISED)
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGTERM)
