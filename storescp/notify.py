"""What a process tells systemd and the supervisor: one datagram each to ``NOTIFY_SOCKET`` (sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping


def ready() -> None:
    """Say that the process serves."""
    _send("READY=1")


def stopping() -> None:
    """Say that the process is about to end."""
    _send("STOPPING=1")


class Watchdog:
    """Tells systemd that a loop turns; for a unit with ``WatchdogSec=`` (sd_watchdog_enabled(3)).

    It says nothing by itself: whoever turns the loop calls ``turn``, so that a loop that stands still is silent.
    """

    def __init__(
        self,
        environment: Mapping[str, str] = os.environ,
        *,
        pid: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read what the unit wants.

        Args:
            environment: ``WATCHDOG_USEC`` in microseconds and, where it is set, ``WATCHDOG_PID``.
            pid: This process; None for the real one.
            clock: Seconds that only grow.
        """
        self._clock = clock
        self._next = clock()
        self.seconds = _interval(environment, os.getpid() if pid is None else pid) / 2

    def turn(self) -> bool:
        """Say that the loop turns, if half of the unit's interval is over; tell whether it was said."""
        now = self._clock()
        if not self.seconds or now < self._next:
            return False
        self._next = now + self.seconds
        _send("WATCHDOG=1")
        return True


def _interval(environment: Mapping[str, str], pid: int) -> float:
    """Return after how many seconds of silence systemd ends this process; 0 for never."""
    # The variables are inherited; another process's are none of this one's business.
    if environment.get("WATCHDOG_PID", str(pid)) != str(pid):
        return 0.0
    text = environment.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isascii() and text.isdigit() else 0.0


def _send(message: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send(message.encode())
