"""A process of ours that is kept running: started, started again when it ends, ended with its parent."""

from __future__ import annotations

import ctypes
import logging
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Sequence

from storescp.config import Config
from storescp.program import PROGRAM

_SUPERVISED = "STRONGROOM_SUPERVISED"
_BACKOFF_LIMIT = 30.0
_STEADY_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class Child:
    """One process, which runs a verb of this program."""

    def __init__(
        self,
        config: Config,
        name: str,
        arguments: Sequence[str],
        *,
        user: str | int | None = None,
        groups: Sequence[str] = (),
    ) -> None:
        """Prepare.

        Args:
            config: The configuration.
            name: What the log calls it.
            arguments: The verb and its options.
            user: As whom it runs, None for as whom this runs.
            groups: Whose groups it gets besides its own, where ``user`` is given.
        """
        self.name = name
        self._command = [*PROGRAM, "--config", str(config.file), *arguments]
        self._user = user
        self._groups = groups
        self._failures = 0
        self._started = 0.0
        self._due = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Start the process, exec'd: of what this one has open it gets the descriptors named."""
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [*self._command, *arguments],
            env=os.environ | (environment or {}) | {_SUPERVISED: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            user=self._user,
            group=_group(self._user),
            extra_groups=[_group(of) or 0 for of in self._groups] if self._user is not None else None,
        )

    @property
    def runs(self) -> bool:
        """Tell whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def is_due(self) -> bool:
        """Tell whether the process ended and is to be started again now: later each time that it ends soon."""
        if self._process is not None and (status := self._process.poll()) is not None:
            steady = time.monotonic() - self._started > _STEADY_SECONDS
            self._failures = 0 if steady else self._failures + 1
            delay = min(2.0 ** (self._failures - 1), _BACKOFF_LIMIT) if self._failures else 0.0
            when = f"in {delay:g} s" if delay else "at once"
            log.error("the %s ended with status %d; it is started again %s", self.name, status, when)
            self._process = None
            self._due = time.monotonic() + delay
        return self._process is None and time.monotonic() >= self._due

    def signal(self, number: int) -> None:
        """Send the process a signal, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self, seconds: float) -> None:
        """End the process with SIGTERM, and with SIGKILL when it takes too long."""
        if self._process is None:
            return
        self.signal(signal.SIGTERM)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            log.error("the %s did not stop in %g s and is killed", self.name, seconds)
            self._process.kill()
            self._process.wait()


def die_with_parent() -> None:
    """End this process when the one that started it as a ``Child`` ends, however that happens."""
    parent = os.environ.get(_SUPERVISED)
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGTERM)


def _group(user: str | int | None) -> int | None:
    if user is None:
        return None
    return (pwd.getpwnam(user) if isinstance(user, str) else pwd.getpwuid(user)).pw_gid
