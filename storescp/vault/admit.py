"""Admission: deposits become archived packs, records become index rows. Every step can be repeated after a crash.

Where gate and vault are one user, a deposit under its lock can change no more and moves into the archive by a
rename. Where the gate is another user it keeps descriptors and links whatever its file is called, so the vault
copies first and believes only the copy. A record that must not stand beside the others (other content under a UID
that is held, another patient than its study's) goes into a quarantined pack of its own, under the same study key and
a key record of its own. See docs/design.md, "Admission".
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from keys.anchors import AnchorError
from keys.keyring import Keyring, KeyringError, UnknownVersionError
from keys.seal import SealError
from keys.versions import StudyKeyPlace
from storage import attributes, pack
from storage.archive import Archive
from storage.attributes import AttributesError
from storage.index import Index, Row
from storage.keysdb import KeysDatabase, StudyKeyRecord
from storage.ledger import Decision, Ledger
from storage.packfile import OpenedPack, PackFile, Record, Unreadable, frames_digest
from storage.sqlite import DatabaseError
from storescp import clock
from storescp.errors import StrongroomError
from storescp.vault.examine import Examiner, Findings, Judged, frames, open_pack
from storescp.vault.judge import OTHER_KEY, Verdict
from storescp.vault.repack import settle

# A pack that was not finished making in this long never will be: its gate is gone.
_UNFINISHED_SECONDS = 60
# Holes in an honest deposit are the gaps of under 4,096 bytes behind its records.
_SPARSE_LIMIT = 64 << 20
_ROWS_AT_ONCE = 500
# Of an index that is filled, in one transaction.
_FILL_PACKS = 200
# How often records of packs that stay open are listed though nobody asks.
_LIST_SECONDS = 30.0

log = logging.getLogger(__name__)


class Retired:
    """Versions that no worker can use any more, with the deposits that were there by then: later ones are forged."""

    def __init__(self, deposits: dict[int, frozenset[str]]) -> None:
        self.deposits = deposits

    def refuses(self, version: int, pack_id: str) -> bool:
        """Tell whether a deposit came too late."""
        return version in self.deposits and pack_id not in self.deposits[version]


class Admission:
    """Admits deposits, one caller at a time."""

    def __init__(
        self,
        archive: Archive,
        keyring: Keyring,
        keys_db: KeysDatabase,
        index: Index,
        ledger: Ledger,
        *,
        gate_uid: int,
        room: Callable[[int], bool],
        retired: Retired,
        quarantine_resent: bool,
    ) -> None:
        """Prepare to admit.

        Args:
            archive: The store's folders.
            keyring: Unlocked.
            keys_db: Of the admitting thread alone.
            index: Of the admitting thread alone.
            ledger: Of the admitting thread alone.
            gate_uid: Whose deposits are taken.
            room: Tells whether the archive has room for so many bytes more.
            retired: What came too late.
            quarantine_resent: Whether somebody is to decide about an erased study that is sent again.
        """
        self._archive = archive
        self._keyring = keyring
        self._keys_db = keys_db
        self._index = index
        self._ledger = ledger
        self._examiner = Examiner(archive, keyring, keys_db, index, self._erased if quarantine_resent else _never)
        self._gate_uid = gate_uid
        # By copy where the gate keeps a hold on its files, and where a rename could not cross file systems.
        self._copies = gate_uid != os.geteuid() or not archive.one_file_system()
        self._room = room
        self._retired = retired
        self._lock = threading.Lock()
        self._said: set[str] = set()
        # Deposits that could not be admitted when it was last tried, each with its study, empty where it is not known.
        self.stuck: dict[str, str] = {}
        self._interrupted = False
        self._names_synced = False
        self._listed: dict[str, float] = {}

    # --- the whole of incoming/

    def resume(self) -> None:
        """Finish what a crash interrupted."""
        with self._lock:
            self._archive.clear(lambda pack_id: self._keys_db.find(pack_id) is not None)
            self._finish_all()
            for decision in self._ledger.decisions()[-1:]:
                self._apply(decision)

    # --- filling the index

    def begin_filling(self) -> None:
        """Empty the index, to be filled anew from packs, key records and the ledger's decisions."""
        with self._lock:
            self._index.begin_anew()

    def fill(self, seconds: float) -> bool:
        """Fill an index that is new, or was emptied, for a time; tell whether it is whole.

        Nothing is admitted before it is: what is held already could not be told.
        """
        until = time.monotonic() + seconds
        with self._lock:
            while (done := self._index.filled_to()) is not None:
                batch = self._keys_db.admitted(done, _FILL_PACKS)
                if not batch:
                    self._archive.clear(lambda pack_id: self._keys_db.find(pack_id) is not None)
                    self._finish_all()
                    for decision in self._ledger.decisions():
                        self._apply(decision)
                    self._index.filled()
                    # What could not be read just now is tried once more.
                    self._interrupted = True
                    log.info("the index is whole")
                    break
                if not self._names_synced:
                    # A pack may have its name since a moment before a crash: its rows must not be more durable.
                    self._archive.sync_names()
                    self._names_synced = True
                with self._index.filling():
                    for record in batch:
                        self._finish(record.pack_id, synced=True)
                    self._index.filled_up_to(batch[-1].place.admission)
                if time.monotonic() > until:
                    return False
        return True

    def reindex(self) -> None:
        """Fill the index anew, all at once."""
        self.begin_filling()
        self.fill(float("inf"))

    def filling(self) -> tuple[int, int] | None:
        """Return how many packs are in an index that is being filled, of how many; None for a whole one."""
        if self._index.filled_to() is None:
            return None
        return self._index.archived_count(), self._keys_db.count()

    def must_be_filled(self) -> None:
        """Check that the index is whole.

        Raises:
            StrongroomError: It is being filled.
        """
        if (state := self.filling()) is not None:
            raise StrongroomError(
                f"the index is being filled: {state[0]} of {state[1]} packs are in it",
                hint="it goes on by itself while the vault runs; 'strongroom status' says how far it is",
            )

    def catch_up(self) -> int:
        """Admit every deposit that is closed, list the records of those that are open; return how many were admitted.

        When this returns, everything that was acknowledged before it was called can be found.

        Raises:
            StrongroomError: The index is being filled.
        """
        with self._lock:
            self.must_be_filled()
            self._recover()
            deposits = self._archive.deposits()
            self.stuck.clear()
            admitted = sum(self._look_at(path) for path in deposits)
            self._tidy({path.name for path in deposits})
        return admitted

    def advance(self, seconds: float) -> tuple[int, bool]:
        """Do what fits a time, the oldest deposits first; return how many were admitted, and whether that was all.

        Records of packs that stay open are listed now and then only: each would be read twice.
        """
        until = time.monotonic() + seconds
        admitted = 0
        if not self.fill(seconds):
            return 0, False
        with self._lock:
            self._recover()
            deposits = self._archive.deposits()
            for path in deposits:
                if time.monotonic() > until:
                    return admitted, False
                admitted += self._look_at(path, seldom=True)
            present = {path.name for path in deposits}
            self._listed = {name: when for name, when in self._listed.items() if name in present}
            self._tidy(present)
        return admitted, True

    def interrupted(self) -> None:
        """Admit nothing more before what was left in the middle is finished."""
        self._interrupted = True

    def _recover(self) -> None:
        if self._interrupted:
            self._finish_all()
            self._interrupted = False

    def _look_at(self, path: Path, *, seldom: bool = False) -> bool:
        try:
            if not self._acceptable(path):
                return False
            with PackFile(path, write=not self._copies) as file:
                if self._retired.refuses(file.header.version, path.name):
                    raise pack.PackError("it names a key version that was retired before it came")
                if not self._has_room(path):
                    # Who erases to make room must find what of the study waits.
                    self._list_open(file)
                    return False
                if file.try_lock():
                    return self._admit(file)
                if not seldom or self._is_long_open(path.name):
                    self._list_open(file)
        except (pack.PackError, SealError, AttributesError, UnknownVersionError) as error:
            # What is kept of it is what it has on the disk, whatever length it claims.
            if self._room(path.lstat().st_blocks * 512):
                self._set_aside(path, str(error))
            else:
                self.stuck[path.name] = ""
        except (KeyringError, AnchorError, OSError, DatabaseError) as error:
            # It may have got as far as its key record: what is recorded but not indexed is finished at the next look.
            self._interrupted = True
            if path.exists():
                self.stuck[path.name] = self._study_in(path)
                self._say_once(path.name, f"deposit {path.name} is not admitted yet: {error}")
        return False

    def _study_in(self, path: Path) -> str:
        """Return the study of a deposit that cannot be admitted, empty where it does not open."""
        with contextlib.suppress(pack.PackError, SealError, KeyringError, AnchorError, OSError), PackFile(path) as file:
            for found in self._examiner.deposit(file).records(whole=False, closed=False):
                if isinstance(found, Record):
                    return found.attributes.text(attributes.STUDY)
        return ""

    def _has_room(self, path: Path) -> bool:
        """Tell whether the archive has room for a deposit."""
        if self._room(path.lstat().st_size if self._copies else 0):
            self._said.discard("room")
            return True
        self._say_once("room", "the archive has no room for what waits; deposits stay where they are")
        return False

    def _acceptable(self, path: Path) -> bool:
        """Check what a name in ``incoming/`` stands for before it is opened; remove what can be no deposit."""
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            self._say_once(path.name, f"{path.name} in incoming is a folder and is left where it is")
            return False
        if not stat.S_ISREG(found.st_mode):
            log.error("%s in incoming is no regular file and is removed", path.name)
            self._archive.remove_deposit(path)
            return False
        if found.st_uid != self._gate_uid:
            raise pack.PackError("it does not belong to the gate's user")
        if found.st_size - found.st_blocks * 512 > _SPARSE_LIMIT:
            raise pack.PackError("it is a sparse file")
        if found.st_nlink != 1 and self._copies:
            raise pack.PackError("it has more than one name")
        return True

    def _is_long_open(self, pack_id: str) -> bool:
        """Tell whether an open pack was neither seen nor listed for a while."""
        now = time.monotonic()
        if now - self._listed.setdefault(pack_id, now) < _LIST_SECONDS:
            return False
        self._listed[pack_id] = now
        return True

    def _list_open(self, file: PackFile) -> None:
        pack_id = file.path.name
        scanned = self._index.scanned(pack_id)
        if (scanned or pack.PAGE) < file.size and self._keys_db.find(pack_id) is None:
            rows: list[Row] = []
            study = ""
            end = scanned or pack.PAGE
            for judged in self._examiner.judge(self._examiner.deposit(file), start=end, whole=False, closed=False):
                if isinstance(judged, Unreadable):
                    # What does not open in an open pack is no finding: its writer may not be done.
                    break
                study = study or judged.record.attributes.text(attributes.STUDY)
                state = "pending" if judged.verdict is Verdict.QUARANTINE else judged.verdict.value
                rows.append(Row(judged.record, "pending" if state == "heal" else state, judged.reason))
                end = pack.page_after(judged.record.frame.end)
                if len(rows) == _ROWS_AT_ONCE:
                    self._index.add(pack_id, study, rows, end)
                    rows = []
            if rows:
                self._index.add(pack_id, study, rows, end)

    # --- one closed deposit

    def _admit(self, file: PackFile) -> bool:
        known = self._keys_db.find(file.path.name)
        if known is not None:
            self._account_for(file)
            return True
        if not self._copies:
            return self._admit_from(file, file.path)
        with self._archive.snapshot(file) as copy:
            try:
                return self._admit_from(copy, file.path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    copy.path.unlink()

    def _admit_from(self, source: PackFile, deposit: Path) -> bool:
        """Admit what a source holds: the deposit itself under its lock, or the vault's copy of it."""
        pack_id = deposit.name
        opened = self._examiner.deposit(source)
        findings = self._read_all(pack_id, opened)
        if not findings.judged:
            if findings.unreadable:
                raise pack.PackError("no record in it opens")
            self._index.drop(pack_id)
            self._archive.remove_deposit(deposit)
            return False
        for judged in findings.of(Verdict.QUARANTINE):
            self._quarantine(opened, judged)
        again = [j for j in findings.of(Verdict.AGAIN) if self._examiner.held_safely(j.record, pack_id)]
        left_out = {j.record.frame.offset for j in again}
        kept = [
            j for j in findings.judged if j.verdict is not Verdict.QUARANTINE and j.record.frame.offset not in left_out
        ]
        if again:
            log.info("pack %s: %d objects were held already", pack_id, len(again))
        if not kept:
            self._index.drop(pack_id)
        elif len(kept) == len(findings.judged) and (findings.unreadable or findings.padded()):
            self._admit_whole(source, opened, findings)
        else:
            self._admit_part(source, opened, kept)
        if deposit.exists():
            self._archive.remove_deposit(deposit)
        return True

    def _admit_whole(self, source: PackFile, opened: OpenedPack, findings: Findings) -> None:
        pack_id = source.path.name
        if not findings.unreadable and findings.end < source.size:
            # The tail of a writer that died: nothing in it was acknowledged.
            os.ftruncate(source.descriptor, findings.end)
        frames = [j.record.frame for j in findings.judged]
        place = self._place(pack_id, opened, frames, source.size, self._study(findings.judged))
        if self._copies:
            self._archive.make_ready(source)
            self._record_key(opened, place)
            self._archive.finish(self._archive.path(pack_id))
        else:
            self._record_key(opened, place)
            self._archive.adopt(source)
        self._file(pack_id, place, findings.judged)

    def _admit_part(self, source: PackFile, opened: OpenedPack, kept: list[Judged]) -> None:
        pack_id = source.path.name
        target = self._archive.path(pack_id)
        moved = self._archive.build(source, [j.record.frame for j in kept], target)
        place = self._place(pack_id, opened, moved, moved[-1].end, self._study(kept))
        self._record_key(opened, place)
        self._archive.finish(target)
        self._file(pack_id, place, _moved(kept, moved))

    def _quarantine(self, opened: OpenedPack, judged: Judged) -> None:
        """Put one record into a quarantined pack of its own, unless a crash left it there."""
        if self._examiner.archived(opened.file, judged.record.frame):
            return
        pack_id = secrets.token_hex(16)
        target = self._archive.quarantine_path(pack_id)
        moved = self._archive.build(opened.file, [judged.record.frame], target)
        place = self._place(pack_id, opened, moved, moved[-1].end, self._study([judged]))
        self._record_key(opened, place)
        self._archive.finish(target)
        log.warning("object %s goes to quarantine as %s: %s", moved[0].object_id.hex(), pack_id, judged.reason)
        self._file(pack_id, place, _moved([judged], moved))

    def _file(self, pack_id: str, place: StudyKeyPlace, judged: list[Judged]) -> None:
        quarantined = place.pack_id != place.key_id
        rows = []
        for one in judged:
            if one.verdict is Verdict.HEAL:
                self._heal(one.record, pack_id)
            state = "quarantined" if quarantined else "held" if one.verdict is Verdict.HEAL else one.verdict.value
            rows.append(Row(one.record, state, one.reason))
        self._index.replace(pack_id, "quarantine" if quarantined else "objects", place.admission, place.length, rows)

    def _heal(self, record: Record, pack_id: str) -> None:
        held = self._index.held(record.attributes.text(attributes.SOP_INSTANCE))
        if held is not None and held.pack_id != pack_id:
            log.warning(
                "object %s replaces one in pack %s that opens no more", record.frame.object_id.hex(), held.pack_id
            )
            self._index.set_state(held.pack_id, held.frame.offset, "damaged", "it opens no more; a good copy came")

    def _place(
        self, pack_id: str, opened: OpenedPack, frames: list[pack.Frame], length: int, study: str
    ) -> StudyKeyPlace:
        return StudyKeyPlace(
            bytes.fromhex(pack_id),
            opened.file.header.key_id,
            study_tag(self._keyring, study),
            length,
            frames_digest(frames),
            self._keys_db.next_admission(),
        )

    def _record_key(self, opened: OpenedPack, place: StudyKeyPlace) -> None:
        current = self._keyring.current()
        self._keys_db.add(StudyKeyRecord(place, current.version, current.wrap_study(opened.key, place)))

    def _erased(self, study: str) -> bool:
        return attributes.is_uid(study) and self._ledger.erasure_of(study_tag(self._keyring, study)) is not None

    def _study(self, judged: list[Judged]) -> str:
        return judged[0].record.attributes.text(attributes.STUDY)

    # --- after a crash, or an error in the middle

    def _finish_all(self) -> None:
        """Finish every pack whose study key is recorded, but not its admission in the index."""
        # First: a pack that has its new key, and in the index still its old name, is not to be judged anew.
        settle(self._archive, self._keys_db, self._index, self._ledger)
        indexed = self._index.archived_packs()
        for pack_id in self._keys_db.packs():
            if pack_id not in indexed:
                self._finish(pack_id)

    def _finish(self, pack_id: str, *, synced: bool = False) -> None:
        """Bring a pack whose study key is recorded to where it belongs, and its rows into the index.

        ``synced``: a name that is there is durable.
        """
        record = self._keys_db.find(pack_id)
        if record is None:
            return
        quarantined = record.place.pack_id != record.place.key_id
        target = self._archive.quarantine_path(pack_id) if quarantined else self._archive.path(pack_id)
        try:
            if not (synced and target.exists()) and not self._archive.finish(target):
                with PackFile(self._archive.incoming / pack_id, write=True) as deposit:
                    if deposit.size != record.place.length:
                        raise pack.PackError("the deposit is not the one that its study key was sealed for")
                    self._archive.adopt(deposit)
            with PackFile(target) as archived:
                opened = open_pack(archived, self._keyring, record)
                judged = self._examiner.judge(opened, whole=False, pack_id=pack_id, fresh=False)
                found = [j for j in judged if isinstance(j, Judged)]
                kept = found if quarantined else [_settled(j) for j in found]
                self._file(pack_id, record.place, kept)
        except (OSError, pack.PackError, SealError, KeyringError, AnchorError) as error:
            log.error("pack %s is recorded but cannot be read: %s", pack_id, error)

    def _account_for(self, file: PackFile) -> None:
        """Remove a deposit that a crash left behind its admission; one that brings anything new collides.

        Raises:
            PackError: It holds a record that the archive does not.
        """
        pack_id = file.path.name
        target = self._archive.path(pack_id)
        if not self._archive.finish(target) and not self._copies:
            # Recorded, not yet moved: the rename was interrupted.
            self._archive.adopt(file)
            self._finish(pack_id)
            return
        if self._index.place_of(pack_id) != "objects":
            self._finish(pack_id)
        left = [frame for frame in frames(file) if not self._examiner.archived(file, frame)]
        if left:
            # Copies of what was held were left out; nothing else may be.
            judged = [
                j for j in self._examiner.judge(self._examiner.deposit(file), whole=True) if isinstance(j, Judged)
            ]
            again = {j.record.frame.offset for j in judged if j.verdict is Verdict.AGAIN}
            if not again.issuperset(frame.offset for frame in left):
                raise pack.PackError(OTHER_KEY)
        self._archive.remove_deposit(file.path)

    # --- decisions

    def decide(self, decision: Decision) -> None:
        """Record what an admin decided about a quarantined instance, and do it."""
        with self._lock:
            self._ledger.record(decision)
            self._apply(decision)

    def _apply(self, decision: Decision) -> None:
        """Do what was decided; nothing where it is done already."""
        if decision.kind == "discard":
            self._keys_db.remove(decision.pack_id)
            self._index.drop(decision.pack_id)
            self._archive.remove(self._archive.quarantine_path(decision.pack_id))
            return
        chosen = self._index.at(decision.pack_id, bytes.fromhex(decision.object_id))
        if chosen is None or self._index.state(chosen) != "quarantined":
            return
        other = self._index.at(decision.other_pack_id, bytes.fromhex(decision.other_object_id))
        if other is not None:
            self._index.swap(other, "replaced", decision.reason, chosen)
        else:
            self._index.set_state(chosen.pack_id, chosen.frame.offset, "held")
        path = self._archive.find(chosen.pack_id)
        if path is not None:
            with PackFile(path) as file:
                opened = open_pack(file, self._keyring, self._keys_db.find(chosen.pack_id))
                self._index.describe(opened.attributes(chosen.frame))

    def _read_all(self, pack_id: str, opened: OpenedPack) -> Findings:
        findings = Findings([], 0, pack.PAGE)
        for found in self._examiner.judge(opened, whole=True, pack_id=pack_id):
            if isinstance(found, Unreadable):
                findings.unreadable += 1
                self._report(pack_id, found)
            else:
                findings.judged.append(found)
                findings.end = found.record.frame.end
        return findings

    # --- telling

    def _report(self, pack_id: str, found: Unreadable) -> None:
        now = clock.now()
        if self._index.note_unreadable(pack_id, found.offset, found.reason, now):
            log.error("pack %s at offset %d does not open: %s", pack_id, found.offset, found.reason)

    def _set_aside(self, path: Path, reason: str) -> None:
        """Put a deposit that cannot be admitted into quarantine under a random name; re-seal its key if that opens."""
        name = secrets.token_hex(16)
        log.error("deposit %s goes to quarantine as %s: %s", path.name, name, reason)
        try:
            self._archive.keep_raw(path, name)
            with contextlib.suppress(pack.PackError, SealError, KeyringError, AnchorError):
                self._file_raw(name)
            if self._keys_db.find(path.name) is None:
                self._index.drop(path.name)
            self._archive.remove_deposit(path)
        except OSError as error:
            self._say_once(path.name, f"deposit {path.name} cannot be set aside: {error.strerror}")

    def _file_raw(self, pack_id: str) -> None:
        with PackFile(self._archive.quarantine_path(pack_id)) as file:
            if file.header.store_id != self._keyring.store_id or not file.header.version:
                return
            opened = open_pack(file, self._keyring, None)
            records = [found for found in opened.records() if isinstance(found, Record)]
            study = records[0].attributes.text(attributes.STUDY) if records else ""
            place = self._place(pack_id, opened, [r.frame for r in records], file.size, study)
            self._record_key(opened, place)
            judged = [Judged(record, Verdict.QUARANTINE, OTHER_KEY) for record in records]
            self._file(pack_id, place, judged)

    def _say_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.error("%s", message)

    def _tidy(self, present: set[str]) -> None:
        for pack_id in self._index.waiting_packs():
            if pack_id not in present and self._archive.find(pack_id) is None:
                log.error("pack %s is gone before it was admitted; its rows are removed", pack_id)
                self._index.drop(pack_id)
        for path in self._archive.unfinished():
            try:
                if time.time() - path.lstat().st_mtime > _UNFINISHED_SECONDS and not self._archive.is_locked(path):
                    path.unlink()
            except FileNotFoundError:
                # It was finished meanwhile, and has its name.
                continue
            except OSError:
                self._say_once(path.name, f"{path.name} in incoming is no deposit and cannot be removed")


def _never(_study: str) -> bool:
    return False


def study_tag(keyring: Keyring, study: str) -> bytes:
    """Return the keyed hash that stands for a study outside the index."""
    return hmac.digest(keyring.body.tag_key, b"study\0" + study.encode("ascii"), "sha256")


def _moved(judged: list[Judged], frames: list[pack.Frame]) -> list[Judged]:
    return [
        Judged(Record(frame, one.record.attributes), one.verdict, one.reason)
        for one, frame in zip(judged, frames, strict=True)
    ]


def _settled(judged: Judged) -> Judged:
    """Return what an archived record is judged as: it was kept once, so nothing quarantines it now."""
    if judged.verdict is Verdict.QUARANTINE:
        return Judged(judged.record, Verdict.AGAIN, judged.reason)
    return judged
