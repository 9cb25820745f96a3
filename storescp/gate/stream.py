"""An established connection: bytes in batches, bytes out, every wait with a deadline. Never blocking.

TLS beneath, or, through a listener of ``gate.plaintext``, nothing.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import cast

# OpenSSL hands out one TLS record a call, at most so many bytes; a shorter one ends what the peer wrote at once.
_TLS_RECORD = 16_384
# How often a wait between messages looks whether the server is stopping.
_LOOK_SECONDS = 0.5


class StoppingError(Exception):
    """The server is stopping, and the peer is between two messages."""


class Stream:
    """A connection whose handshake is done."""

    def __init__(self, connection: socket.socket, stopping: Callable[[], bool]) -> None:
        connection.setblocking(False)
        self._connection = connection
        # Not recv_into of an SSLSocket: two calls in Python less for each TLS record.
        self._read = (
            cast("Callable[[int, memoryview], int]", connection.read)
            if isinstance(connection, ssl.SSLSocket)
            else lambda count, into: connection.recv_into(into, count)
        )
        self._stopping = stopping
        # poll, because select knows no descriptor above 1023.
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def receive(self, into: memoryview, seconds: float, *, between: bool) -> int:
        """Fill memory with what is there, waiting for the first of it; return how many bytes, 0 at the end.

        Args:
            into: Where to; more than a TLS record, so that a peer that sends fast is read in few steps.
            seconds: How long to wait.
            between: The peer is between two messages, and may be told to go.

        Raises:
            TimeoutError: Nothing came.
            StoppingError: The server is stopping, and ``between``.
            OSError: The connection broke.
        """
        filled = 0
        read = self._read
        until = 0.0
        while len(into) - filled >= _TLS_RECORD:
            try:
                count = read(_TLS_RECORD, into[filled:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError) as want:
                if filled:
                    break
                until = until or time.monotonic() + seconds
                self._wait(select.POLLOUT if isinstance(want, ssl.SSLWantWriteError) else select.POLLIN, until, between)
                continue
            filled += count
            if count < _TLS_RECORD:
                break
        return filled

    def send(self, data: bytes, seconds: float) -> None:
        """Send all of it.

        Raises:
            TimeoutError: The peer takes nothing.
            OSError: The connection broke.
        """
        until = 0.0
        view = memoryview(data)
        while view:
            try:
                view = view[self._connection.send(view) :]
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError) as want:
                until = until or time.monotonic() + seconds
                events = select.POLLIN if isinstance(want, ssl.SSLWantReadError) else select.POLLOUT
                self._wait(events, until, between=False)

    def finish(self, seconds: float) -> None:
        """Send no more, and wait so long for the peer to close; the caller closes (PS3.8 9.2, state 13).

        Closing while bytes of the peer are unread resets the connection, and the last reply could be lost with it.
        """
        until = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            # Beneath TLS: SSLSocket.shutdown drops the TLS state.
            socket.socket.shutdown(self._connection, socket.SHUT_WR)
            self._poll.modify(self._connection, select.POLLIN)
            while (left := until - time.monotonic()) > 0 and self._poll.poll(left * 1000):
                if not socket.socket.recv(self._connection, _TLS_RECORD):
                    return

    def _wait(self, events: int, until: float, between: bool) -> None:
        self._poll.modify(self._connection, events)
        while True:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if self._poll.poll(min(left, _LOOK_SECONDS) * 1000):
                return
            # Only a peer that is quiet is told to go: one that just got its last response is about to release.
            if between and self._stopping():
                raise StoppingError
