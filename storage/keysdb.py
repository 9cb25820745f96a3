"""``keys.db``: the wrapped study keys of admitted packs. Plain SQLite, sealed content.

Source: docs/format.md, section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from keys.versions import StudyKeyPlace
from storage.sqlite import Database, Migrations, checkpoint, connect, copy, transaction

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


@_MIGRATIONS(name="2-last-admission")
def _last_admission(db: Database) -> None:
    # Apart from the records: a number must not come again when the record that had it was removed.
    db.execute("CREATE TABLE last_admission (number INTEGER NOT NULL) STRICT")
    db.execute("INSERT INTO last_admission SELECT coalesce(max(admission), 0) FROM study_key")


@_MIGRATIONS(name="3-key-id")
def _key_id(db: Database) -> None:
    db.table("study_key").create_index(["key_id"])


class StudyKeyRecord(msgspec.Struct, frozen=True):
    """One row: a wrapped study key and what it is bound to."""

    place: StudyKeyPlace
    version: int
    sealed: bytes

    @property
    def pack_id(self) -> str:
        """The pack's name."""
        return self.place.pack_id.hex()


class _ChangedError(Exception):
    """A record is not as it was."""


class KeysDatabase:
    """The study key records of a store. Used by one thread at a time."""

    def __init__(self, path: Path, *, migrate: bool = False, immutable: bool = False) -> None:
        self._db = connect(path, immutable=immutable)
        if migrate:
            _MIGRATIONS.apply(self._db)

    def close(self) -> None:
        """Close the database."""
        self._db.conn.close()

    def next_admission(self) -> int:
        """Return the number of the next admission; numbers are never used twice."""
        return int(self._db.execute("SELECT number FROM last_admission").fetchone()[0]) + 1

    def add(self, record: StudyKeyRecord) -> None:
        """Add a record durably.

        Raises:
            DatabaseError: The pack has one, or the admission number is taken.
        """
        with transaction(self._db):
            self._insert(record)
            self._db.execute("UPDATE last_admission SET number = ?", [record.place.admission])

    def _insert(self, record: StudyKeyRecord) -> None:
        place = record.place
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

    def exchange(self, changes: list[tuple[StudyKeyRecord, StudyKeyRecord]]) -> bool:
        """Put records of other packs in the place of some, all at once; tell whether they were as they were read.

        Under another version an old record may be by now: it is the same key. New ones keep the numbers of their
        admission, so that packs stay in the order in which they came.
        """
        try:
            with transaction(self._db):
                for old, _ in changes:
                    place = old.place
                    gone = self._db.execute(
                        "DELETE FROM study_key WHERE pack_id = ? AND key_id = ? AND study_tag = ? AND length = ?"
                        " AND frames_digest = ? AND admission = ?",
                        [
                            place.pack_id.hex(),
                            place.key_id.hex(),
                            place.study_tag,
                            place.length,
                            place.frames_digest,
                            place.admission,
                        ],
                    )
                    if gone.rowcount != 1:
                        raise _ChangedError
                for _, new in changes:
                    self._insert(new)
        except _ChangedError:
            return False
        return True

    def remove(self, *pack_ids: str) -> None:
        """Remove the records of packs, from the file and, as far as no reader is in the way, from the log before it."""
        with transaction(self._db):
            for pack_id in pack_ids:
                self._db.execute("DELETE FROM study_key WHERE pack_id = ?", [pack_id])
        checkpoint(self._db)

    def find(self, pack_id: str) -> StudyKeyRecord | None:
        """Return a pack's record, or None."""
        row = self._db.execute("SELECT * FROM study_key WHERE pack_id = ?", [pack_id]).fetchone()
        return None if row is None else _record(row)

    def records(self, *, after: str = "", not_version: int = 0, limit: int = -1) -> list[StudyKeyRecord]:
        """Return records in the order of their packs' names.

        Args:
            after: Only those behind this name.
            not_version: Only those that are wrapped under another version; 0 for all.
            limit: At most so many.
        """
        rows = self._db.execute(
            "SELECT * FROM study_key WHERE pack_id > ? AND version <> ? ORDER BY pack_id LIMIT ?",
            [after, not_version, limit],
        )
        return [_record(row) for row in rows]

    def of_study(self, tag: bytes) -> list[StudyKeyRecord]:
        """Return the records of a study, by its keyed tag."""
        return [_record(row) for row in self._db.execute("SELECT * FROM study_key WHERE study_tag = ?", [tag])]

    def of_key(self, key_id: bytes) -> list[StudyKeyRecord]:
        """Return the records under a key id, in the order of their admission: one study key may have several packs."""
        sql = "SELECT * FROM study_key WHERE key_id = ? ORDER BY admission"
        return [_record(row) for row in self._db.execute(sql, [key_id.hex()])]

    def chosen(self, *, tag: bytes = b"", version: int = 0) -> list[str]:
        """Return packs in the order of their admission: those of a study, those under a version, or all."""
        where, values = ("WHERE study_tag = ?", [tag]) if tag else ("WHERE version = ?", [version])
        if not (tag or version):
            where, values = "", []
        rows = self._db.execute(f"SELECT pack_id FROM study_key {where} ORDER BY admission", values)  # noqa: S608
        return [str(row[0]) for row in rows]

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read one state of the records meanwhile, whatever others change. Not to be changed by this connection."""
        self._db.conn.execute("BEGIN")
        try:
            yield
        finally:
            self._db.conn.execute("ROLLBACK")

    def versions(self) -> dict[int, int]:
        """Return how many records are wrapped under each version."""
        return dict(self._db.execute("SELECT version, count(*) FROM study_key GROUP BY version").fetchall())

    def rewrap(self, changes: list[tuple[StudyKeyRecord, int, bytes]]) -> int:
        """Replace sealed keys by others of another version, all in one transaction; return how many.

        A record that somebody changed or removed meanwhile stays as it is: the next look finds it again, or not.

        Args:
            changes: The record as it was read, the new version, the key sealed under it.
        """
        with transaction(self._db):
            done = [
                self._db.execute(
                    "UPDATE study_key SET version = ?, sealed = ? WHERE pack_id = ? AND version = ? AND sealed = ?",
                    [version, sealed, record.pack_id, record.version, record.sealed],
                ).rowcount
                for record, version, sealed in changes
            ]
        return sum(done)

    def forget(self) -> None:
        """Write what was changed into the file, so that the log in front of it holds nothing old."""
        checkpoint(self._db)

    def admitted(self, after: int, limit: int) -> list[StudyKeyRecord]:
        """Return records in the order of their admission, those behind a number, at most so many."""
        rows = self._db.execute(
            "SELECT * FROM study_key WHERE admission > ? ORDER BY admission LIMIT ?", [after, limit]
        )
        return [_record(row) for row in rows]

    def packs(self) -> list[str]:
        """Return the packs that have a record, in the order of their admission."""
        return [str(row[0]) for row in self._db.execute("SELECT pack_id FROM study_key ORDER BY admission")]

    def lengths(self) -> Iterator[tuple[str, int]]:
        """Yield the packs in the order of their names, each with its length in bytes."""
        for row in self._db.execute("SELECT pack_id, length FROM study_key ORDER BY pack_id"):
            yield str(row[0]), int(row[1])

    def sizes(self) -> tuple[int, int]:
        """Return how many packs have a record, and their bytes."""
        row = self._db.execute("SELECT count(*), coalesce(sum(length), 0) FROM study_key").fetchone()
        return int(row[0]), int(row[1])

    def copy(self, path: Path) -> None:
        """Copy the records to another file, durably."""
        copy(self._db, path, None)

    def count(self) -> int:
        """Return how many packs have a record."""
        return int(self._db.execute("SELECT count(*) FROM study_key").fetchone()[0])


def _record(row: Any) -> StudyKeyRecord:
    place = StudyKeyPlace(bytes.fromhex(row[0]), bytes.fromhex(row[1]), row[4], row[5], row[6], row[7])
    return StudyKeyRecord(place, row[2], row[3])
