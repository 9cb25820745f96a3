"""Somebody who stores at a steady pace while something else happens, and keeps count of every answer."""

from __future__ import annotations

import ssl
import threading
import time

from benchmarks import objects
from benchmarks.objects import Uids
from benchmarks.upper import Association, Message, ProtocolError, Target, tls_context

_TIMEOUT = 60.0
_OBJECTS_A_STUDY = 20


class Sender(threading.Thread):
    """Stores small objects, a new study and association each twenty of them, until stopped.

    ``acknowledged`` are the SOP Instance UIDs that were answered Success, ``refused`` says why others were not;
    ``slowest`` is the longest wait for an answer, in seconds.
    """

    def __init__(self, target: Target, rate: float) -> None:
        """Prepare to send ``rate`` objects a second at most."""
        super().__init__(daemon=True)
        self._target = target
        self._pause = 1 / rate
        self._uids = Uids()
        self._done = threading.Event()
        self.acknowledged: list[str] = []
        self.refused: list[str] = []
        self.slowest = 0.0
        self._template = objects.small()

    def run(self) -> None:
        """Send until stopped."""
        context = tls_context(self._target.credentials)
        while not self._done.is_set():
            try:
                self._study(context)
            except (OSError, ProtocolError) as error:
                self.refused.append(f"{type(error).__name__}: {error}")
                self._done.wait(0.5)

    def stop(self) -> None:
        """Let the object that is under way be answered, and end."""
        self._done.set()
        self.join(2 * _TIMEOUT)

    def _study(self, context: ssl.SSLContext) -> None:
        association = Association(self._target, context, self._template.sop_class, _TIMEOUT)
        try:
            message = Message(self._template, association.maximum_pdu, self._uids.new(), self._uids.new())
            for number in range(_OBJECTS_A_STUDY):
                instance = self._uids.new()
                message.renew(instance, number)
                begun = time.monotonic()
                for piece, repeat in message.pieces:
                    for _ in range(repeat):
                        association.send(piece)
                association.response()
                self.acknowledged.append(instance.decode())
                took = time.monotonic() - begun
                self.slowest = max(self.slowest, took)
                if self._done.wait(max(0.0, self._pause - took)):
                    return
        finally:
            association.release()
