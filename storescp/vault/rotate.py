"""Rotation: a new key version, every study key under it, a proof, and in the end the old version's anchor destroyed.

Online: gates take the new deposit key up by themselves, nothing is refused, and each step can be repeated. How far a
rotation is stands in the ledger; a second run goes on where the first one stopped.
Source: docs/design.md, "Rotation".
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Generator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from keys import encoding
from keys.anchors import AnchorError
from keys.keyring import KeyringError, read_header
from keys.seal import SealError, context
from keys.versions import Version
from storage import events
from storage.direct import Pages, opened
from storage.keysdb import KeysDatabase, StudyKeyRecord
from storage.ledger import Rotation
from storage.pack import PAGE, PackError, parse_header
from storage.sqlite import DatabaseError
from storescp import clock
from storescp.config import Config
from storescp.errors import StrongroomError, plural
from storescp.vault.backup import follows
from storescp.vault.erase import Erase
from storescp.vault.opened import Open
from storescp.vault.recovery import covers
from storescp.vault.state import Vault

_BATCH = 500
# How long to wait for workers that make a pack under the old version just now, and for packs that are still open.
_LOCK_SECONDS = 30.0
_DRAIN_SECONDS = 60.0
# What a new version must be in before the old one goes, and what does that.
_CONFIRMATIONS = {
    "export": "a recovery export with the new version is confirmed ('strongroom recovery confirm')",
    "backup": "a backup made since is confirmed ('strongroom backup confirm')",
}

log = logging.getLogger(__name__)

Progress = dict[str, Any]


class Rotate:
    """The rotation of a vault: one at a time."""

    def __init__(
        self, vault: Vault, *, lock_seconds: float = _LOCK_SECONDS, drain_seconds: float = _DRAIN_SECONDS
    ) -> None:
        self._vault = vault
        self._config: Config = vault.config
        self._lock_seconds = lock_seconds
        self._drain_seconds = drain_seconds

    def run(self, uid: int, reason: str, waived: dict[str, str]) -> Iterator[Progress]:
        """Begin a rotation, or go on with the one that was begun; yield what happens.

        Stops where something has to be waited for, and says what. Confirmations waived without a reason for another
        rotation are those that earlier ones wait for.

        Raises:
            StrongroomError: It cannot go on.
        """
        open_ = self._vault.unlocked()
        if not open_.rotating.acquire(blocking=False):
            raise StrongroomError(
                "another 'keys rotate' or 'keys reencrypt' is at work on this store", hint="wait until it ends"
            )
        try:
            rotation = self._begin(open_, uid, reason, waived)
            if rotation is not None:
                yield from self._steps(open_, rotation)
            yield from self._ends()
        except (AnchorError, KeyringError, DatabaseError, OSError, ValueError, OverflowError) as error:
            raise StrongroomError(
                f"the rotation stopped: {error}",
                hint="mend that; 'strongroom keys rotate' goes on where it stopped, and until then nothing is lost",
            ) from error
        finally:
            open_.rotating.release()

    def _steps(self, open_: Open, rotation: Rotation) -> Iterator[Progress]:
        yield {"kind": "step", "text": f"version {rotation.version} is current"}
        if rotation.sealed_off is None:
            self._seal_off(open_, rotation)
        done, total = yield from self._rewrap(open_, rotation)
        yield {"kind": "step", "text": f"rewrapped {done} of {plural(total, 'study key')}"}
        yield from self._drain(open_, rotation)
        self._databases(open_, rotation)
        yield {"kind": "step", "text": "index and ledger are under the new version"}
        self._prove(open_, rotation)
        yield {"kind": "step", "text": f"nothing names version {rotation.old}; the proof is in the audit chain"}

    def _ends(self) -> Iterator[Progress]:
        destroyed = self.destroy_due()
        for old in destroyed:
            grade = self._vault.unlocked().ring.grade(old)
            yield {"kind": "step", "text": f"the anchor of version {old} is destroyed (NIST SP 800-88: {grade})"}
        if destroyed:
            Erase(self._vault).finalize()
        with self._vault.admitting():
            waiting = [r for r in self._vault.unlocked().ledger.rotations() if r.proof and not r.destroyed]
            texts = [f"the anchor of version {r.old} stays until {self.waits_for(r)}" for r in waiting]
        for text in texts:
            yield {"kind": "pending", "text": text}

    def _step(self, open_: Open) -> contextlib.AbstractContextManager[None]:
        return self._vault.step(open_, "the rotation", "'strongroom keys rotate' goes on where it stopped")

    # --- the steps, in their order

    def _begin(self, open_: Open, uid: int, reason: str, waived: dict[str, str]) -> Rotation | None:
        """Return the rotation that is under way or begins; None where only confirmations are waived."""
        with self._step(open_):
            known = open_.ledger.rotations()
            under_way = next((r for r in known if not r.proof), None)
            waiting = [r for r in known if r.proof and not r.destroyed]
            if under_way is None and not reason.strip():
                if not (waived and waiting):
                    raise StrongroomError("a rotation needs a reason", hint="--reason TEXT")
                # Their other steps are done, and must not be done again: a later version may be current.
                for rotation in waiting:
                    rotation.waived |= waived
                    open_.ledger.set_rotation(rotation)
                return None
            newest = max(r.version for r in open_.ring.body.versions)
            under_way = under_way or Rotation(newest + 1, newest, uid, reason, clock.now())
            under_way.waived |= waived
            if under_way.version > newest:
                self._vault.auditor.record(
                    "rotation-begun", uid=uid, version=under_way.version, reason=under_way.reason
                )
            open_.ledger.set_rotation(under_way)
            if under_way.version > newest:
                self._add_version(open_, uid)
            self._publish(open_, under_way.version)
            return under_way

    def _add_version(self, open_: Open, uid: int) -> None:
        """Add a version to the keyring, in memory and on the disk or in neither.

        Raises:
            KeyringError, AnchorError, OSError: It was not added.
        """
        ring, before = open_.ring, [(record, record.state) for record in open_.ring.body.versions]
        generation = ring.header.generation
        try:
            ring.add_version(clock.now())
            ring.write(self._config.keyring)
        except BaseException:
            # What is wrapped under a version that no keyring on the disk has is lost at the next start.
            del ring.body.versions[len(before) :]
            for record, state in before:
                record.state = state
            if generation < ring.header.generation == read_header(self._config.keyring).generation:
                # The new keyring has its name, perhaps not durably: whoever unlocks goes on with what is there then.
                log.error("the keyring was replaced, but perhaps not durably; the vault locks")
                self._vault.lock(uid=uid)
            raise

    def _publish(self, open_: Open, version: int) -> None:
        path = self._config.public / f"deposit-{version}.key"
        if not path.exists():
            key = open_.ring.version(version).deposit_key()
            # Whole under its name, or not there: gates take it up at once, and refuse everything with a part of it.
            encoding.replace(path, key.signed_file(open_.ring.signing, clock.now()), mode=0o644)

    def _seal_off(self, open_: Open, rotation: Rotation) -> None:
        """Wait until no worker can make another pack under the old version; keep which there are.

        Raises:
            StrongroomError: A process still holds the old deposit key, or deposits cannot be seen.
        """
        path = self._config.public / f"deposit-{rotation.old}.key"
        if path.exists():
            with path.open("rb") as file:
                until = time.monotonic() + self._lock_seconds
                while not _locked(file.fileno()):
                    if time.monotonic() > until:
                        raise StrongroomError(
                            f"{_holders(path)} still makes a pack under version {rotation.old}",
                            hint="look at that process; 'strongroom keys rotate' goes on where it stopped",
                        )
                    time.sleep(0.1)
        with self._step(open_):
            deposits = open_.archive.deposits()
            if open_.archive.unseen:
                raise StrongroomError(
                    f"{', '.join(p.name for p in open_.archive.unseen)} cannot be read: what is in it may need the key",
                    hint="give the folder its mode again (2770); 'strongroom keys rotate' goes on where it stopped",
                )
            rotation.sealed_off = sorted(p.name for p in deposits if _version_of(p) == rotation.old)
            open_.ledger.set_rotation(rotation)
            open_.retire()

    def _rewrap(self, open_: Open, rotation: Rotation) -> Generator[Progress, None, tuple[int, int]]:
        """Wrap every study key under the new version; what is admitted meanwhile is under it already.

        Returns:
            How many were wrapped anew, and how many there were under another version.
        """
        keys_db = KeysDatabase(self._config.keys_db)
        try:
            total = sum(count for v, count in keys_db.versions().items() if v != rotation.version)
            done = failed = 0
            after = ""
            while batch := keys_db.records(after=after, not_version=rotation.version, limit=_BATCH):
                after = batch[-1].pack_id
                changes = []
                # Whoever locks the vault zeroes its keys: nothing may be wrapped under a zeroed one.
                with self._step(open_):
                    for record in batch:
                        try:
                            changes.append(_rewrapped(open_, record, rotation.version))
                        except (SealError, KeyringError, AnchorError, OverflowError) as error:
                            failed += 1
                            log.error("the study key of pack %s does not open: %s", record.pack_id, error)
                done += keys_db.rewrap(changes)
                yield {"kind": "progress", "done": done, "total": total}
            keys_db.forget()
        finally:
            keys_db.close()
        if failed:
            raise StrongroomError(
                f"not opened, and still under their version: {plural(failed, 'study key')}",
                hint="'strongroom verify' names them; restore keys.db from a backup, or erase those packs",
            )
        return done, total

    def _drain(self, open_: Open, rotation: Rotation) -> Iterator[Progress]:
        """Wait until the deposits under the old version are admitted.

        Raises:
            StrongroomError: One is still open.
        """
        until = time.monotonic() + self._drain_seconds
        while True:
            with self._step(open_):
                self._vault.admit()
                left = self._naming(rotation.old)
            if not left:
                break
            if time.monotonic() > until:
                raise StrongroomError(
                    f"{plural(len(left), 'deposit')} under version {rotation.old} not admitted yet",
                    hint="objects are still being received into them; a second 'strongroom keys rotate' goes on",
                )
            open_packs = plural(len(left), "deposit")
            yield {"kind": "waiting", "text": f"{open_packs} under version {rotation.old} still open"}
            time.sleep(0.5)
        # What was admitted meanwhile under the old version: none, but a second look costs nothing.
        yield from self._rewrap(open_, rotation)

    def _databases(self, open_: Open, rotation: Rotation) -> None:
        with self._step(open_):
            if open_.database_version != rotation.version:
                open_.rekey(rotation.version)
                self._vault.auditor.use_ledger(open_.own_ledger())
                # What an error in the middle of an admission left undone, the one before knew.
                open_.admission.resume()

    def _prove(self, open_: Open, rotation: Rotation) -> None:
        """Open every record once more under the new version and sign what was seen.

        Raises:
            StrongroomError: A record does not open, or names another version.
        """
        keys_db = KeysDatabase(self._config.keys_db)
        digest, count, after = hashlib.sha256(), 0, ""
        try:
            # The digest is of one state of the records, though admission goes on.
            with keys_db.snapshot():
                while batch := keys_db.records(after=after, limit=_BATCH):
                    after = batch[-1].pack_id
                    with self._step(open_):
                        for record in batch:
                            digest.update(_proven(open_, record, rotation.version))
                    count += len(batch)
        finally:
            keys_db.close()
        proof = {
            "format": 1,
            "store_id": open_.ring.header.store_id,
            "version": rotation.version,
            "old": rotation.old,
            "records": count,
            "digest": digest.hexdigest(),
            "time": clock.now(),
        }
        content = encoding.canonical(proof)
        signature = encoding.to_base64(open_.ring.signing.sign(context("rotation-proof") + content)).decode()
        rotation.proof = encoding.canonical({"proof": proof, "signature": signature}).decode()
        rotation.proved = clock.now()
        with self._step(open_):
            self._vault.auditor.record("rotation-proved", version=rotation.version, proof=proof, signature=signature)
            open_.ledger.set_rotation(rotation)

    # --- the end of the old version

    def waits_for(self, rotation: Rotation) -> str:
        """Return what the old version's anchor still waits for, in words; empty for nothing."""
        ledger = self._vault.unlocked().ledger
        confirmed = {
            "export": covers(ledger.exports(), rotation.version),
            "backup": follows(ledger.backups(), rotation),
        }
        missing = [kind for kind in _CONFIRMATIONS if not confirmed[kind] and kind not in rotation.waived]
        if missing:
            ways = " and ".join(_CONFIRMATIONS[kind] for kind in missing)
            waivers = " ".join(f"--without-{kind} REASON" for kind in missing)
            return f"{ways}, or 'strongroom keys rotate {waivers}'"
        due = clock.parse(rotation.proved) + timedelta(days=self._config.settings.keys.destroy_after_days)
        if datetime.now(UTC) < due:
            return clock.text(due)
        return self._still_named(rotation.old) or self._out_of_reach(rotation.old)

    def _still_named(self, version: int) -> str:
        open_ = self._vault.unlocked()
        found = {
            "study key": open_.keys_db.versions().get(version, 0),
            "deposit": len(self._naming(version)),
            "database": 2 if open_.database_version <= version else 0,
        }
        named = " and ".join(plural(count, what) for what, count in found.items() if count)
        return f"nothing names it; now {named} does ('strongroom verify' says more)" if named else ""

    def _out_of_reach(self, version: int) -> str:
        # Before it is recorded that the version is destroyed: its token may not be here.
        try:
            self._vault.unlocked().ring.check_anchor(version)
        except (AnchorError, KeyringError) as error:
            return f"it can be destroyed: {error}"
        return ""

    def destroy_due(self) -> list[int]:
        """Destroy the anchors of old versions that nothing names and whose time has come; return which.

        Raises:
            StrongroomError: It cannot be recorded.
        """
        destroyed = []
        with self._vault.admitting():
            open_ = self._vault.opened
            if open_ is None:
                return []
            for rotation in open_.ledger.rotations():
                if rotation.destroyed or not rotation.proof or self.waits_for(rotation):
                    continue
                grade = open_.ring.grade(rotation.old)
                self._vault.auditor.record(
                    "version-destroyed", version=rotation.old, reason=rotation.reason, grade=grade
                )
                open_.ring.destroy_version(rotation.old)
                open_.ring.write(self._config.keyring)
                (self._config.public / f"deposit-{rotation.old}.key").unlink(missing_ok=True)
                rotation.destroyed = clock.now()
                open_.ledger.set_rotation(rotation)
                destroyed.append(rotation.old)
                log.warning("key version %d is destroyed", rotation.old)
        return destroyed

    def _naming(self, version: int) -> list[str]:
        """Return which deposits and events need a version to be opened."""
        open_ = self._vault.unlocked()
        archive = open_.archive
        found = archive.deposits()
        for inbox in self._config.inboxes:
            if inbox not in archive.unseen:
                with contextlib.suppress(FileNotFoundError):
                    found += events.found(inbox)
        # What cannot be seen may need it.
        unseen = [inbox.name for inbox in archive.unseen]
        return unseen + [path.name for path in found if _version_of(path) == version]


