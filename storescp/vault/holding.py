"""Holds as the ledger keeps them: who placed which, why, and who released it. A hold wins over every way of deleting.

Each is in the audit chain, too. SQLCipher does not notice when somebody puts an older page of the ledger back, so the
two are compared before anything is erased, and what the ledger lost is put back. A chain that was begun anew is told
all holds that there are.
Source: docs/holds.md.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from keys.anchors import AnchorError
from keys.keyring import KeyringError
from keys.seal import SealError
from storage import audit
from storage.attributes import AttributesError
from storage.audit import AuditError
from storage.holds import Holds
from storage.pack import PackError
from storage.packfile import PackFile, Record
from storage.records import Records
from storescp import clock
from storescp.errors import NOTHING, StrongroomError
from storescp.vault.examine import open_pack
from storescp.vault.opened import Open
from storescp.vault.state import Vault

ACTIVE, RELEASED = "active", "released"
_PLACED, _RELEASED = "hold-placed", "hold-released"

log = logging.getLogger(__name__)


class Hold(msgspec.Struct):
    """What must not be erased: a study, or a patient's studies (``issuer`` is empty for any); times are RFC 3339."""

    id: str
    reason: str
    reference: str
    uid: int
    placed: str
    study: str = ""
    patient_id: str = ""
    issuer: str = ""
    released: str = ""
    released_by: int = -1
    release_reason: str = ""


class _Reconciled(msgspec.Struct):
    """Up to which audit record holds were compared, and which there were then: SHA-256 over their ids, in hex.

    ``hash`` is that record's, in hex: a chain that was begun anew has another one there, or none.
    """

    number: int
    digest: str
    hash: str = ""


