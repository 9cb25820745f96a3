"""The ledger: what packs do not say and cannot be rebuilt from them.

Today: decisions about quarantined instances, the head of the audit chain, and when each certificate was last used.

SQLCipher under a key of the version; part of every backup.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from storage.sqlite import Database, Migrations, connect, copy, transaction

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


@_MIGRATIONS(name="3-rotation")
def _rotation(db: Database) -> None:
    db.table("rotation").create({"version": int, "content": str}, pk="version", strict=True)


class Rotation(msgspec.Struct):
    """A change of the key version; times are RFC 3339.

    ``version`` is the new one, ``old`` the one before. ``sealed_off`` are the deposits under the old version that were
    there when no worker could make another one; None before. ``proof`` is signed. ``waived`` says why a confirmation is
    not waited for, by its kind (``export``, ``backup``).
    """

    version: int
    old: int
    uid: int
    reason: str
    begun: str
    waived: dict[str, str] = msgspec.field(default_factory=dict)
    sealed_off: list[str] | None = None
    proof: str = ""
    proved: str = ""
    destroyed: str = ""


@_MIGRATIONS(name="4-erasure")
def _erasure(db: Database) -> None:
    db.table("erasure").create({"id": str, "tag": bytes, "content": str}, pk="id", strict=True)
    db.table("erasure").create_index(["tag"])


class Erasure(msgspec.Struct):
    """The erasure of a study, and what is left of it: a keyed hash; times are RFC 3339.

    ``packs`` are the packs that it concerns, ``fenced`` those of them that gates were told to let go. ``versions`` are
    the key versions that may have wrapped a key of the study; ``erased`` is empty until all is done here, ``final``
    until none of these versions can be opened by anybody.
    """

    id: str
    tag: bytes
    uid: int
    reason: str
    begun: str
    packs: list[str] = msgspec.field(default_factory=list)
    fenced: list[str] = msgspec.field(default_factory=list)
    instances: int = 0
    versions: list[int] = msgspec.field(default_factory=list)
    erased: str = ""
    final: str = ""


@_MIGRATIONS(name="5-recovery")
def _recovery(db: Database) -> None:
    db.table("recovery_export").create({"id": str, "content": str}, pk="id", strict=True)


class RecoveryExport(msgspec.Struct):
    """A recovery export that was made: to which recovery key, which key versions it opens, what is known of it.

    ``confirmed``: a copy off this machine was checked. ``retired``: its recovery key's shares are said to be destroyed.
    """

    id: str
    recovery: str
    created: str
    versions: list[int]
    confirmed: str = ""
    retired: str = ""


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

    def rotations(self) -> list[Rotation]:
        """Return all changes of the key version, the oldest first."""
        rows = self._db.execute("SELECT content FROM rotation ORDER BY version")
        return [msgspec.json.decode(row[0], type=Rotation) for row in rows]

    def set_rotation(self, rotation: Rotation) -> None:
        """Keep how far a change of the key version is."""
        with transaction(self._db):
            self._db.execute(
                "INSERT OR REPLACE INTO rotation (version, content) VALUES (?, ?)",
                [rotation.version, msgspec.json.encode(rotation).decode()],
            )

    def erasures(self) -> list[Erasure]:
        """Return all erasures."""
        rows = self._db.execute("SELECT content FROM erasure ORDER BY rowid")
        return [msgspec.json.decode(row[0], type=Erasure) for row in rows]

    def set_erasure(self, erasure: Erasure) -> None:
        """Keep how far an erasure is."""
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO erasure (id, tag, content) VALUES (?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET content = excluded.content",
                [erasure.id, erasure.tag, msgspec.json.encode(erasure).decode()],
            )

    def exports(self) -> list[RecoveryExport]:
        """Return all recovery exports that were made, the oldest first."""
        rows = self._db.execute("SELECT content FROM recovery_export ORDER BY rowid")
        return [msgspec.json.decode(row[0], type=RecoveryExport) for row in rows]

    def set_export(self, made: RecoveryExport) -> None:
        """Keep what is known of a recovery export."""
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO recovery_export (id, content) VALUES (?, ?)"
                " ON CONFLICT (id) DO UPDATE SET content = excluded.content",
                [made.id, msgspec.json.encode(made).decode()],
            )

    def copy(self, path: Path, key: tuple[bytes, bytes]) -> None:
        """Copy the ledger to another file under another key."""
        copy(self._db, path, key)
