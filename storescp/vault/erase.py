"""Erasure: a study's keys destroyed, its packs and rows removed, a tombstone and a certificate left.

In this order, each step repeatable: the intent is recorded; gates are told to let the study's open packs go, which are
put aside so that nobody admits them; key records are deleted; packs are unlinked; rows are dropped; what a gate still
writes is unlinked as soon as it is let go. What arrives in another pack from then on is a new study. The erasure is
final when every key version that could have wrapped a key of the study is destroyed: by a rotation begun later.
Source: docs/design.md, "Erasure"; docs/format.md, section 10.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from keys import encoding, signed
from keys.keyring import VersionRecord
from keys.signed import SignedError
from storage.deposit import FENCE
from storage.ledger import Erasure
from storage.sqlite import DatabaseError
from storescp import clock
from storescp.config import Config
from storescp.errors import NOTHING, StrongroomError, plural
from storescp.vault import holding
from storescp.vault.filing import study_tag
from storescp.vault.opened import Open
from storescp.vault.recovery import opens
from storescp.vault.state import Vault

LABEL = "certificate"
# How long to wait for objects that a gate is receiving into packs of the study.
_FENCE_SECONDS = 60.0
_POLL_SECONDS = 0.5
_BACKUP = "a backup is being made, which names the study's packs"
# A deposit under this name is no pack to anybody: neither admitted nor listed. The gate that writes it has it open.
_PUT_ASIDE = ".erasing"
# What a certificate does not speak of; each is said in it.
_NOT_COVERED = (
    "records of the audit chain, which name the study",
    "instances that were exported earlier, and what the sending devices keep",
    "memory images and snapshots of the machine taken while its keys were open",
    "what arrived for the study after the erasure began",
)
# Among an erasure's versions: a key of the study stays in use, so that no version's end destroys it.
_SHARED = 0
_KEY_SHARED = "a key of the study, under which the gate deposited instances of another study too: those are kept"
# A version's end says nothing of them: the roots under them are in keyrings of that time.
_FORMER = (
    "former anchors that a key version had before the store was rebuilt and that are not proved to be destroyed: who "
    "has one, a keyring of that time and what unlocks it opens that version"
)

log = logging.getLogger(__name__)


class Erase:
    """The erasures of a vault."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._config: Config = vault.config
        self._folder = vault.config.store_path / "certificates"

    def run(
        self, uid: int, study: str, reason: str, *, check: Callable[[Open], None] = lambda _: None
    ) -> Iterator[dict[str, Any]]:
        """Erase a study, or go on with the erasure that was begun; yield what happens.

        Args:
            uid: Who asks.
            study: Its UID.
            reason: Why.
            check: Raises if it is not to be begun; asked when all that was acknowledged is in the index.

        Raises:
            StrongroomError: There is no such study, or it cannot go on now.
        """
        if not reason.strip():
            raise StrongroomError("an erasure needs a reason")
        with self._vault.admitting():
            erasure = self._begin(uid, study, reason, check)
            waits = self._go_on(erasure.id)
        held = f"{plural(erasure.instances, 'instance')} in {plural(len(erasure.packs), 'pack')}"
        yield {"kind": "step", "text": f"erasure {erasure.id}: {held}"}
        until = time.monotonic() + _FENCE_SECONDS
        while waits:
            if waits == _BACKUP:
                until = time.monotonic() + _FENCE_SECONDS
            elif time.monotonic() > until:
                raise StrongroomError(
                    f"the erasure is not done yet: {waits}",
                    hint="it goes on by itself; 'strongroom certificate list' says how far it is",
                )
            yield {"kind": "waiting", "text": waits}
            time.sleep(_POLL_SECONDS)
            waits = self._go_on(erasure.id)
        yield {
            "kind": "step",
            "text": f"erased; certificate {erasure.id} is pending until the key versions are destroyed",
        }
        yield {"kind": "certificate", "id": erasure.id}

    def of_study(self, study: str) -> Erasure | None:
        """Return the last erasure of a study, None where it was never erased."""
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            return open_.ledger.erasure_of(study_tag(open_.ring, study))

    def resume(self) -> None:
        """Finish what was interrupted, as far as that goes now, and make certificates final."""
        with self._vault.admitting():
            open_ = self._vault.opened
            unfinished = [e.id for e in open_.ledger.erasures("begun")] if open_ else []
        for erasure_id in unfinished:
            try:
                if waits := self._go_on(erasure_id):
                    log.warning("erasure %s waits: %s", erasure_id, waits)
            except (StrongroomError, OSError, DatabaseError) as error:
                log.error("erasure %s is not done yet: %s", erasure_id, error)
        try:
            self.finalize()
        except (StrongroomError, OSError, DatabaseError) as error:
            log.error("certificates stay pending: %s", error)

    def _begin(self, uid: int, study: str, reason: str, check: Callable[[Open], None]) -> Erasure:
        """Record the intent, or find the one that was recorded before."""
        # Before the look at what waits: what was acknowledged up to here is found.
        begun = clock.now()
        self._vault.admit()
        open_ = self._vault.unlocked()
        tag = study_tag(open_.ring, study)
        before = open_.ledger.erasure_of(tag)
        if before is not None and not before.erased:
            return before
        open_.admission.must_be_filled()
        if stuck := [name for name, of in open_.admission.stuck.items() if of in {"", study}]:
            raise StrongroomError(
                f"{plural(len(stuck), 'deposit')} cannot be looked at, perhaps of this study: nothing was erased",
                hint="the vault's log says why; mend that, and begin again",
            )
        if not open_.all_indexed(study) and holding.current(open_).on_patients:
            raise StrongroomError(
                f"not every pack of study {study} can be read, so that a hold on its patient cannot be ruled out",
                hint="'strongroom verify' says what is wrong; 'strongroom reindex' when it is mended",
            )
        check(open_)
        if hold := holding.held(open_, study):
            raise StrongroomError(
                f"study {study} is under {hold}: nobody erases it",
                hint="'strongroom hold list' says why, and whose it is",
            )
        packs = self._packs(open_, tag, study)
        if not packs:
            raise StrongroomError(f"study {study} is not held here", hint="'strongroom list' lists", status=NOTHING)
        fenced = [p for p in packs if open_.archive.waiting(p)]
        instances = sum(len(open_.index.rows_of(p)) for p in packs)
        erasure = Erasure(secrets.token_hex(8), tag, uid, reason, begun, packs, fenced, instances)
        self._vault.auditor.record(
            "erase-begun",
            uid=uid,
            study=study,
            erasure=erasure.id,
            reason=reason,
            packs=len(packs),
            instances=instances,
        )
        open_.ledger.set_erasure(erasure)
        return erasure

    def _packs(self, open_: Open, tag: bytes, study: str) -> list[str]:
        recorded = {record.pack_id for record in open_.keys_db.of_study(tag)}
        return sorted(recorded | set(open_.index.packs_of(study)))

    def _fence(self, open_: Open) -> None:
        """Tell gates which packs to let go: those of all erasures that are not done."""
        packs = sorted({p for e in open_.ledger.erasures("begun") for p in e.fenced})
        path = self._config.public / FENCE
        try:
            told = signed.read(FENCE, path.read_bytes(), self._config.signing_key)["packs"]
        except FileNotFoundError:
            told = []
        except (OSError, SignedError):
            told = None
        if packs != told:
            document = {"created": clock.now(), "format": 1, "packs": packs, "store_id": open_.ring.header.store_id}
            encoding.replace(path, signed.write(FENCE, document, open_.ring.signing), mode=0o644)

    def _go_on(self, erasure_id: str) -> str:
        """Erase what can be erased now; return what it waits for, in words; empty when all is done.

        Raises:
            StrongroomError: The vault is locked, or something cannot be recorded or forgotten.
        """
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            # As it is now: the vault's loop and somebody who asks may both be at it.
            erasure = open_.ledger.erasure(erasure_id)
            if erasure is None or erasure.erased:
                return ""
            self._put_aside(open_, erasure)
            self._fence(open_)
            if not open_.packs_lock.acquire(blocking=False):
                return _BACKUP
            try:
                self._note(open_, erasure)
                self._erase(open_, erasure)
            finally:
                open_.packs_lock.release()
            left = sum(self._is_left(open_, pack_id) for pack_id in erasure.fenced)
            if not left:
                self._vault.auditor.record("erased", erasure=erasure.id, packs=len(erasure.packs))
                erasure.erased = clock.now()
                self._certify(open_, erasure, {})
                open_.ledger.set_erasure(erasure)
                destroyed = {r.old for r in open_.ledger.rotations() if r.destroyed}
                if destroyed.issuperset(erasure.versions):
                    # Its versions went while it was being done: it waits for no further one.
                    open_.finalized = None
                self._fence(open_)
            return f"{plural(left, 'pack')} still open in the gate" if left else ""

    def _put_aside(self, open_: Open, erasure: Erasure) -> None:
        """Take the study's deposits out of everybody's sight.

        First of all: a deposit carries its own key, so that it would be admitted again once its key record is gone;
        and against one that is held, what arrives from now on would be a copy that nobody needs, or a contradiction.
        """
        moved = set()
        for pack_id in erasure.packs:
            for path in open_.archive.waiting(pack_id):
                os.rename(path, path.with_name(pack_id + _PUT_ASIDE))
                moved.add(path.parent)
                if pack_id not in erasure.fenced:
                    erasure.fenced.append(pack_id)
        if moved:
            open_.ledger.set_erasure(erasure)
        for inbox in moved:
            encoding.sync_folder(inbox)

    def _note(self, open_: Open, erasure: Erasure) -> None:
        """Keep which packs besides came out of the study's, and which versions wrap their keys, before they go."""
        records = open_.keys_db.of_study(erasure.tag)
        # What a quarantined pack was taken from, perhaps after the erasure began, its key id says.
        parts = [r.pack_id for r in records if r.pack_id in erasure.packs or r.place.key_id.hex() in erasure.packs]
        packs = sorted({*erasure.packs, *parts})
        versions = erasure.versions
        if parts or not versions:
            # Of what a version is gone before, nothing is left to destroy.
            alive = {r.version for r in open_.ring.body.versions if r.state != "destroyed"}
            versions = sorted({*versions, *alive})
            keys = {r.place.key_id for r in records if r.pack_id in packs} | {bytes.fromhex(p) for p in packs}
            if any(r.pack_id not in packs for key in keys for r in open_.keys_db.of_key(key)):
                # No honest gate puts two studies under one key.
                versions = sorted({_SHARED, *versions})
        if (packs, versions) != (erasure.packs, erasure.versions):
            erasure.packs, erasure.versions = packs, versions
            open_.ledger.set_erasure(erasure)

    def _erase(self, open_: Open, erasure: Erasure) -> None:
        keys_db, archive = open_.keys_db, open_.archive
        keys_db.remove(*(pack_id for pack_id in erasure.packs if keys_db.find(pack_id) is not None))
        log_ = self._config.keys_db.with_name(self._config.keys_db.name + "-wal")
        if log_.exists() and log_.stat().st_size:
            raise StrongroomError(
                "keys.db is being read, so that deleted keys are still in the log before it",
                hint="the erasure goes on by itself, or with the same command",
            )
        for pack_id in erasure.packs:
            for path in (archive.path(pack_id), archive.quarantine_path(pack_id)):
                if path.exists():
                    archive.remove(path)
            if open_.index.place_of(pack_id):
                open_.index.drop(pack_id)
        open_.index.forget()

    def _is_left(self, open_: Open, pack_id: str) -> bool:
        """Tell whether a gate still has a deposit open; remove it otherwise."""
        left = False
        for path in open_.archive.waiting(pack_id + _PUT_ASIDE):
            if open_.archive.is_locked(path):
                left = True
            else:
                open_.archive.remove(path)
        return left

    # --- certificates

    def finalize(self) -> None:
        """Sign the final certificate of each erasure whose key versions are all destroyed."""
        with self._vault.admitting():
            open_ = self._vault.opened
            if open_ is None:
                return
            destroyed = {r.old: r.destroyed for r in open_.ledger.rotations() if r.destroyed}
            exports = open_.ledger.exports()
            # An erasure waits for versions that were alive when it was done: until one more goes, none is final.
            state = (tuple(destroyed), tuple((made.id, made.retired) for made in exports))
            if state == open_.finalized:
                return
            for erasure in open_.ledger.each_erasure("erased"):
                if any(v not in destroyed for v in erasure.versions):
                    continue
                # An export holds the versions' roots: whoever has its shares opens them without any anchor, also those
                # of versions that were destroyed before, under which an old backup has the study's keys.
                if not opens(exports, list(range(1, max(erasure.versions) + 1))):
                    self._vault.auditor.record("erasure-final", erasure=erasure.id)
                    self._certify(open_, erasure, {v: destroyed[v] for v in erasure.versions})
                    erasure.final = clock.now()
                    open_.ledger.set_erasure(erasure)
            open_.finalized = state

    def _certify(self, open_: Open, erasure: Erasure, destroyed: dict[int, str]) -> None:
        versions = [record for record in open_.ring.body.versions if record.version in erasure.versions]
        document = {
            "format": 1,
            "id": erasure.id,
            "store_id": open_.ring.header.store_id,
            "state": "final" if destroyed else "pending",
            "study_tag": erasure.tag.hex(),
            "erasure_begun": erasure.begun,
            "erased": erasure.erased,
            "uid": erasure.uid,
            "packs": erasure.packs,
            "instances": erasure.instances,
            "method": "study keys deleted, packs unlinked; their wrapping key versions destroyed with their anchors",
            "versions": [
                {
                    "version": record.version,
                    "anchor": record.anchor.provider,
                    "grade": open_.ring.grade(record.version),
                    "destroyed": destroyed.get(record.version, ""),
                    **_former(record),
                }
                for record in versions
            ],
            "not_covered": [
                *_NOT_COVERED,
                *([_KEY_SHARED] if _SHARED in erasure.versions else []),
                *([_FORMER] if any(r.former for r in versions) else []),
            ],
            "signed": clock.now(),
        }
        self._folder.mkdir(mode=0o700, exist_ok=True)
        encoding.replace(self._folder / f"{erasure.id}.json", signed.write(LABEL, document, open_.ring.signing))
        encoding.sync_folder(self._folder.parent)


def _former(record: VersionRecord) -> dict[str, Any]:
    """Return what a certificate says of the anchors that a version had before and that may still be somewhere."""
    former = [{"id": anchor.id, "anchor": anchor.provider} for anchor in record.former]
    return {"former_anchors": former} if former else {}
