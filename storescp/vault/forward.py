"""Audit messages for elsewhere: the vault makes them from the chain, in order, and leaves them sealed in a spool.

The chain is the queue: it is durable, ordered and complete, so that the spool may be small. Where the spool is full or
nobody takes what is in it, the vault stops making messages and goes on later, at the record where it stopped; nothing
else waits for that. A batch is noted in the ledger before its file is written, with what was known before and after
it: whatever crashes, no number is given to two messages, and no record is left out.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from keys import encoding
from keys.forwarding import Recipient
from keys.keyring import KeyringError
from keys.seal import SealError
from keys.versions import store_id_of
from storage.auditlines import AuditError, Head, Record, place
from storage.audittail import Tail
from storage.ledger import Ledger
from storage.sqlite import DatabaseError
from storescp import auditevents, auditmessage, auditspool, clock
from storescp.auditevents import Known, Source, Stored, Study
from storescp.auditspool import Message
from storescp.vault.forwardstate import STATE, Batch, State, Whose, batches, erasures, states
from storescp.vault.opened import Open
from storescp.vault.state import Vault

# What a turn may take, and how long after it the next one is: who asks something of the vault waits meanwhile.
_TURN_SECONDS, _EVERY_SECONDS = 0.2, 1.0
_BATCH = 500
# Files that wait at most: small ones are many after a long outage.
_FILES = 1000
_LOOK_SECONDS = 60.0
_UNSENT_SECONDS = 900.0
# How long a message waits until the vault knows whose the instances are, and which were held already.
_OPEN_SECONDS, _BACKLOG_SECONDS = 120.0, 3600.0
_GONE_LIMIT = 100_000

log = logging.getLogger(__name__)


class Forward:
    """Makes messages of a vault's chain. Called again and again by the vault's loop."""

    def __init__(self, vault: Vault, now: Callable[[], float] = time.time, every: float = _EVERY_SECONDS) -> None:
        self._vault = vault
        self._now = now
        self._every = every
        self._turned = -every
        config = vault.config
        self._on = bool(config.settings.audit.forward)
        self._out, self._peer = config.audit_out, config.audit_forwarder
        self._store_id = store_id_of(config.signing_key)
        self._source = Source(self._store_id.hex(), config.settings.gate.ae_title, socket.gethostname())
        self._opened: Open | None = None
        self._ledger: Ledger | None = None
        self._state = State()
        self._tail: Tail | None = None
        self._held: list[Record] = []
        self._looked: float | None = None
        self._said = ""
        self._locked_told = False

    def turn(self) -> None:
        """Take what was delivered out of the spool, and put in what is new. Nothing that fails here stops the vault."""
        if not self._on or time.monotonic() - self._turned < self._every:
            return
        try:
            with self._vault.admitting() as opened:
                self._turn(opened)
            self._said = ""
        except (AuditError, DatabaseError, SealError, KeyringError, OSError, ValueError) as error:
            # From the last state that is in the ledger.
            self._opened = None
            if str(error) != self._said:
                log.error("audit messages wait: %s", error)
            self._said = str(error)
        except Exception as error:
            self._opened = None
            if self._said != type(error).__name__:
                log.exception("audit messages cannot be made")
            self._said = type(error).__name__
        self._turned = time.monotonic()

    def _turn(self, opened: Open | None) -> None:
        if opened is None:
            self._opened, self._tail = None, None
            if not self._locked_told:
                self._folder()
                auditspool.tell_locked(self._out, clock.text_of(self._vault.locked_since))
                self._locked_told = True
            return
        self._folder()
        # Also one that an earlier process left.
        (self._out / auditspool.LOCKED).unlink(missing_ok=True)
        self._locked_told = False
        recipient = auditspool.recipient(self._peer)
        delivered = auditspool.acknowledged(self._peer)
        if opened is not self._opened or opened.ledger is not self._ledger:
            self._begin(opened, delivered)
        self._clean(opened, delivered)
        if self._looked is None or self._now() - self._looked >= _LOOK_SECONDS:
            self._looked = self._now()
            self._look(opened, delivered)
        if recipient is None:
            raise ValueError("no forwarder was started yet: 'strongroom audit-forwarder', or 'serve', makes its key")
        self._sealed_to(opened, recipient)
        if self._has_room():
            self._make(opened, recipient)

    def _folder(self) -> None:
        if not self._out.exists():
            self._out.mkdir(mode=0o750, exist_ok=True)
            encoding.sync_folder(self._out.parent)

    # --- where it stands

    def _begin(self, opened: Open, delivered: int) -> None:
        """Go on where the ledger says; a batch counts if its file was written."""
        state = states(opened).get(STATE) or State()
        there = {path.name for _, _, path in auditspool.files(self._out)}
        for batch in list(batches(opened).all()):
            if batch.name in there or batch.after.seq <= delivered:
                state = batch.after if batch.after.seq > state.seq else state
            else:
                # Its file was not written, or somebody removed it: from here on all is made again.
                state = self._rewind(opened, batch)
                break
        # A ledger from a backup does not know what was delivered since: numbers are given once.
        state.seq = max(state.seq, delivered)
        known = {batch.name for batch in batches(opened).all()}
        for name in there - known:
            (self._out / name).unlink(missing_ok=True)
        self._ledger = opened.ledger
        self._opened, self._state = opened, state
        self._find()

    def _rewind(self, opened: Open, batch: Batch) -> State:
        later = [b.name for b in batches(opened).all() if b.before.seq >= batch.before.seq]
        for name in later:
            (self._out / name).unlink(missing_ok=True)
        batches(opened).remove(*later)
        states(opened).put(STATE, batch.before)
        return batch.before

    def _find(self) -> None:
        state = self._state
        after = Head(state.number, bytes.fromhex(state.hash))
        self._tail = Tail(self._vault.config.store_path / "audit", self._store_id, after)
        self._held = []
        if state.number and not self._tail.head.number:
            log.warning("the audit chain was begun anew: its messages are, too")
            state.number, state.hash, state.head, state.gone = 0, "", 0, []

    def _sealed_to(self, opened: Open, recipient: Recipient) -> None:
        state = self._state
        if state.recipient and state.recipient != recipient.id:
            self._vault.auditor.tell("forwarder-key-changed", before=state.recipient, after=recipient.id)
            log.warning("the forwarder has another key: what waits is sealed anew")
            if first := next(iter(batches(opened).all()), None):
                self._state = state = self._rewind(opened, first)
                self._find()
        state.recipient = recipient.id

    def _clean(self, opened: Open, delivered: int) -> None:
        done = [batch.name for batch in batches(opened).all() if batch.after.seq <= min(delivered, self._state.seq)]
        for name in done:
            (self._out / name).unlink(missing_ok=True)
        if done:
            batches(opened).remove(*done)

    def _has_room(self) -> bool:
        waiting = auditspool.files(self._out)
        size = sum(path.stat().st_size for _, _, path in waiting)
        limit = self._vault.config.settings.audit.waiting_bytes
        return len(waiting) < _FILES and size + auditspool.FILE_BYTES <= limit

    # --- making

    def _make(self, opened: Open, recipient: Recipient) -> None:
        state = msgspec.json.decode(msgspec.json.encode(self._state), type=State)
        made: list[Message] = []
        until, size = time.monotonic() + _TURN_SECONDS, 0
        for record in self._records():
            content = self._content(record, state)
            if content is not None and not self._settled(opened, content):
                self._held = [record]
                break
            self._held = []
            for message in self._messages(opened, record.number, content, state) if content is not None else ():
                made.append(_spooled(message, record.number, state))
                size += len(made[-1].xml)
            state.number, state.hash = record.number, record.hash.hex()
            if len(made) >= _BATCH or size >= auditspool.FILE_BYTES // 2 or time.monotonic() > until:
                break
        made += self._head(state)
        if made:
            self._write(opened, recipient, made, state)
        elif state.number != self._state.number:
            self._keep(opened, state)

    def _records(self) -> Iterator[Record]:
        last = self._vault.auditor.head
        if last is None or self._tail is None:
            return
        if last.number < self._state.number:
            self._find()
        yield from self._held
        yield from self._tail.records(last.number)

    def _content(self, record: Record, state: State) -> dict[str, Any] | None:
        """Return what a record says, None where it says nothing now: each is told once, when it can be read first."""
        sealed_at = place(self._store_id, record.before)
        content: dict[str, Any] = msgspec.json.decode(self._vault.auditor.opens(record.key, record.sealed, sealed_at))
        match content["type"]:
            case "gone-with-its-version":
                state.gone = [*state.gone, record.number][-_GONE_LIMIT:]
                return None
            case "transcript":
                of = int(content["of"])
                if of not in state.gone:
                    return None
                state.gone.remove(of)
                return dict(content["record"])
        return content

    def _messages(
        self, opened: Open, number: int, content: dict[str, Any], state: State
    ) -> Iterator[auditmessage.AuditMessage]:
        kind, told = content["type"], str(content["time"])
        known = Known(
            lambda study: _whose(opened, state, study),
            lambda association, study, count: self._stored(opened, association, study, count, _seconds(told)),
            lambda erasure: _erasure(state, erasure),
        )
        if kind == "erase-begun":
            study, erasure = str(content["study"]), str(content["erasure"])
            whose = erasures(opened).get(erasure) or Whose(erasure, study, *opened.index.patient_of(study))
            state.erasures[erasure] = [study, whose.patient, whose.issuer]
        yield from auditevents.messages(content, number, self._source, known)
        if kind == "erased":
            state.erasures.pop(str(content["erasure"]), None)
        if kind == "vault-started":
            configuration = str(content.get("configuration", ""))
            if state.configuration not in {"", configuration}:
                changed = {**content, "type": "configuration-changed", "before": state.configuration}
                yield from auditevents.messages(changed, number, self._source, known)
            state.configuration = configuration

    def _stored(self, opened: Open, association: str, study: str, count: int, taken: float) -> Stored:
        found = opened.index.stored_by(association, study)
        missing = max(0, count - sum(found.values()))
        if not missing:
            return Stored(found, 0)
        if _backlog(opened, taken):
            # Waited for long enough: what nobody looked at may be new.
            return Stored({**found, "not-looked-at": missing}, 0)
        if opened.index.patient_of(study) == ("", "") and not found:
            # Erased since, or never admitted: nobody can tell any more.
            return Stored({"not-here": missing}, 0)
        return Stored(found, missing)

    def _settled(self, opened: Open, content: dict[str, Any]) -> bool:
        """Tell whether everything is admitted that the gate's events are about, or was waited for long enough."""
        if content["type"] != "gate-events":
            return True
        if opened.admission.filling() is not None:
            return False
        stored = [
            (str(event.get("association", "")), study, auditevents.counted(count))
            for event in content["events"]
            if event["type"] == "association-ended"
            for study, count in auditevents.named_studies(event).items()
        ]
        if all(_admitted(opened, association, study) >= count for association, study, count in stored):
            return True
        taken = _seconds(str(content["time"]))
        waited = self._now() - taken
        if not _waiting(opened):
            return True
        return waited > (_BACKLOG_SECONDS if _backlog(opened, taken) else _OPEN_SECONDS)

    def _head(self, state: State) -> list[Message]:
        """Return a signed head, if it is time for one and the chain went on."""
        checkpoint = self._tail.checkpoint if self._tail else None
        due = self._now() - state.head_time >= self._vault.config.settings.audit.head_after().total_seconds()
        if checkpoint is None or checkpoint.number <= state.head or not (due or state.head_time > self._now()):
            return []
        state.head, state.head_time = checkpoint.number, self._now()
        made = auditevents.head(checkpoint.number, checkpoint.hash, checkpoint.time, checkpoint.signature, self._source)
        head = f"{checkpoint.number}:{checkpoint.hash.hex()}"
        return [msgspec.structs.replace(_spooled(made, checkpoint.number, state), head=head)]

    def _write(self, opened: Open, recipient: Recipient, made: list[Message], state: State) -> None:
        name = auditspool.name_of(made[0].seq, made[-1].seq)
        batches(opened).put(name, Batch(name, self._state, state))
        sealed = recipient.seal(auditspool.encoded(made), self._store_id, name)
        encoding.replace(self._out / name, sealed, 0o640)
        self._keep(opened, state)

    def _keep(self, opened: Open, state: State) -> None:
        states(opened).put(STATE, state)
        self._state = state

    # --- what is wrong

    def _look(self, opened: Open, delivered: int) -> None:
        """Say what waits too long; put alerts that came or went into the chain, so that they are told elsewhere."""
        alerts, state = self._vault.alerts, self._state
        last = self._vault.auditor.head
        if last is not None and last.number == state.number and erasures(opened).count():
            # The state has what goes on; what is done nobody needs any more.
            erasures(opened).remove(*[whose.erasure for whose in erasures(opened).all()])
        waiting = auditspool.files(self._out)
        late = [path for _, _, path in waiting if self._now() - path.stat().st_mtime > _UNSENT_SECONDS]
        if late or not (self._peer / auditspool.PUBLIC).exists():
            alerts.raise_("audit-unsent", count=state.seq - delivered)
        else:
            alerts.resolve("audit-unsent")
        standing = {alert.name: alert for alert in alerts.standing()}
        for name, alert in standing.items():
            if name not in state.alerts:
                self._vault.auditor.tell("alert-raised", alert=alert.kind, what=alert.what, reason=alert.text)
                state.alerts[name] = [alert.kind, alert.what]
        for name in state.alerts.keys() - standing.keys():
            kind, what = state.alerts.pop(name)
            self._vault.auditor.tell("alert-resolved", alert=kind, what=what)
        self._keep(opened, state)


