"""What one peer may take of the gate: associations at a time, objects a minute, bytes a day, over all workers.

The gate's first process counts (``Quotas``, pure); workers ask it before they accept an association, tell it what they
stored, and hear when a peer has to wait (``Allowances``). Peers without limits cost nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import msgspec

from storescp.gate import channel
from storescp.gate.channel import Message
from storescp.peers import Peer

# No sender waits for ever for a response; who is still too fast waits again at the next object.
_PAUSE_SECONDS = 20.0


class Claim(msgspec.Struct, frozen=True):
    """What a worker asks for: an association of a peer, of which there may be so many."""

    title: str
    most: int


class Use(msgspec.Struct, frozen=True):
    """What a peer stored, and its limits; 0 for none."""

    title: str
    objects: int
    bytes: int
    per_minute: int
    per_day: int


class Hold(msgspec.Struct, frozen=True):
    """Until when a peer waits, seconds since the epoch: before its next response, and before it may store again.

    ``used`` is how many bytes of its day were used then: where its limit is raised, it may store at once.
    """

    title: str
    pause: float
    refuse: float
    used: int


class _Used:
    def __init__(self) -> None:
        # Objects that may come at once; less than none is what must be waited for.
        self.left = 0.0
        self.limit = 0
        self.at = 0.0
        self.day = ""
        self.bytes = 0


class Quotas:
    """The count of the gate's first process. Times are seconds since the epoch."""

    def __init__(self) -> None:
        self._titles: dict[int, str] = {}
        self._used: dict[str, _Used] = {}

    def claim(self, connection: int, claim: Claim) -> bool:
        """Count an association, if there may be one more of its peer."""
        if list(self._titles.values()).count(claim.title) >= claim.most:
            return False
        self._titles[connection] = claim.title
        return True

    def ended(self, connection: int) -> None:
        """Let go of what a connection held."""
        self._titles.pop(connection, None)

    def add(self, use: Use, now: float) -> Hold | None:
        """Count what was stored; return what workers have to be told."""
        used = self._used.setdefault(use.title, _Used())
        pause, refuse = self._pause(used, use, now), self._refuse(used, use, now)
        hold = Hold(use.title, pause, refuse, used.bytes)
        return hold if hold.pause > now or hold.refuse > now else None

    def _pause(self, used: _Used, use: Use, now: float) -> float:
        if not use.per_minute:
            return 0.0
        rate = use.per_minute / 60
        if used.limit != use.per_minute:
            used.limit, used.left, used.at = use.per_minute, float(use.per_minute), now
        used.left = min(float(use.per_minute), used.left + max(0.0, now - used.at) * rate) - use.objects
        # Who was far too fast over many associations owes a minute at most, not the rest of the day.
        used.left = max(-float(use.per_minute), used.left)
        used.at = now
        return now - used.left / rate if used.left < 0 else 0.0

    def _refuse(self, used: _Used, use: Use, now: float) -> float:
        today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        if used.day != today.isoformat():
            used.day, used.bytes = today.isoformat(), 0
        used.bytes += use.bytes
        over = use.per_day and used.bytes >= use.per_day
        return (today + timedelta(days=1)).timestamp() if over else 0.0


class Allowances:
    """A worker's end: asks the first process and keeps what it says. Safe to use from many threads."""

    def __init__(self, tell: Callable[[Message], None]) -> None:
        self._tell = tell
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._asked: dict[int, tuple[threading.Event, list[bool]]] = {}
        self._holds: dict[str, Hold] = {}

    def granted(self, connection: int, peer: Peer, seconds: float) -> bool:
        """Ask for an association of a peer; no answer in time is none."""
        if not peer.maximum_associations:
            return True
        answered, answers = threading.Event(), list[bool]()
        with self._lock:
            self._asked[connection] = answered, answers
        claim = Claim(peer.ae_title, peer.maximum_associations)
        self._tell(channel.with_content("claim", connection, claim))
        answered.wait(seconds)
        with self._lock:
            self._asked.pop(connection, None)
        return answers == [True]

    def answer(self, connection: int, granted: bool) -> None:
        """Take the first process's answer."""
        with self._lock:
            asked = self._asked.get(connection)
        if asked is not None:
            asked[1].append(granted)
            asked[0].set()

    def stop(self) -> None:
        """Let nobody wait any more."""
        self._stopping.set()

    def hold(self, hold: Hold) -> None:
        """Take what the first process said about a peer."""
        self._holds[hold.title] = hold

    def is_used_up(self, peer: Peer) -> bool:
        """Tell whether a peer's day is used up."""
        hold = self._holds.get(peer.ae_title)
        if hold is None or not peer.bytes_per_day:
            return False
        return hold.refuse > time.time() and hold.used >= peer.bytes_per_day

    def took(self, peer: Peer, size: int) -> None:
        """Count an object of so many bytes."""
        if peer.objects_per_minute or peer.bytes_per_day:
            use = Use(peer.ae_title, 1, size, peer.objects_per_minute, peer.bytes_per_day)
            self._tell(channel.with_content("used", 0, use))

    def pause(self, peer: Peer) -> None:
        """Wait before a response, if the peer is too fast and the server does not stop."""
        hold = self._holds.get(peer.ae_title) if peer.objects_per_minute else None
        if hold is not None and (left := hold.pause - time.time()) > 0:
            self._stopping.wait(min(left, _PAUSE_SECONDS))
