"""What a worker has to tell besides its log: events for the audit chain, and steps for somebody who tests a peer.

Events collect for some seconds and go to the vault as sealed files. They are bounded: the same refusal over and over is
one event with a count. A disk that refuses them stops nobody from storing; they stay here, and what is too much is
counted. Steps go, without waiting, to the socket of ``strongroom peer test``, if there is one.
Source: docs/format.md, section 2.4.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from storage import events
from storage.deposit import DepositError, PublishedKeys

TRACE = "peer-test"
# Events that wait at most; each takes at most a few hundred bytes, but for the studies of an association.
_LIMIT = 2000
_STUDIES_LIMIT = 200
# Refusals that are told apart between two flushes.
_KINDS = 200

log = logging.getLogger(__name__)


class Journal:
    """Events of one worker. Safe to use from many threads."""

    def __init__(self, incoming: Path, store_id: bytes, keys: PublishedKeys, trace: Path) -> None:
        """Prepare.

        Args:
            incoming: Where files of events go.
            store_id: 16 bytes.
            keys: Where the deposit key comes from.
            trace: Where the socket of a test is, while there is one.
        """
        self._incoming = incoming
        self._store_id = store_id
        self._keys = keys
        self._trace = str(trace)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._lock = threading.Lock()
        self._waiting: list[dict[str, Any]] = []
        self._refused: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._dropped = 0
        self._failing = False

    def step(self, connection: int, step: str, **fields: Any) -> None:
        """Tell a test, if one is under way, what just happened to a connection."""
        with contextlib.suppress(OSError):
            content = msgspec.json.encode({"connection": connection, "step": step, **fields})
            self._socket.sendto(content, self._trace)

    def event(self, kind: str, **fields: Any) -> None:
        """Keep an event for the audit chain."""
        with self._lock:
            self._keep({"time": _now(), "type": kind, **fields})

    def event_now(self, kind: str, **fields: Any) -> None:
        """Write an event at once, durably: it is the vault's when this returns.

        Raises:
            DepositError: No usable deposit key is published.
            OSError: The disk refused it.
        """
        content, _ = _batch([{"time": _now(), "type": kind, **fields}])
        events.deposit(self._incoming, self._store_id, self._keys, content)

    def refused(self, address: str, reason: str, calling: str = "", count: int = 1) -> None:
        """Keep that a connection was refused; alike ones become one event with a count."""
        host = address.rpartition(":")[0]
        # One step with the look for one alike: else a flush between them would leave a count that nobody writes.
        with self._lock:
            if len(self._refused) >= _KINDS and (host, reason, calling) not in self._refused:
                # Whoever asks under ever new names does not fill the chain with them.
                host, reason, calling = "", "many different refusals", ""
            known = self._refused.get((host, reason, calling))
            if known is not None:
                known["count"] += count
                known["last"] = _now()
                return
            entry = {
                "time": _now(),
                "type": "connection-refused",
                "address": host,
                "reason": reason,
                "calling": calling,
                "count": count,
            }
            if self._keep(entry):
                self._refused[host, reason, calling] = entry

    def flush(self) -> None:
        """Write what waits."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            dropped, self._dropped = self._dropped, 0
            self._refused.clear()
        try:
            while waiting:
                content, count = _batch(waiting)
                events.deposit(self._incoming, self._store_id, self._keys, content)
                del waiting[:count]
            if dropped:
                content, _ = _batch([{"time": _now(), "type": "events-dropped", "count": dropped}])
                events.deposit(self._incoming, self._store_id, self._keys, content)
            self._failing = False
        except (DepositError, OSError) as error:
            if not self._failing:
                log.error("events for the audit chain wait in memory: %s", error)
            self._failing = True
            with self._lock:
                self._waiting[:0] = waiting
                for entry in waiting:
                    if entry["type"] == "connection-refused":
                        self._refused.setdefault((entry["address"], entry["reason"], entry["calling"]), entry)
                self._dropped += dropped + max(0, len(self._waiting) - _LIMIT)
                del self._waiting[_LIMIT:]

    def _keep(self, entry: dict[str, Any]) -> bool:
        if len(self._waiting) >= _LIMIT:
            self._dropped += 1
            return False
        self._waiting.append(entry)
        return True


def studies(stored: dict[str, int]) -> dict[str, int]:
    """Return the studies of an association with the number of their objects, as many as an event may name."""
    return dict(list(stored.items())[:_STUDIES_LIMIT])


def _batch(waiting: list[dict[str, Any]]) -> tuple[bytes, int]:
    """Return as many events as fit a file, and how many they are."""
    size, parts = 2, list[bytes]()
    for entry in waiting:
        encoded = msgspec.json.encode(entry)
        if parts and size + len(encoded) + 1 > events.CONTENT_LIMIT:
            break
        parts.append(encoded)
        size += len(encoded) + 1
    return b"[" + b",".join(parts) + b"]", len(parts)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