def _spooled(message: auditmessage.AuditMessage, number: int, state: State) -> Message:
    state.seq += 1
    return Message(state.seq, number, message.time, message.outcome, auditmessage.encode(message).decode())


def _whose(opened: Open, state: State, study: str) -> Study:
    """Return whose a study is; the index does not know it any more of one that is being erased."""
    kept = next((whose for named, *whose in state.erasures.values() if named == study), None)
    return Study(*(kept or opened.index.patient_of(study)))


def _erasure(state: State, erasure: str) -> tuple[str, Study]:
    study, patient, issuer = state.erasures.get(erasure, ["", "", ""])
    return study, Study(patient, issuer)


def _admitted(opened: Open, association: str, study: str) -> int:
    found = opened.index.stored_by(association, study)
    return sum(found.values()) - found.get("waiting", 0)


def _backlog(opened: Open, taken: float) -> bool:
    """Tell whether a deposit waits for admission that was last written to before a time."""
    return any(written <= taken for written in _waiting(opened))


def _waiting(opened: Open) -> list[float]:
    """Return when each deposit was last written to; a folder of that name stays for ever, and is none."""
    times = []
    for path in opened.archive.deposits():
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                times.append(found.st_mtime)
    return times


def _seconds(text: str) -> float:
    """Return seconds since 1970 of a record's time."""
    return clock.parse(re.sub(r"\.[0-9]+Z$", "Z", text)).timestamp()
