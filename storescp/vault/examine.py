"""What a pack holds, record by record: opened, compared with what the archive has, and judged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import msgspec

from keys.keyring import Keyring, UnknownVersionError
from keys.seal import SealError
from storage import attributes, pack
from storage.archive import Archive
from storage.attributes import AttributesError
from storage.index import Index, Patient, Place
from storage.keysdb import KeysDatabase, StudyKeyRecord
from storage.packfile import OpenedPack, PackFile, Record, Unreadable
from storescp.vault.judge import OTHER_CONTENT, Verdict, judge, patient_of


class Judged(msgspec.Struct, frozen=True):
    """A record with its verdict."""

    record: Record
    verdict: Verdict
    reason: str


class Findings(msgspec.Struct):
    """What a deposit holds."""

    judged: list[Judged]
    unreadable: int
    end: int

    def padded(self) -> bool:
        """Tell whether nothing stands between records: what no seal covers must not carry anything into the archive."""
        return all(judged.record.padded for judged in self.judged[:-1])

    def of(self, *verdicts: Verdict) -> list[Judged]:
        """Return the records with one of these verdicts, in file order."""
        return [j for j in self.judged if j.verdict in verdicts]


class Examiner:
    """Judges records against the archive; changes nothing."""

    def __init__(
        self, archive: Archive, keyring: Keyring, keys_db: KeysDatabase, index: Index, erased: Callable[[str], bool]
    ) -> None:
        """Prepare to judge.

        Args:
            archive: The store's folders.
            keyring: Unlocked.
            keys_db: Of the judging thread alone.
            index: Of the judging thread alone.
            erased: Tells of a study of which nothing is held whether it was erased, so that somebody is to decide.
        """
        self._erased = erased
        self._archive = archive
        self._keyring = keyring
        self._keys_db = keys_db
        self._index = index

    def deposit(self, file: PackFile) -> OpenedPack:
        """Return a deposit, or the vault's copy of one, with its study key.

        Raises:
            PackError: It is none of this store's, or not under its own name.
            SealError: Its key does not open.
            KeyringError: Its key version is not in the keyring.
        """
        if file.header.key_id.hex() != file.path.name or file.header.store_id != self._keyring.store_id:
            raise pack.PackError("its name or store is not the one in its header")
        if file.header.version == 0:
            raise pack.PackError("a deposit without a key that the store does not know")
        version = self._keyring.version(file.header.version)
        return OpenedPack(file, version.unwrap_deposit(file.header.wrapped, file.header.key_id))

    def judge(
        self,
        opened: OpenedPack,
        *,
        start: int = pack.PAGE,
        whole: bool,
        closed: bool = True,
        pack_id: str = "",
        fresh: bool = True,
    ) -> Iterator[Judged | Unreadable]:
        """Yield each record of a pack with its verdict, and what does not open.

        Args:
            opened: The pack.
            start: Offset of the first record that is wanted.
            whole: Open data sets too, not only attributes.
            closed: Nobody writes the pack any more.
            pack_id: The pack's name, where it is not the file's.
            fresh: It is a deposit: what was admitted once is not asked about again.
        """
        pack_id = pack_id or opened.file.path.name
        first_study = self._index.study_of(pack_id) if start > pack.PAGE else ""
        patients: dict[str, Patient | None] = {}
        erased: dict[str, bool] = {}
        batch: dict[str, Place] = {}
        for found in opened.records(start, whole=whole, closed=closed):
            if isinstance(found, Unreadable):
                yield found
                continue
            study = found.attributes.text(attributes.STUDY)
            uid = found.attributes.text(attributes.SOP_INSTANCE)
            first_study = first_study or study
            if study not in patients:
                patients[study] = self._index.patient(study)
                erased[study] = fresh and patients[study] is None and self._erased(study)
            held = batch.get(uid) or self._index.held(uid, besides=pack_id)
            decided = judge(
                first_study=first_study,
                study=study,
                patient=patients[study],
                instance=patient_of(found.attributes),
                held_syntax=held.transfer_syntax if held else None,
                syntax=found.attributes.transfer_syntax,
                erased=erased[study],
            )
            verdict, reason = decided or self._compare(found, opened, held)
            if verdict is Verdict.HOLD:
                batch[uid] = Place(pack_id, found.frame, found.attributes.transfer_syntax)
                # The first instance says whom its study is about, for the others of its own pack too.
                patients[study] = patients[study] or patient_of(found.attributes)
            yield Judged(found, verdict, reason)

    def _compare(self, record: Record, opened: OpenedPack, held: Place | None) -> tuple[Verdict, str]:
        if held is None:
            return Verdict.HOLD, ""
        try:
            if held.pack_id == opened.file.path.name:
                first = _digest(opened.dataset(held.frame))
            else:
                path = self._archive.find(held.pack_id)
                if path is None:
                    raise FileNotFoundError(held.pack_id)
                with PackFile(path) as file:
                    other = open_pack(file, self._keyring, self._keys_db.find(held.pack_id))
                    first = _digest(other.dataset(held.frame))
                    # All that a scrub reads must be good, or a copy that is sent again would not heal it.
                    other.attributes(held.frame)
                    if file.read(held.frame.offset, pack.FRAME_BYTES) != held.frame.encode():
                        raise pack.PackError("the frame is not the one that was admitted")
        except (OSError, pack.PackError, SealError, AttributesError, UnknownVersionError):
            # Not for a version whose anchor is away: what is held opens again, and the deposit waits till then.
            return Verdict.HEAL, "the one that was held opens no more"
        if first == _digest(opened.dataset(record.frame)):
            return Verdict.AGAIN, "identical content is held"
        return Verdict.QUARANTINE, OTHER_CONTENT

    def held_safely(self, record: Record, pack_id: str) -> bool:
        """Tell whether the instance that a record repeats is admitted, so that the record can go."""
        held = self._index.held(record.attributes.text(attributes.SOP_INSTANCE), besides=pack_id)
        if held is None:
            return False
        path = self._archive.find(held.pack_id)
        return path is None or not self._archive.is_deposit(path)

    def archived(self, file: PackFile, frame: pack.Frame) -> bool:
        """Tell whether the archive holds a record byte for byte, wherever in it."""
        for place in self._index.of_object(frame.object_id):
            path = self._archive.find(place.pack_id)
            if path is None or path == file.path or place.frame.encode() != frame.encode():
                continue
            with PackFile(path) as other:
                if _range_digest(other, place.frame) == _range_digest(file, frame):
                    return True
        return False


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


def frames(file: PackFile) -> Iterator[pack.Frame]:
    """Yield the frames of a pack, as far as they can be located; nothing is opened."""
    size = file.size
    offset: int | None = pack.PAGE
    while offset is not None:
        try:
            frame = pack.frame_at(file.read, offset, size)
        except pack.PackError:
            offset = pack.resync(file.read, offset, size)
            continue
        if frame is None:
            return
        yield frame
        offset = pack.page_after(frame.end)


def _digest(parts: Iterator[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _range_digest(file: PackFile, frame: pack.Frame) -> bytes:
    starts = range(frame.dataset_start, frame.end, 1 << 20)
    return _digest(file.read(start, min(1 << 20, frame.end - start)) for start in starts)
