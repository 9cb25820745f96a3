"""``keys.db``: the wrapped study keys of admitted packs. Plain SQLite, sealed content.

Source: docs/format.md, section 3.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from keys.versions import StudyKeyPlace
from storage.sqlite import Database, Migrations, connect, transaction

_MIGRATIONS = Migrations("keys")


@_MIGRATIONS(name="1-study-key")
def _study_key(db: Database) -> None:
    db.table("study_key").create(
        {
            "pack_id": str,
            "key_id": str,
            "version": int,
            "sealed": bytes,
            "study_tag": bytes,
            "length": int,
            "frames_digest": bytes,
            "admission": int,
        },
        pk="pack_id",
        not_null={"key_id", "version", "sealed", "study_tag", "length", "frames_digest", "admission"},
        strict=True,
    )
    db.table("study_key").create_index(["admission"], unique=True)
    db.table("study_key").create_index(["study_tag"])
    db.table("study_key").create_index(["version"])


class StudyKeyRecord(msgspec.Struct, frozen=True):
    """One row: a wrapped study key and what it is bound to."""

    place: StudyKeyPlace
    version: int
    sealed: bytes

    @property
    def pack_id(self) -> str:
        """The pack's name."""
        return self.place.pack_id.hex()


class KeysDatabase:
    """The study key records of a store. Used by one thread at a time."""

    def __init__(self, path: Path, *, migrate: bool = False) -> None:
        self._db = connect(path)
        if migrate:
            _MIGRATIONS.apply(self._db)

    def close(self) -> None:
        """Close the database."""
        self._db.conn.close()

    def next_admission(self) -> int:
        """Return the number of the next admission; numbers are never used twice."""
        (last,) = self._db.execute("SELECT coalesce(max(admission), 0) FROM study_key").fetchone()
        return int(last) + 1

    def add(self, record: StudyKeyRecord) -> None:
        """Add a record durably.

        Raises:
            DatabaseError: The pack has one, or the admission number is taken.
        """
        place = record.place
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO study_key VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    place.pack_id.hex(),
                    place.key_id.hex(),
                    record.version,
                    record.sealed,
                    place.study_tag,
                    place.length,
                    place.frames_digest,
                    place.admission,
                ],
            )

    def remove(self, pack_id: str) -> None:
        """Remove a pack's record, from the file and from the log in front of it."""
        with transaction(self._db):
            self._db.execute("DELETE FROM study_key WHERE pack_id = ?", [pack_id])
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def find(self, pack_id: str) -> StudyKeyRecord | None:
        """Return a pack's record, or None."""
        row = self._db.execute("SELECT * FROM study_key WHERE pack_id = ?", [pack_id]).fetchone()
        if row is None:
            return None
        place = StudyKeyPlace(bytes.fromhex(row[0]), bytes.fromhex(row[1]), row[4], row[5], row[6], row[7])
        return StudyKeyRecord(place, row[2], row[3])

    def packs_after(self, admission: int) -> list[tuple[int, str]]:
        """Return the admission numbers and names of packs admitted after a number, in order."""
        rows = self._db.execute(
            "SELECT admission, pack_id FROM study_key WHERE admission > ? ORDER BY admission", [admission]
        )
        return [(int(number), str(name)) for number, name in rows]

    def count(self) -> int:
        """Return how many packs have a record."""
        return int(self._db.execute("SELECT count(*) FROM study_key").fetchone()[0])
