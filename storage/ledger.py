"""The ledger: what packs do not say and cannot be rebuilt from them.

Today: decisions about quarantined instances, the head of the audit chain, and when each certificate was last used.

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


@_MIGRATIONS(name="2-audit")
def _audit(db: Database) -> None:
    db.table("audit_head").create({"id": int, "number": int, "hash": bytes, "transcribed": int}, pk="id", strict=True)
    db.table("certificate_use").create(
        {"certificate": str, "title": str, "address": str, "last": str}, pk="certificate"
    )


class Head(msgspec.Struct, frozen=True):
    """How far the audit chain is known to have come; records up to ``transcribed`` open with the audit key."""

    number: int
    hash: bytes
    transcribed: int


class CertificateUse(msgspec.Struct, frozen=True):
    """When a certificate last came with an association: its SHA-256, whose it was, from where, RFC 3339."""

    certificate: str
    title: str
    address: str
    last: str


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

    def audit_head(self) -> Head | None:
        """Return the last known head of the audit chain."""
        rows = self._db.execute("SELECT number, hash, transcribed FROM audit_head WHERE id = 1").fetchall()
        return Head(*rows[0]) if rows else None

    def set_audit_head(self, head: Head) -> None:
        """Keep the head of the audit chain."""
        with transaction(self._db):
            self._db.execute(
                "INSERT OR REPLACE INTO audit_head (id, number, hash, transcribed) VALUES (1, ?, ?, ?)",
                [head.number, head.hash, head.transcribed],
            )

    def used(self, uses: list[CertificateUse]) -> None:
        """Keep when certificates were used; an older time than the known one changes nothing."""
        with transaction(self._db):
            for use in uses:
                self._db.execute(
                    "INSERT INTO certificate_use (certificate, title, address, last) VALUES (?, ?, ?, ?)"
                    " ON CONFLICT (certificate) DO UPDATE SET title = excluded.title, address = excluded.address,"
                    " last = excluded.last WHERE excluded.last > last",
                    [use.certificate, use.title, use.address, use.last],
                )

    def certificate_uses(self) -> list[CertificateUse]:
        """Return when each certificate was last used."""
        rows = self._db.execute("SELECT certificate, title, address, last FROM certificate_use ORDER BY title, last")
        return [CertificateUse(*row) for row in rows]
