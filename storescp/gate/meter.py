"""What a worker counts of its associations, for whoever watches the server: plain additions, no lock for an object.

Each association has a count of its own, which its thread alone changes. Once a second the worker's first thread takes
what was added and tells the gate's first process, which sums up over workers: a worker that dies takes a second of its
counts along, and no sum ever falls.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import Annotated

import msgspec
from msgspec import Meta

# Upper bounds of a C-STORE's time in seconds, from the first byte of the request to the response.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# What is no C-STORE and no C-ECHO has no reason in the table of refusals.
UNRECOGNIZED = "UNRECOGNIZED_OPERATION"
# Where a connection ended that became no association; the first is of the gate's first process.
LISTENER, HANDSHAKE, REQUEST = "listener", "handshake", "request"

_Number = Annotated[int, Meta(ge=0, le=1 << 50)]


class Counted(msgspec.Struct):
    """What was added since the last one, of a peer; ``title`` is empty for connections that became no association.

    ``refused`` is by reason (``gate/status.py``), or by where a connection ended. ``buckets`` has one more than
    ``BUCKETS``, or nothing.
    """

    title: Annotated[str, Meta(max_length=16)]
    associations: _Number = 0
    objects: _Number = 0
    bytes: _Number = 0
    refused: Annotated[dict[Annotated[str, Meta(max_length=40)], _Number], Meta(max_length=40)] = msgspec.field(
        default_factory=dict
    )
    seconds: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    buckets: Annotated[list[_Number], Meta(max_length=len(BUCKETS) + 1)] = msgspec.field(default_factory=list)


class Count:
    """An association's count."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.objects = 0
        self.bytes = 0
        self.refused: dict[str, int] = {}
        self.seconds = 0.0
        self.buckets = [0] * (len(BUCKETS) + 1)
        # What was taken already; the thread that takes alone uses it.
        self._told = Counted(title, buckets=[0] * (len(BUCKETS) + 1))

    def stored(self, size: int) -> None:
        """Count an object of so many bytes."""
        self.objects += 1
        self.bytes += size

    def refuse(self, reason: str) -> None:
        """Count a refusal."""
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def answered(self, seconds: float) -> None:
        """Count a C-STORE that was answered after so long."""
        self.seconds += seconds
        self.buckets[bisect_left(BUCKETS, seconds)] += 1

    def take(self, into: Counted) -> None:
        """Add what is new since this was done last."""
        told = self._told
        # Each is read once: its thread goes on adding.
        new = Counted(self.title, 1, self.objects, self.bytes, self.refused.copy(), self.seconds, self.buckets.copy())
        self._told = new
        into.associations += new.associations - told.associations
        into.objects += new.objects - told.objects
        into.bytes += new.bytes - told.bytes
        into.seconds += new.seconds - told.seconds
        for reason, count in new.refused.items():
            if more := count - told.refused.get(reason, 0):
                into.refused[reason] = into.refused.get(reason, 0) + more
        before = into.buckets or [0] * len(new.buckets)
        into.buckets = [a + b - c for a, b, c in zip(before, new.buckets, told.buckets, strict=True)]


class Meter:
    """All counts of a worker. Safe to use from many threads; one of them takes, where they are wanted at all."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._lock = threading.Lock()
        self._live: set[Count] = set()
        self._ended: list[Count] = []
        self._away: dict[str, int] = {}

    def begin(self, title: str) -> Count:
        """Return the count of a new association of a peer."""
        count = Count(title)
        if self._wanted:
            with self._lock:
                self._live.add(count)
        return count

    def end(self, count: Count) -> None:
        """Let go of the count of an association that ended; what is in it counts."""
        if self._wanted:
            with self._lock:
                self._live.discard(count)
                self._ended.append(count)

    def turned_away(self, where: str) -> None:
        """Count a connection that became no association."""
        with self._lock:
            self._away[where] = self._away.get(where, 0) + 1

    def take(self) -> list[Counted]:
        """Return what was added since the last time, of each peer of whom there is something."""
        with self._lock:
            counts = [*self._live, *self._ended]
            self._ended = []
            away, self._away = self._away, {}
        found: dict[str, Counted] = {}
        for count in counts:
            count.take(found.setdefault(count.title, Counted(count.title)))
        told = [Counted("", refused=away)] if away else []
        return told + [c for c in found.values() if c.associations or c.objects or c.refused or any(c.buckets)]
