"""Being told to stop, by a signal or from within."""

from __future__ import annotations

import os
import select
import signal


class Stop:
    """Set once, by a signal's handler too; waited for by anybody.

    No ``threading.Event``: its lock is not reentrant, so that a handler which sets it while the main thread is about to
    wait for it stops both for ever.
    """

    def __init__(self) -> None:
        self._set = False
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._reading, select.POLLIN)

    def on(self, *signals: signal.Signals) -> None:
        """Be set by these signals."""
        for number in signals:
            signal.signal(number, lambda *_: self.set())

    def set(self) -> None:
        """Set it."""
        if not self._set:
            self._set = True
            # Never read: from now on nobody waits.
            os.write(self._writing, b"\0")

    def is_set(self) -> bool:
        """Tell whether it is set."""
        return self._set

    def wait(self, seconds: float) -> bool:
        """Wait until it is set, but not longer; tell whether it is."""
        if not self._set:
            self._poll.poll(max(0.0, seconds) * 1000)
        return self._set
