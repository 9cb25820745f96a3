"""Intake: one closed deposit becomes an archived pack, what must not stand beside it goes to quarantine.

Where gate and vault are one user, a deposit under its lock can change no more and moves into the archive by a
rename. Where the gate is another user it keeps descriptors and links whatever its file is called, so the vault
copies first and believes only the copy. A record that must not stand beside the others (other content under a UID
that is held, another patient than its study's) goes into a quarantined pack of its own, under the same study key and
a key record of its own. See docs/design.md, "Admission".
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from pathlib import Path

from keys.anchors import AnchorError
from keys.keyring import Keyring, KeyringError
from keys.seal import SealError
from storage import attributes, pack
from storage.archive import Archive
from storage.index import Index
from storage.keysdb import KeysDatabase
from storage.packfile import OpenedPack, PackFile, Record, Unreadable
from storescp import clock
from storescp.vault.examine import Examiner, Findings, Judged, frames, open_pack
from storescp.vault.filing import Filing
from storescp.vault.judge import OTHER_KEY, Verdict

log = logging.getLogger(__name__)


class Intake:
    """Takes one deposit at a time. Of the admitting thread alone, as what it works on."""

    def __init__(
        self,
        archive: Archive,
        keyring: Keyring,
        keys_db: KeysDatabase,
        index: Index,
        examiner: Examiner,
        filing: Filing,
        *,
        copies: bool,
    ) -> None:
        self._archive = archive
        self._keyring = keyring
        self._keys_db = keys_db
        self._index = index
        self._examiner = examiner
        self._filing = filing
        self._copies = copies

    def admit(self, file: PackFile) -> bool:
        """Admit a deposit under its lock; tell whether it brought anything.

        Raises:
            PackError, SealError, AttributesError, UnknownVersionError: It never can be.
            KeyringError, AnchorError, OSError, DatabaseError: It cannot be now.
        """
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

    def _report(self, pack_id: str, found: Unreadable) -> None:
        now = clock.now()
        if self._index.note_unreadable(pack_id, found.offset, found.reason, now):
            log.error("pack %s at offset %d does not open: %s", pack_id, found.offset, found.reason)

    def _admit_whole(self, source: PackFile, opened: OpenedPack, findings: Findings) -> None:
        pack_id = source.path.name
        if not findings.unreadable and findings.end < source.size:
            # The tail of a writer that died: nothing in it was acknowledged.
            os.ftruncate(source.descriptor, findings.end)
        frames = [j.record.frame for j in findings.judged]
        place = self._filing.place(pack_id, opened, frames, source.size, _study(findings.judged))
        if self._copies:
            self._archive.make_ready(source)
            self._filing.record_key(opened, place)
            self._archive.finish(self._archive.path(pack_id))
        else:
            self._filing.record_key(opened, place)
            self._archive.adopt(source)
        self._filing.file(pack_id, place, findings.judged)

    def _admit_part(self, source: PackFile, opened: OpenedPack, kept: list[Judged]) -> None:
        pack_id = source.path.name
        target = self._archive.path(pack_id)
        moved = self._archive.build(source, [j.record.frame for j in kept], target)
        place = self._filing.place(pack_id, opened, moved, moved[-1].end, _study(kept))
        self._filing.record_key(opened, place)
        self._archive.finish(target)
        self._filing.file(pack_id, place, _moved(kept, moved))

    def _quarantine(self, opened: OpenedPack, judged: Judged) -> None:
        """Put one record into a quarantined pack of its own, unless a crash left it there."""
        if self._examiner.archived(opened.file, judged.record.frame):
            return
        pack_id = secrets.token_hex(16)
        target = self._archive.quarantine_path(pack_id)
        moved = self._archive.build(opened.file, [judged.record.frame], target)
        place = self._filing.place(pack_id, opened, moved, moved[-1].end, _study([judged]))
        self._filing.record_key(opened, place)
        self._archive.finish(target)
        log.warning("object %s goes to quarantine as %s: %s", moved[0].object_id.hex(), pack_id, judged.reason)
        self._filing.file(pack_id, place, _moved([judged], moved))

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
            self._filing.finish(pack_id)
            return
        if self._index.place_of(pack_id) != "objects":
            self._filing.finish(pack_id)
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

    def set_aside(self, path: Path, reason: str) -> None:
        """Put a deposit that cannot be admitted into quarantine under a random name; re-seal its key if that opens.

        Raises:
            OSError: The disk refused it; the deposit is where it was.
        """
        name = secrets.token_hex(16)
        log.error("deposit %s goes to quarantine as %s: %s", path.name, name, reason)
        self._archive.keep_raw(path, name)
        with contextlib.suppress(pack.PackError, SealError, KeyringError, AnchorError):
            self._file_raw(name)
        if self._keys_db.find(path.name) is None:
            self._index.drop(path.name)
        self._archive.remove_deposit(path)

    def _file_raw(self, pack_id: str) -> None:
        with PackFile(self._archive.quarantine_path(pack_id)) as file:
            if file.header.store_id != self._keyring.store_id or not file.header.version:
                return
            opened = open_pack(file, self._keyring, None)
            records = [found for found in opened.records() if isinstance(found, Record)]
            study = records[0].attributes.text(attributes.STUDY) if records else ""
            place = self._filing.place(pack_id, opened, [r.frame for r in records], file.size, study)
            self._filing.record_key(opened, place)
            judged = [Judged(record, Verdict.QUARANTINE, OTHER_KEY) for record in records]
            self._filing.file(pack_id, place, judged)


def _study(judged: list[Judged]) -> str:
    return judged[0].record.attributes.text(attributes.STUDY)


def _moved(judged: list[Judged], frames: list[pack.Frame]) -> list[Judged]:
    return [
        Judged(Record(frame, one.record.attributes), one.verdict, one.reason)
        for one, frame in zip(judged, frames, strict=True)
    ]
