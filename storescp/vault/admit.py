"""Admission: deposits become archived packs, records become index rows. Every step can be repeated after a crash.

As one user (gate and vault alike): under the pack's lock the study key is re-sealed into ``keys.db``, the deposit's
key is zeroed, and the file moves into ``objects/``. See docs/design.md, "From socket to archive".
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from keys.anchors import AnchorError
from keys.keyring import Keyring, KeyringError
from keys.seal import SealError
from keys.versions import StudyKeyPlace
from storage import attributes, pack
from storage.index import Index, Place
from storage.keysdb import KeysDatabase, StudyKeyRecord
from storage.objects import Archive, OpenedPack, PackFile, Record, Unreadable, frames_digest

# A pack that was not finished making in this long never will be: its gate is gone.
_UNFINISHED_SECONDS = 60
_ROWS_AT_ONCE = 500

log = logging.getLogger(__name__)


class Admission:
    """Admits deposits, one caller at a time."""

    def __init__(self, archive: Archive, keyring: Keyring, keys_db: KeysDatabase, index: Index) -> None:
        self._archive = archive
        self._keyring = keyring
        self._keys_db = keys_db
        self._index = index
        self._lock = threading.Lock()

    def resume(self) -> None:
        """Finish what a crash interrupted: packs whose study key is recorded, but not their admission in the index."""
        with self._lock:
            for admission, pack_id in self._keys_db.packs_after(self._index.last_admission()):
                self._finish(admission, pack_id)

    def catch_up(self) -> int:
        """Admit every deposit that is closed, list the records of those that are open; return how many were admitted.

        When this returns, everything that was acknowledged before it was called can be found.
        """
        with self._lock:
            deposits = self._archive.deposits()
            admitted = sum(self._look_at(path) for path in deposits)
            self._tidy({path.name for path in deposits})
        return admitted

    def _look_at(self, path: Path) -> bool:
        try:
            with PackFile(path, write=True) as file:
                return self._admit(file) if file.try_lock() else self._list_open(file)
        except FileNotFoundError:
            return False
        except (pack.PackError, SealError) as error:
            self._set_aside(path, str(error))
        except (KeyringError, AnchorError, FileExistsError, OSError) as error:
            log.error("deposit %s is left where it is: %s", path.name, error)
        return False

    def _list_open(self, file: PackFile) -> bool:
        pack_id = file.path.name
        start = self._index.scanned(pack_id) or pack.PAGE
        if start < file.size:
            # What does not open in an open pack is no finding: its writer may not be done.
            self._add(pack_id, self._deposit(file), start, whole=False, report=False)
        return False

    def _admit(self, file: PackFile) -> bool:
        pack_id = file.path.name
        known = self._keys_db.find(pack_id)
        if known is not None:
            self._finish(known.place.admission, pack_id, file)
            return True
        opened = self._deposit(file)
        frames, unreadable, end = self._add(pack_id, opened, pack.PAGE, whole=True, report=True)
        if not frames:
            self._index.drop(pack_id)
            if unreadable:
                raise pack.PackError("no record in it opens")
            os.unlink(file.path)
            return False
        if not unreadable and end < file.size:
            # The tail of a writer that died: nothing in it was acknowledged.
            os.ftruncate(file.descriptor, end)
        study = self._index_study(opened, frames[0])
        place = StudyKeyPlace(
            file.header.key_id,
            file.header.key_id,
            study_tag(self._keyring, study),
            file.size,
            frames_digest(frames),
            self._keys_db.next_admission(),
        )
        current = self._keyring.current()
        self._keys_db.add(StudyKeyRecord(place, current.version, current.wrap_study(opened.key, place)))
        self._archive.admit(file)
        self._index.mark_admitted(pack_id, place.admission, place.length)
        return True

    def _index_study(self, opened: OpenedPack, frame: pack.Frame) -> str:
        return opened.attributes(frame).text(attributes.STUDY)

    def _finish(self, admission: int, pack_id: str, file: PackFile | None = None) -> None:
        """Bring a pack whose study key is recorded to where it belongs, and its rows into the index."""
        if file is not None:
            self._archive.admit(file)
        elif (self._archive.incoming / pack_id).exists() and not self._archive.path(pack_id).exists():
            with PackFile(self._archive.incoming / pack_id, write=True) as deposit:
                self._archive.admit(deposit)
        path = self._archive.path(pack_id)
        try:
            with PackFile(path) as archived:
                opened = self.open(archived)
                start = self._index.scanned(pack_id) or pack.PAGE
                self._add(pack_id, opened, start, whole=False, report=True)
                self._index.mark_admitted(pack_id, admission, archived.size)
        except (OSError, pack.PackError, SealError) as error:
            log.error("pack %s is recorded but cannot be read: %s", pack_id, error)

    def open(self, file: PackFile) -> OpenedPack:
        """Return a pack with its study key, wherever it is.

        Raises:
            SealError: Its key does not open, or the pack is not the one that the key was sealed for.
            KeyringError: Its key version is not in the keyring.
            AnchorError: The anchor of its key version is not here.
        """
        return open_pack(file, self._keyring, self._keys_db.find(file.path.name))

    def _deposit(self, file: PackFile) -> OpenedPack:
        if file.header.key_id.hex() != file.path.name or file.header.store_id != self._keyring.store_id:
            raise pack.PackError("its name or store is not the one in its header")
        if file.header.version == 0:
            raise pack.PackError("a deposit without a key that the store does not know")
        version = self._keyring.version(file.header.version)
        return OpenedPack(file, version.unwrap_deposit(file.header.wrapped, file.header.key_id))

    def _add(
        self, pack_id: str, opened: OpenedPack, start: int, *, whole: bool, report: bool
    ) -> tuple[list[pack.Frame], int, int]:
        """Put new records into the index; return frames, how many did not open, and where the pack ends."""
        scanned = self._index.scanned(pack_id)
        frames: list[pack.Frame] = []
        rows: list[tuple[Record, str]] = []
        batch: dict[str, Place] = {}
        study = ""
        unreadable = 0
        end = start
        for found in self._records(opened, start, whole=whole):
            if isinstance(found, Unreadable):
                if not report:
                    break
                unreadable += 1
                self._report(pack_id, found)
                continue
            study = study or found.attributes.text(attributes.STUDY)
            frames.append(found.frame)
            end = found.frame.end
            if found.frame.offset >= scanned:
                rows.append((found, self._state(found, opened, pack_id, batch)))
            if len(rows) >= _ROWS_AT_ONCE:
                self._index.add(pack_id, study, rows, pack.page_after(end))
                rows, batch = [], {}
        if rows:
            self._index.add(pack_id, study, rows, pack.page_after(end))
        return frames, unreadable, end

    def _records(self, opened: OpenedPack, start: int, *, whole: bool) -> Iterator[Record | Unreadable]:
        study = ""
        for found in opened.records(start, whole=whole):
            if isinstance(found, Record):
                study = study or found.attributes.text(attributes.STUDY)
                if found.attributes.text(attributes.STUDY) != study:
                    yield Unreadable(found.frame.offset, "a record of another study in the pack")
                    continue
            yield found

    def _state(self, record: Record, opened: OpenedPack, pack_id: str, batch: dict[str, Place]) -> str:
        uid = record.attributes.text(attributes.SOP_INSTANCE)
        first = batch.get(uid) or self._index.held(uid)
        if first is None:
            batch[uid] = Place(pack_id, record.frame, record.attributes.transfer_syntax)
            return "held"
        if first.transfer_syntax != record.attributes.transfer_syntax:
            return "encoding"
        if self._same(record, opened, first):
            return "same"
        log.warning(
            "object %s in pack %s has other content than the one held under its UID; the first stays",
            record.frame.object_id.hex(),
            pack_id,
        )
        return "conflict"

    def _same(self, record: Record, opened: OpenedPack, first: Place) -> bool:
        path = self._archive.find(first.pack_id)
        if path is None:
            return False
        try:
            with PackFile(path) as file:
                held = _digest(self.open(file).dataset(first.frame))
        except (OSError, pack.PackError, SealError, KeyringError, AnchorError):
            return False
        return held == _digest(opened.dataset(record.frame))

    def _report(self, pack_id: str, found: Unreadable) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if self._index.note_unreadable(pack_id, found.offset, found.reason, now):
            log.error("pack %s at offset %d does not open: %s", pack_id, found.offset, found.reason)

    def _set_aside(self, path: Path, reason: str) -> None:
        name = secrets.token_hex(16)
        log.error("deposit %s goes to quarantine as %s: %s", path.name, name, reason)
        self._index.drop(path.name)
        self._archive.set_aside(path, name)

    def _tidy(self, present: set[str]) -> None:
        for pack_id in self._index.waiting_packs():
            if pack_id not in present and self._archive.find(pack_id) is None:
                log.error("pack %s is gone before it was admitted; its rows are removed", pack_id)
                self._index.drop(pack_id)
        for path in self._archive.unfinished():
            try:
                if time.time() - path.stat().st_mtime > _UNFINISHED_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                continue


def open_pack(file: PackFile, keyring: Keyring, record: StudyKeyRecord | None) -> OpenedPack:
    """Return a pack with its study key: from its record if it has one, else as a deposit.

    Raises:
        SealError: Its key does not open, or the pack is not the one that the key was sealed for.
        KeyringError: Its key version is not in the keyring.
        AnchorError: The anchor of its key version is not here.
    """
    if record is None:
        version = keyring.version(file.header.version)
        return OpenedPack(file, version.unwrap_deposit(file.header.wrapped, file.header.key_id))
    if record.place.key_id != file.header.key_id or record.place.length != file.size:
        raise SealError("the pack is not the one that its study key was sealed for")
    return OpenedPack(file, keyring.version(record.version).unwrap_study(record.sealed, record.place))


def study_tag(keyring: Keyring, study: str) -> bytes:
    """Return the keyed hash that stands for a study outside the index."""
    return hmac.digest(keyring.body.tag_key, b"study\0" + study.encode("ascii"), "sha256")


def _digest(parts: Iterator[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
