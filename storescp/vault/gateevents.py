"""Events of gate and desk on their way into the audit chain, and what the ledger keeps of them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from keys import encoding
from keys.anchors import AnchorError
from keys.keyring import Keyring, KeyringError, UnknownVersionError
from storage import audit, events
from storage.attributes import is_uid
from storage.events import EventsError
from storage.ledger import CertificateUse, Ledger
from storage.sqlite import DatabaseError
from storescp.errors import StrongroomError
from storescp.log import escape
from storescp.vault.commitmentrecords import Requested, keep

_SHORT = 128
# A record leaves room for what stands around them, and for what a transcript puts around it.
_LIMIT = audit.RECORD_LIMIT - (2 << 10)
# Of one request of storage commitment, in events.
_PARTS_LIMIT = 100
# How long events may be taken at a time: whoever asks something of the vault waits meanwhile.
_TAKE_SECONDS = 1.0

# Requests that store are recorded as associations are.
_DESK_TYPES = {"association-begun", "association-ended", "events-dropped"}
# What an event may hold: no numbers whose text grows, and nothing that nests.
_Value = str | int | bool | None | dict[str, str | int] | list[str]

log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Who records, as the auditor does."""

    def record(self, kind: str, *, uid: int | None = None, **fields: Any) -> None:
        """Record an act, durably."""

    def tell(self, kind: str, *, uid: int | None = None, **fields: Any) -> None:
        """Record what happened, if that can be."""


class Event(msgspec.Struct):
    """What the vault itself reads of a gate's event; the rest goes into the chain as it is."""

    time: str
    type: str
    calling: str = ""
    address: str = ""
    certificate: str = ""
    peers: dict[str, str] = msgspec.field(default_factory=dict)
    transaction: str = ""
    part: int = 0
    parts: int = 0
    instances: list[str] = msgspec.field(default_factory=list)


class GateEvents:
    """Takes events out of the folders of deposits. Used by one thread at a time."""

    def __init__(self, store_id: bytes, recorder: Recorder, *, restricted: Path) -> None:
        """Prepare.

        Args:
            store_id: 16 bytes.
            recorder: Who records them.
            restricted: The desk's folder: what it may tell is what it stored.
        """
        self._restricted = restricted
        self._store_id = store_id
        self._recorder = recorder
        self._taken: set[str] = set()
        self._peer_files: dict[str, str] | None = None
        self._waiting = ""

    def known(self, name: str) -> None:
        """Hear of a file that the chain has already."""
        self._taken.add(name)

    def take(self, ring: Keyring, ledger: Ledger, owners: Mapping[Path, int]) -> bool:
        """Take events into the chain; what cannot be recorded stays where it is. Tell whether any were taken."""
        waiting, taken = "", False
        for folder, owner in owners.items():
            # Each by itself: who fills or closes one of them does not hold up the other.
            until = time.monotonic() + _TAKE_SECONDS
            try:
                for path in events.found(folder):
                    try:
                        self._take(path, ring, ledger, owner)
                        taken = True
                    except (OSError, KeyringError, AnchorError, DatabaseError) as error:
                        waiting = waiting or f"{_printable(path.name)}: {error}"
                    if time.monotonic() > until:
                        break
            except FileNotFoundError:
                # Whoever stores nothing by another way has no folder for it.
                if folder != self._restricted:
                    waiting = f"{folder.name} is missing"
            except (StrongroomError, OSError) as error:
                waiting = str(error)
        if waiting and waiting != self._waiting:
            log.error("the gate's events wait: %s", waiting)
        self._waiting = waiting
        return taken

    def _take(self, path: Path, ring: Keyring, ledger: Ledger, owner: int) -> None:
        name = _printable(path.name.removesuffix(events.SUFFIX))
        if name not in self._taken:
            try:
                found, told, peer_files = self._read(path, ring, owner)
            except (EventsError, UnknownVersionError) as error:
                log.error("events in %s are refused: %s", path.parent.name, error)
                self._recorder.record("events-refused", file=name, reason=str(error)[:_SHORT])
                self._taken.add(name)
            else:
                # First: until it is recorded, the file stays, and is taken again.
                self._commit(found, ledger)
                if told:
                    self._recorder.record("gate-events", file=name, events=told)
                # At once: whatever fails from here on, they are not recorded again.
                self._taken.add(name)
                self._peer_files = peer_files
                _used(found, ledger)
        try:
            path.unlink()
        except IsADirectoryError:
            # It stays where it is, and was told once.
            return
        self._taken.discard(name)

    def _read(
        self, path: Path, ring: Keyring, owner: int
    ) -> tuple[list[Event], list[dict[str, Any]], dict[str, str] | None]:
        """Return the events in a file; those that are recorded; which peer files the gate reads after them.

        Raises:
            EventsError: They are not what a gate writes.
        """
        content = events.read(path, self._store_id, ring.version, owner)
        try:
            found = msgspec.json.decode(content, type=list[Event])
            whole = msgspec.json.decode(content, type=list[dict[str, _Value]])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise EventsError(f"they are not what a gate writes: {error}") from error
        told: list[dict[str, Any]] = []
        peer_files = self._peer_files
        if path.parent == self._restricted and not {event.type for event in found} <= _DESK_TYPES:
            raise EventsError("they are not what a desk tells")
        for event, entry in zip(found, whole, strict=True):
            if event.type == "peers-read":
                told += _changed(peer_files, event, entry)
                peer_files = event.peers
            else:
                # Whom a request of commitment names is the ledger's to keep; the chain has how many.
                told.append(entry | {"instances": len(event.instances)} if event.instances else entry)
        if len(encoding.canonical(told)) > _LIMIT:
            raise EventsError("they are too many for a record")
        return found, told, peer_files

    def _commit(self, found: list[Event], ledger: Ledger) -> None:
        asked = [
            Requested(e.calling[:_SHORT], e.transaction[:_SHORT], e.part, e.parts, e.instances)
            for e in found
            if e.type == "commitment-requested" and is_uid(e.transaction) and 0 <= e.part < e.parts <= _PARTS_LIMIT
        ]
        for calling in sorted({part.calling for part in keep(ledger, asked, time.time())}):
            log.error("too many requests of storage commitment of %s wait: the latest are let go", _printable(calling))
            self._recorder.tell("commitment-dropped", peer=calling)


def _used(found: list[Event], ledger: Ledger) -> None:
    uses = [
        CertificateUse(e.certificate[:_SHORT], e.calling[:_SHORT], e.address[:_SHORT], e.time[:_SHORT])
        for e in found
        if e.type == "association-begun" and e.certificate
    ]
    if uses:
        try:
            ledger.used(uses)
        except DatabaseError as error:
            log.error("when certificates were used is not kept in the ledger: %s", error)


def _changed(before: dict[str, str] | None, event: Event, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is recorded of peer files that were read: all at first, then only what changed."""
    if before is None:
        return [entry]
    after = event.peers
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if not changed:
        return []
    return [{"time": event.time, "type": "peers-changed", "files": {name: after.get(name) for name in changed}}]


def _printable(name: str) -> str:
    """Return a file's name, whatever its bytes are, as text that can be recorded, and short."""
    return escape(os.fsencode(name).decode("utf-8", "backslashreplace"))[:_SHORT]
