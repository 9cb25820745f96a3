"""How much of each peer the vault answers in a time, and how often it records that it did not.

Whatever the desk asks. Pure but for the clock that is given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

# Of as many peers as have files, and one more for names that have none.
_PEERS_LIMIT = 10_000


class Limit:
    """So many in so many seconds for each peer: a bucket that fills up evenly. Safe to use from many threads."""

    def __init__(self, most: int, seconds: float, now: Callable[[], float]) -> None:
        """Begin with full buckets.

        Args:
            most: What fits a bucket; 0 for no limit.
            seconds: In which time an empty one is full again.
            now: A clock that never goes back, in seconds.
        """
        self._most = most
        self._rate = most / seconds
        self._now = now
        self._lock = threading.Lock()
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, peer: str, count: int = 1) -> bool:
        """Take so many of a peer's, all or none; tell whether there were enough."""
        if not self._most:
            return True
        now = self._now()
        with self._lock:
            if len(self._left) > _PEERS_LIMIT:
                self._left = {p: x for p, x in self._left.items() if self._filled(x, now) < self._most}
            left = self._filled(self._left.get(peer, (float(self._most), now)), now)
            enough = count <= left
            self._left[peer] = (left - count if enough else left, now)
        return enough

    def _filled(self, state: tuple[float, float], now: float) -> float:
        left, since = state
        return min(float(self._most), left + (now - since) * self._rate)


class Seldom:
    """What comes again and again is told once in a time: at once at first, then how often it came since.

    Whoever is refused would else write as many records as he likes. Safe to use from many threads.
    """

    def __init__(self, seconds: float, now: Callable[[], float]) -> None:
        """Begin.

        Args:
            seconds: How long the same thing is not told again.
            now: A clock that never goes back, in seconds.
        """
        self._seconds = seconds
        self._now = now
        self._lock = threading.Lock()
        # When each was told, and how often it came since.
        self._told: dict[tuple[str, ...], tuple[float, int]] = {}

    def came(self, what: tuple[str, ...]) -> int:
        """Hear that something came; return of how many times to tell now, 0 to tell nothing."""
        now = self._now()
        with self._lock:
            told, since = self._told.get(what, (-self._seconds, 0))
            if now - told < self._seconds:
                self._told[what] = told, since + 1
                return 0
            self._told[what] = now, 0
            return since + 1

    def overdue(self) -> list[tuple[tuple[str, ...], int]]:
        """Return what came since it was told, and how often, where the time is over; forget what came no more."""
        now = self._now()
        with self._lock:
            over = {what: since for what, (told, since) in self._told.items() if now - told >= self._seconds}
            for what, since in over.items():
                if since:
                    self._told[what] = now, 0
                else:
                    del self._told[what]
        return [(what, since) for what, since in over.items() if since]
