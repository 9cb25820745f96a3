"""Reading ahead: what comes next is fetched while what came is sent on, in a few buffers that go round."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

_BUFFERS, _BUFFER_BYTES = 8, 1 << 18


class Ahead:
    """An iterator of bytes that another thread fetches. Close it, wherever it is."""

    def __init__(self, first: bytes, receive: Callable[[memoryview], int]) -> None:
        """Begin to fetch.

        Args:
            first: What came already.
            receive: Fills memory; returns how many bytes, 0 at the end. What it raises is raised where it is read.
        """
        self._first = first
        self._receive = receive
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[tuple[memoryview, int] | BaseException] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(memoryview(bytearray(_BUFFER_BYTES)))
        self._thread = threading.Thread(target=self._fetch, daemon=True, name="ahead")
        self._thread.start()

    def __iter__(self) -> Iterator[memoryview]:
        """Yield what came, each piece valid until the next."""
        if self._first:
            yield memoryview(self._first)
        while True:
            came = self._filled.get()
            if isinstance(came, BaseException):
                raise came
            buffer, count = came
            if not count:
                return
            yield buffer[:count]
            self._free.put(buffer)

    def close(self) -> None:
        """Fetch no more; what ``receive`` reads from has to end before."""
        self._free.put(None)
        self._thread.join()

    def _fetch(self) -> None:
        try:
            count = 1
            while count and (buffer := self._free.get()) is not None:
                count = self._receive(buffer)
                self._filled.put((buffer, count))
        except BaseException as error:
            self._filled.put(error)
