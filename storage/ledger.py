"""The ledger: what packs do not say and cannot be rebuilt from them. Today the decisions about quarantined instances.

SQLCipher under a key of the version; part of every backup.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from storage.sqlite import Database, Migrations, connect, transaction

_MIGRATIONS = Migrations("ledger")


@_MIGRATIONS(name="1-decision")
def _decision(db: Database) -> None:
    db.table("decision").create(
        {
            "id": int,
            "at": str,
            "uid": int,
            "kind": str,
            "pack_id": str,
            "object_id": str,
            "other_pack_id": str,
            "other_object_id": str,
            "reason": str,
        },
        pk="id",
        strict=True,
    )


class Decision(msgspec.Struct, frozen=True):
    """What somebody decided about a quarantined instance, and which one it concerned besides.

    ``kind`` is ``accept`` (it is held from now on, in place of the other, if there was one) or ``discard`` (it was
    removed).
    """

    at: str
    uid: int
    kind: str
    pack_id: str
    object_id: str
    other_pack_id: str
    other_object_id: str
    reason: str


class Ledger:
    """The ledger of one key version. Used by one thread at a time."""

    def __init__(self, path: Path, key: tuple[bytes, bytes], *, migrate: bool = False) -> None:
        self._db = connect(path, key)
        if migrate:
            _MIGRATIONS.apply(self._db)

    def close(self) -> None:
        """Close the database."""
        self._db.conn.close()

    def record(self, decision: Decision) -> None:
        """Record a decision durably."""
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO decision (at, uid, kind, pack_id, object_id, other_pack_id, other_object_id, reason)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                list(msgspec.structs.astuple(decision)),
            )

    def decisions(self) -> list[Decision]:
        """Return all decisions in the order in which they were made."""
        rows = self._db.execute(
            "SELECT at, uid, kind, pack_id, object_id, other_pack_id, other_object_id, reason FROM decision ORDER BY id"
        )
        return [Decision(*row) for row in rows]
