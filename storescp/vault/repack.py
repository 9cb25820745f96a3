"""Packs under new study keys: built beside the old ones, verified, and exchanged at one moment; finished after a crash.

``keys.db`` decides: a new pack whose key record is there stands in the old one's place, and what is left to do is
done; of one without a record everything is undone.
Source: docs/format.md, section 3; docs/keys.md.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path

from keys.seal import SealError
from keys.versions import StudyKeyPlace, Version, new_key
from storage import pack
from storage.archive import Archive
from storage.index import Index
from storage.keysdb import KeysDatabase, StudyKeyRecord
from storage.ledger import Ledger, Moved
from storage.packfile import OpenedPack, PackFile, frames_digest
from storage.reseal import frames, opened_whole, reseal
from storescp import clock

log = logging.getLogger(__name__)


class Repack:
    """One pack on its way: the old one, open, and the name and key of the new one."""

    def __init__(self, archive: Archive, path: Path, record: StudyKeyRecord, version: Version) -> None:
        """Open the old pack.

        Raises:
            OSError: It is not there.
            PackError: It is no pack.
            SealError: Its study key does not open, or it is not the pack that this was sealed for.
        """
        self.record = record
        quarantined = record.place.pack_id != record.place.key_id
        key_id = secrets.token_bytes(16)
        self.place = StudyKeyPlace(
            secrets.token_bytes(16) if quarantined else key_id,
            key_id,
            record.place.study_tag,
            0,
            record.place.frames_digest,
            record.place.admission,
        )
        self.moved = Moved(record.pack_id, self.place.pack_id.hex())
        self.length = record.place.length
        self._archive = archive
        self._target = _place_of(archive, self.moved.new, quarantined=quarantined)
        self._key = new_key()
        self._file = PackFile(path)
        self._opened = OpenedPack(self._file, bytearray())
        try:
            if record.place.key_id != self._file.header.key_id or record.place.length != self._file.size:
                raise SealError("the pack is not the one that its study key was sealed for")
            self._opened.key = version.unwrap_study(record.sealed, record.place)
        except BaseException:
            self.close()
            raise

    def build(self) -> Iterator[int]:
        """Write the new pack durably, open it whole, and compare; yield how many bytes were done since.

        Raises:
            PackError: The old pack is damaged, or what was written is not the same.
            SealError: A record does not open.
            OSError: The disk refused it.
        """
        header = pack.Header(self._file.header.store_id, self.place.key_id, 0, b"")
        records = frames(self._opened)
        # That none is missing; a record that does not open shows when it is read.
        if not records or frames_digest(records) != self.record.place.frames_digest:
            raise pack.PackError("its records are not those that were archived")
        with self._archive.making(self._target) as descriptor:
            before = yield from reseal(self._opened, records, header, self._key, descriptor)
        with PackFile(self._archive.made(self._target)) as made:
            if made.header != header or made.size != records[-1].end:
                raise pack.PackError("what was written is not what is read back")
            opened = OpenedPack(made, self._key)
            after = yield from opened_whole(opened, records)
            if frames(opened) != records or after != before:
                raise pack.PackError("what was written is not what is read back")
            place = self.place
            self.place = StudyKeyPlace(
                place.pack_id, place.key_id, place.study_tag, made.size, place.frames_digest, place.admission
            )

    def new_record(self, current: Version) -> StudyKeyRecord:
        """Return the new pack's key record."""
        return StudyKeyRecord(self.place, current.version, current.wrap_study(self._key, self.place))

    def discard(self) -> None:
        """Remove the new pack, which nobody knows of yet."""
        self._archive.made(self._target).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the old pack, and forget both keys."""
        self._file.close()
        for key in (self._key, self._opened.key):
            key[:] = bytes(len(key))


def settle(archive: Archive, keys_db: KeysDatabase, index: Index, ledger: Ledger) -> None:
    """Finish each exchange of packs whose new key is recorded, and undo the others. Can be repeated after a crash.

    Raises:
        OSError, DatabaseError: The disk refused it; nothing may be admitted before it was repeated.
    """
    moves = [move for move in ledger.unsettled() if move.new not in archive.building]
    for move in moves:
        record = keys_db.find(move.new)
        if record is None:
            for quarantined in (False, True):
                archive.made(_place_of(archive, move.new, quarantined=quarantined)).unlink(missing_ok=True)
            ledger.settle([move], "")
            continue
        quarantined = record.place.pack_id != record.place.key_id
        if not archive.finish(_place_of(archive, move.new, quarantined=quarantined)):
            # The old one stays: with an older keys.db it still opens.
            log.error("pack %s is recorded, and is not there", move.new)
            ledger.settle([move], clock.now())
            continue
        index.move(move.old, move.new, record.place.length)
        with contextlib.suppress(FileNotFoundError):
            archive.remove(_place_of(archive, move.old, quarantined=quarantined))
        ledger.settle([move], clock.now())
    if moves:
        keys_db.forget()


def _place_of(archive: Archive, pack_id: str, *, quarantined: bool) -> Path:
    return archive.quarantine_path(pack_id) if quarantined else archive.path(pack_id)
