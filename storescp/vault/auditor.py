"""The vault's hand in the audit chain: its own acts, those of admins, and what the gate's events say.

An act that cannot be recorded is not done; receiving and admission go on without the chain. Records are JSON objects
with ``time`` and ``type``; docs/admin.md lists the types.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from keys import encoding
from keys.keyring import Keyring
from keys.seal import SealError, open_sealed, seal
from keys.versions import store_id_of
from storage import audit
from storage.audit import AuditError, Chain
from storage.deposit import DepositError, PublishedKeys
from storage.ledger import CertificateUse, Head, Ledger
from storage.sqlite import DatabaseError
from storescp import __version__
from storescp.config import Config
from storescp.errors import StrongroomError
from storescp.vault.gateevents import GateEvents

_KEY = "audit"
_DEPOSIT = "deposit-"
_GONE = "gone-with-its-version"
_QUIET_SECONDS = 10.0
# A record leaves room for what a transcript puts around it.
_RECORD_LIMIT = audit.RECORD_LIMIT - (1 << 10)
log = logging.getLogger(__name__)


class _Export:
    def __init__(self, whom: dict[str, Any]) -> None:
        self.whom = whom
        self.count = 0
        self.last = time.monotonic()


class Auditor:
    """The audit chain of a vault, locked or unlocked. Safe to use from many threads."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._folder = config.store_path / "audit"
        self._store_id = store_id_of(config.signing_key)
        self._published = PublishedKeys(config.public, config.signing_key)
        self._lock = threading.RLock()
        self._ring: Keyring | None = None
        self._ledger: Ledger | None = None
        self._exports: dict[tuple[int, str], _Export] = {}
        self._gate = GateEvents(self._store_id, self, restricted=config.desk_incoming)
        self._chain: Chain | None = None
        # Who has to see an act before it is done; set once, by who knows it.
        self.before: Callable[[str, dict[str, Any]], None] = lambda _kind, _fields: None
        self.fault = ""
        self._open()

    def _open(self) -> None:
        try:
            self._chain = Chain(self._folder, self._store_id, self._config.signing_key)
            self.fault = ""
        except (AuditError, OSError) as error:
            self.fault = str(error)
            log.error("nothing can be recorded, so that no admin's act is done: %s", error)

    def close(self) -> None:
        """Let go of the chain."""
        with self._lock:
            self.locked()
            if self._chain is not None:
                self._chain.close()

    # --- recording

    def record(self, kind: str, *, uid: int | None = None, **fields: Any) -> None:
        """Record an act, durably, before it is done.

        Raises:
            StrongroomError: It cannot be recorded.
        """
        self.before(kind, fields)
        by = {} if uid is None else {"uid": uid}
        self._append([{"time": _now(), "type": kind, **by, **fields}])

    def tell(self, kind: str, *, uid: int | None = None, **fields: Any) -> None:
        """Record what happened; where that cannot be, the log says so."""
        try:
            self.record(kind, uid=uid, **fields)
        except StrongroomError as error:
            log.error("%s is not recorded: %s", kind, error)

    def exporting(self, uid: int, study: str) -> None:
        """Record that somebody takes instances of a study out; the count follows when no more are asked for.

        Raises:
            StrongroomError: It cannot be recorded.
        """
        with self._lock:
            export = self._exports.get((uid, study))
            if export is None:
                self.record("export-begun", uid=uid, study=study)
                export = self._exports.setdefault((uid, study), _Export({}))
            export.count += 1
            export.last = time.monotonic()

    def sending(self, uid: int, study: str, **whom: Any) -> None:
        """Record for whom somebody is about to take a study out, by his own word; what he then asks for counts to it.

        Raises:
            StrongroomError: It cannot be recorded.
        """
        with self._lock:
            self._ended(uid, study)
            self.record("export-begun", uid=uid, study=study, **whom)
            self._exports[uid, study] = _Export(whom)

    def flush(self, *, everything: bool = False) -> None:
        """Record exports that came to an end."""
        with self._lock:
            latest = time.monotonic() - _QUIET_SECONDS
            for (uid, study), export in list(self._exports.items()):
                if everything or export.last < latest:
                    self._ended(uid, study)

    def _ended(self, uid: int, study: str) -> None:
        export = self._exports.pop((uid, study), None)
        if export is not None:
            self.tell("exported", uid=uid, study=study, instances=export.count, **export.whom)

    def _append(self, records: list[dict[str, Any]]) -> None:
        contents = [_encoded(record) for record in records]
        with self._lock:
            if self._chain is None:
                raise StrongroomError(
                    f"this cannot be recorded, so it is not done: {self.fault}",
                    hint="'strongroom audit verify' says more; 'strongroom audit restart' begins a new chain",
                )
            try:
                if self._ring is None:
                    deposit_key = self._published.current()
                    self._chain.append(contents, f"{_DEPOSIT}{deposit_key.version}", deposit_key.seal_record)
                else:
                    key = self._ring.body.audit_key
                    self._chain.append(
                        contents,
                        _KEY,
                        lambda content, place: seal(content, key, place),
                        signing=self._ring.signing,
                        time=_now()[:19] + "Z",
                    )
                self.fault = ""
            except (AuditError, DepositError, OSError) as error:
                # Status warns until something is recorded again.
                self.fault = str(error)
                raise StrongroomError(
                    f"this cannot be recorded in the audit chain, so it is not done: {error}",
                    hint="make room on the store's disk; 'strongroom audit verify' says whether the chain is whole",
                ) from error

    # --- lock and unlock

    def unlocked(self, ring: Keyring, ledger: Ledger) -> None:
        """Take the keys; check that the chain came through what the ledger knows of it; copy what was recorded locked.

        Raises:
            StrongroomError: Nothing can be recorded.
        """
        with self._lock:
            known = ledger.audit_head() or Head(0, b"", 0)
            self._ring, self._ledger = ring, ledger
            after = known.transcribed
            copies: dict[int, dict[str, Any]] = {}
            try:
                if known.number and audit.hash_of(self._folder, known.number) != known.hash:
                    said = f"record {known.number} of the audit chain is gone, or another than the ledger knows"
                    log.error("%s: somebody changed or cut the chain", said)
                    self.tell("audit-broken", fault=said)
                    after = 0
                for entry in audit.read(self._folder, self._store_id, self.opens, after=after):
                    content = _decoded(entry)
                    if content.get("type") == _GONE:
                        continue
                    if entry.key.startswith(_DEPOSIT):
                        copies[entry.number] = {
                            "time": _now(),
                            "type": "transcript",
                            "of": entry.number,
                            "record": content,
                        }
                    elif content.get("type") == "transcript":
                        copies.pop(int(content["of"]), None)
                    elif content.get("type") in {"gate-events", "events-refused"}:
                        self._gate.known(str(content.get("file")))
            except (AuditError, OSError) as error:
                log.error("the audit chain: %s", error)
                self.tell("audit-broken", fault=str(error))
            if copies:
                self._append(list(copies.values()))
            self._keep_head()

    def locked(self, *, uid: int | None = None) -> None:
        """Forget the keys."""
        with self._lock:
            self.flush(everything=True)
            if self._ring is not None:
                self.tell("locked", uid=uid)
                self._keep_head()
            ledger, self._ledger = self._ledger, None
            self._ring = None
            if ledger is not None:
                ledger.close()

    def use_ledger(self, ledger: Ledger) -> None:
        """Go on with another connection to the ledger: it has another file since a rotation."""
        with self._lock:
            before, self._ledger = self._ledger, ledger
            if before is not None:
                before.close()

    def opens(self, key: str, sealed: bytes, place: bytes) -> bytes:
        """Return a record; of one that a destroyed version sealed, that it is gone: its transcript has the content.

        Raises:
            SealError: It does not open.
            KeyringError: Its key version is not in the keyring.
        """
        ring = self._ring
        if ring is None:
            raise SealError("the vault is locked")
        if key == _KEY:
            return open_sealed(sealed, ring.body.audit_key, place)
        number = int(key.removeprefix(_DEPOSIT))
        if any(record.version == number and record.state == "destroyed" for record in ring.body.versions):
            return encoding.canonical({"time": "", "type": _GONE, "version": number})
        return ring.version(number).open_record(sealed, place)

    def _keep_head(self) -> None:
        if self._ledger is None or self._chain is None:
            return
        head = self._chain.head
        try:
            # All up to here was looked at, or was written by this vault with the audit key.
            self._ledger.set_audit_head(Head(head.number, head.hash, head.number))
        except DatabaseError as error:
            log.error("the head of the audit chain is not kept in the ledger: %s", error)

    # --- reading

    @contextlib.contextmanager
    def standing(self) -> Iterator[int]:
        """Let nobody append meanwhile; give the number of the last record."""
        with self._lock:
            yield self._chain.head.number if self._chain else 0

    @property
    def head(self) -> audit.Head | None:
        """The chain's last record, where there is a chain."""
        return self._chain.head if self._chain else None

    def read(self, after: int) -> Iterator[dict[str, Any]]:
        """Yield the records behind a number, each with its number.

        Raises:
            AuditError: The chain is broken, or a record does not open.
        """
        # What is being appended meanwhile may be there by half.
        head = self.head
        for entry in audit.read(self._folder, self._store_id, self.opens, after=after):
            if head is not None and entry.number > head.number:
                return
            yield {"number": entry.number, **_decoded(entry)}
            if head is not None and entry.number == head.number:
                return

    def restart(self, uid: int, reason: str) -> Path:
        """Put a broken chain aside and begin a new one, whose first record says so; return where the old one is.

        Raises:
            StrongroomError: It cannot be done.
        """
        with self._lock:
            head = self.head
            if self._chain is not None:
                self._chain.close()
                self._chain = None
            aside = self._folder.with_name(f"audit-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
            try:
                os.rename(self._folder, aside)
                encoding.sync_folder(aside.parent)
            except OSError as error:
                self._open()
                raise StrongroomError(f"the audit chain cannot be put aside: {error.strerror}") from error
            fault = self.fault
            self._open()
            old = {"number": head.number, "hash": head.hash.hex()} if head else None
            self.record("audit-restarted", uid=uid, reason=reason, fault=fault, old=old, folder=aside.name)
            self._keep_head()
            return aside

    # --- the gate

    def take(self, owners: Mapping[Path, int]) -> None:
        """Take the events of gate and desk into the chain, if unlocked; what cannot be recorded stays where it is."""
        with self._lock:
            if self._ring is None or self._ledger is None or self._chain is None:
                return
            if self._gate.take(self._ring, self._ledger, owners):
                self._keep_head()

    def certificate_uses(self) -> list[CertificateUse]:
        """Return when each certificate was last used; nothing while locked."""
        with self._lock:
            return self._ledger.certificate_uses() if self._ledger else []

    def started(self) -> None:
        """Record that a vault began to run, which release, and on which configuration."""
        digest = hashlib.sha256(self._config.file.read_bytes()).hexdigest()
        self.tell("vault-started", release=__version__, configuration=digest)


def _encoded(record: dict[str, Any]) -> bytes:
    content = encoding.canonical(record)
    if len(content) > _RECORD_LIMIT:
        raise StrongroomError(f"a record of {len(content)} bytes is too long for the audit chain: nothing was done")
    return content


def _decoded(entry: audit.Entry) -> dict[str, Any]:
    try:
        content = msgspec.json.decode(entry.content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        content = None
    if not isinstance(content, dict) or not {"time", "type"} <= content.keys():
        raise AuditError(f"record {entry.number} is none that a vault writes")
    return content


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
