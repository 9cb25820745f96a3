"""Filing: a pack whose study key is recorded gets its place, its records their rows; also again, after a crash."""

from __future__ import annotations

import hmac
import logging

from keys.anchors import AnchorError
from keys.keyring import Keyring, KeyringError
from keys.seal import SealError
from keys.versions import StudyKeyPlace
from storage import attributes, pack
from storage.archive import Archive
from storage.index import Index, Row
from storage.keysdb import KeysDatabase, StudyKeyRecord
from storage.ledger import Decision, Ledger
from storage.packfile import OpenedPack, PackFile, Record, frames_digest
from storescp.vault.examine import Examiner, Judged, open_pack
from storescp.vault.judge import Verdict
from storescp.vault.repack import settle

log = logging.getLogger(__name__)


class Filing:
    """Files what admission, or an admin, decided. Of the admitting thread alone, as what it works on."""

    def __init__(
        self,
        archive: Archive,
        keyring: Keyring,
        keys_db: KeysDatabase,
        index: Index,
        ledger: Ledger,
        examiner: Examiner,
    ) -> None:
        self._archive = archive
        self._keyring = keyring
        self._keys_db = keys_db
        self._index = index
        self._ledger = ledger
        self._examiner = examiner

    def place(
        self, pack_id: str, opened: OpenedPack, frames: list[pack.Frame], length: int, study: str
    ) -> StudyKeyPlace:
        """Return what the study key of a pack with these frames is bound to, with the next admission number."""
        return StudyKeyPlace(
            bytes.fromhex(pack_id),
            opened.file.header.key_id,
            study_tag(self._keyring, study),
            length,
            frames_digest(frames),
            self._keys_db.next_admission(),
        )

    def record_key(self, opened: OpenedPack, place: StudyKeyPlace) -> None:
        """Record a study key durably, under the current version."""
        current = self._keyring.current()
        self._keys_db.add(StudyKeyRecord(place, current.version, current.wrap_study(opened.key, place)))

    def file(self, pack_id: str, place: StudyKeyPlace, judged: list[Judged]) -> None:
        """Give the records of a pack that has its place their rows."""
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

    def finish_all(self) -> None:
        """Finish every pack whose study key is recorded, but not its admission in the index."""
        # First: a pack that has its new key, and in the index still its old name, is not to be judged anew.
        settle(self._archive, self._keys_db, self._index, self._ledger)
        indexed = self._index.archived_packs()
        for pack_id in self._keys_db.packs():
            if pack_id not in indexed:
                self.finish(pack_id)

    def finish(self, pack_id: str, *, synced: bool = False) -> None:
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
                # One user's, which moves where it lies: of another one's, a copy has its place already.
                [path, *_] = self._archive.waiting(pack_id) or [target]
                with PackFile(path, write=True) as deposit:
                    if deposit.size != record.place.length:
                        raise pack.PackError("the deposit is not the one that its study key was sealed for")
                    self._archive.adopt(deposit)
            with PackFile(target) as archived:
                opened = open_pack(archived, self._keyring, record)
                judged = self._examiner.judge(opened, whole=False, pack_id=pack_id, fresh=False)
                found = [j for j in judged if isinstance(j, Judged)]
                kept = found if quarantined else [_settled(j) for j in found]
                self.file(pack_id, record.place, kept)
        except (OSError, pack.PackError, SealError, KeyringError, AnchorError) as error:
            log.error("pack %s is recorded but cannot be read: %s", pack_id, error)

    def apply(self, decision: Decision) -> None:
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


def study_tag(keyring: Keyring, study: str) -> bytes:
    """Return the keyed hash that stands for a study outside the index."""
    return hmac.digest(keyring.body.tag_key, b"study\0" + study.encode("ascii"), "sha256")


def _settled(judged: Judged) -> Judged:
    """Return what an archived record is judged as: it was kept once, so nothing quarantines it now."""
    if judged.verdict is Verdict.QUARANTINE:
        return Judged(judged.record, Verdict.AGAIN, judged.reason)
    return judged