class Holding:
    """The holds of a vault."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def place(self, uid: int, asked: Hold) -> Hold:
        """Place a hold; its id, time and owner are filled in.

        Raises:
            StrongroomError: It names nothing or has no reason, the study is being erased, or it cannot be recorded.
        """
        if bool(asked.study) == bool(asked.patient_id.strip()):
            raise StrongroomError("a hold is on a study or on a patient")
        if not asked.reason.strip():
            raise StrongroomError("a hold needs a reason")
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            if asked.study and open_.is_being_erased(asked.study):
                raise StrongroomError(f"study {asked.study} is being erased: nothing of it is left to hold")
            if asked.patient_id and open_.ledger.erasures("begun"):
                # Its patient is known no more: whether it is this one cannot be told.
                raise StrongroomError(
                    "an erasure is under way, perhaps of this patient: the hold would not stop it",
                    hint="hold the patient's studies by --study now, and place this when the erasure is done",
                )
            made = msgspec.structs.replace(asked, id=secrets.token_hex(6), uid=uid, placed=clock.now())
            self._vault.auditor.record(_PLACED, uid=uid, hold=_said(made))
            _records(open_).put(made.id, made, ACTIVE)
            return made

    def release(self, uid: int, hold_id: str, reason: str) -> Hold:
        """Release a hold.

        Raises:
            StrongroomError: There is none, it is released, or there is no reason.
        """
        if not reason.strip():
            raise StrongroomError("a release needs a reason")
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            hold = self.get(open_, hold_id)
            self._vault.auditor.record(_RELEASED, uid=uid, id=hold.id, reason=reason)
            hold.released, hold.released_by, hold.release_reason = clock.now(), uid, reason
            _records(open_).put(hold.id, hold, RELEASED)
            return hold

    def get(self, open_: Open, hold_id: str) -> Hold:
        """Return a hold that is not released.

        Raises:
            StrongroomError: There is none.
        """
        hold = _records(open_).get(hold_id)
        if hold is None or hold.released:
            raise StrongroomError(f"there is no hold {hold_id}", hint="'strongroom hold list'", status=NOTHING)
        return hold

    def listed(self, *, released: bool = False) -> list[Hold]:
        """Return the holds; also those that were released, where wanted."""
        with self._vault.admitting():
            return list(_records(self._vault.unlocked()).all(None if released else ACTIVE))

    # --- against the audit chain

    def reconcile(self) -> int:
        """Compare the ledger's holds with the audit chain, and put back what the ledger lost; return how many that was.

        Raises:
            StrongroomError: The chain cannot be read: nothing is proved.
        """
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            kept = open_.ledger.records("reconciled", _Reconciled)
            before = kept.get("holds") or _Reconciled(0, _digest([]))
            try:
                anew = before.number > 0 and self._hash(before.number) != before.hash
                placed, gone, last = self._told(0 if anew else before.number)
                active = {hold.id for hold in _records(open_).all(ACTIVE)}
                same = _digest((active - placed.keys()) | (gone - placed.keys())) == before.digest
                if not (same and placed.keys() - gone <= active and not gone & active):
                    # Somebody changed the ledger behind its back, or a crash fell between the two: all from the start.
                    placed, gone, last = self._told(0)
                    for folder in sorted(self._vault.config.store_path.glob("audit-*")):
                        self._told_aside(folder, placed, gone)
            except (AuditError, OSError, msgspec.MsgspecError) as error:
                raise StrongroomError(
                    f"holds cannot be compared with the audit chain: {error}",
                    hint="'strongroom audit verify' says more",
                ) from error
            # What the ledger says was released was: a chain that is put aside may be broken before that record.
            known = {hold.id for hold in _records(open_).all()}
            lost = [hold for hold in placed.values() if hold.id not in gone | known]
            for hold in lost:
                log.error("hold %s is in the audit chain and was not in the ledger: it is put back", hold.id)
            if lost:
                self._vault.auditor.tell("holds-put-back", ids=[hold.id for hold in lost])
                _records(open_).put_all((hold.id, hold, ACTIVE) for hold in lost)
            # A release that was recorded and then cut off by a crash.
            for hold in [h for h in _records(open_).all(ACTIVE) if h.id in gone]:
                hold.released = hold.released or clock.now()
                _records(open_).put(hold.id, hold, RELEASED)
            if anew:
                last = self.tell_again()
            now = _digest(hold.id for hold in _records(open_).all(ACTIVE))
            kept.put("holds", _Reconciled(last, now, self._hash(last)))
            return len(lost)

    def tell_again(self) -> int:
        """Tell a chain that was begun anew which holds there are; return its last record. Nothing while locked.

        Raises:
            StrongroomError: It cannot be recorded.
        """
        with self._vault.admitting() as open_:
            for hold in _records(open_).all(ACTIVE) if open_ else ():
                self._vault.auditor.record(_PLACED, hold=_said(hold), again=True)
            with self._vault.auditor.standing() as last:
                return last

    def _hash(self, number: int) -> str:
        found = audit.hash_of(self._vault.config.store_path / "audit", number) if number else None
        return found.hex() if found else ""

    def _told(self, after: int) -> tuple[dict[str, Hold], set[str], int]:
        """Return the holds that the chain says were placed and released behind a record, and its last record."""
        placed: dict[str, Hold] = {}
        gone: set[str] = set()
        with self._vault.auditor.standing() as last:
            pass
        for record in self._vault.auditor.read(after):
            _take(record, placed, gone)
            last = max(last, int(record["number"]))
        return placed, gone, last

    def _told_aside(self, folder: Path, placed: dict[str, Hold], gone: set[str]) -> None:
        """Add what a chain says that was put aside, as far as it can be read."""
        store_id = bytes.fromhex(self._vault.unlocked().ring.header.store_id)
        try:
            for entry in audit.read(folder, store_id, self._vault.auditor.opens):
                _take(msgspec.json.decode(entry.content), placed, gone)
        except (AuditError, OSError, msgspec.MsgspecError) as error:
            log.warning("holds in %s: %s", folder.name, error)


def _take(record: dict[str, Any], placed: dict[str, Hold], gone: set[str]) -> None:
    if record["type"] == _PLACED:
        hold = msgspec.convert(record["hold"], Hold)
        placed[hold.id] = hold
    elif record["type"] == _RELEASED:
        gone.add(str(record["id"]))


def current(open_: Open) -> Holds:
    """Return what is held now."""
    active = list(_records(open_).all(ACTIVE))
    return Holds(
        [hold.study for hold in active if hold.study],
        [(hold.patient_id, hold.issuer) for hold in active if hold.patient_id],
    )


def held(open_: Open, study: str, holds: Holds | None = None) -> str:
    """Return which hold a study is under, in words; empty for none.

    What of it is in quarantine may be about another patient than the study is known to be, or all of it may be there:
    a hold on that patient counts, too. ``holds`` are the current ones, if they are at hand.
    """
    holds = holds or current(open_)
    said = holds.on(study, *open_.index.patient_of(study))
    return said or next((found for who in _quarantined(open_, study) if (found := holds.on(study, *who))), "")


def _quarantined(open_: Open, study: str) -> Iterator[tuple[str, str]]:
    """Yield Patient ID and issuer of each instance of a study that is in a quarantined pack and opens."""
    for pack_id in open_.index.packs_of(study):
        if open_.index.place_of(pack_id) != "quarantine":
            continue
        try:
            with PackFile(open_.archive.quarantine_path(pack_id)) as file:
                pack = open_pack(file, open_.ring, open_.keys_db.find(pack_id))
                for found in pack.records(whole=False):
                    if isinstance(found, Record):
                        yield found.attributes.text("00100020"), found.attributes.text("00100021")
        except (OSError, PackError, SealError, AttributesError, KeyringError, AnchorError) as error:
            log.error("quarantined pack %s does not say whom it is about: %s", pack_id, error)


def _records(open_: Open) -> Records[Hold]:
    return open_.ledger.records("hold", Hold)


def _said(hold: Hold) -> dict[str, Any]:
    return dict(msgspec.structs.asdict(hold))


def _digest(ids: Any) -> str:
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