def _rewrapped(open_: Open, record: StudyKeyRecord, version: int) -> tuple[StudyKeyRecord, int, bytes]:
    old: Version = open_.ring.version(record.version)
    key = old.unwrap_study(record.sealed, record.place)
    try:
        return record, version, open_.ring.version(version).wrap_study(key, record.place)
    finally:
        key[:] = bytes(len(key))


def _proven(open_: Open, record: StudyKeyRecord, version: int) -> bytes:
    """Return what the proof says of a record.

    Raises:
        StrongroomError: It does not open, or is under another version.
    """
    if record.version != version:
        raise StrongroomError(f"the study key of pack {record.pack_id} is under version {record.version}")
    try:
        key = open_.ring.version(version).unwrap_study(record.sealed, record.place)
    except (SealError, OverflowError) as error:
        raise StrongroomError(
            f"the study key of pack {record.pack_id} does not open under version {version}: {error}",
            hint="'strongroom verify' names what it opened; restore keys.db from a backup, or erase that pack",
        ) from error
    key[:] = bytes(len(key))
    return record.place.pack_id + version.to_bytes(4, "big") + record.sealed


def _version_of(path: Path) -> int:
    """Return the key version in a deposit's header; 0 where it is none."""
    with contextlib.suppress(OSError, PackError), opened(path) as descriptor:
        return parse_header(Pages(descriptor).read(0, PAGE)).version
    return 0


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holders(path: Path) -> str:
    """Return the processes that hold a file's lock, as far as they can be seen."""
    inode = str(path.stat().st_ino)
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text("ascii").splitlines():
            fields = line.split()
            if len(fields) > 5 and fields[5].rpartition(":")[2] == inode and fields[4] != str(os.getpid()):
                found.append(fields[4])
    return f"process {', '.join(found)}" if found else "a process"
