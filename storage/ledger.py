"""The ledger: what packs do not say and cannot be rebuilt from them.

Today: decisions about quarantined instances, the head of the audit chain, and when each certificate was last used.

SQLCipher under a key of the version; part of every backup.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from storage.records import Records, prepare
from storage.sqlite import Database, Migrations, connect, copy, transaction

_MIGRATIONS = Migrations("ledger")
# How many erasures are read at a time.
_PAGE = 500
_T = TypeVar("_T", bound=msgspec.Struct)


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


@_MIGRATIONS(name="6-reencryption")
def _reencryption(db: Database) -> None:
    db.table("reencryption").create({"id": str, "content": str}, pk="id", strict=True)
    db.table("reencrypted").create(
        {"reencryption": str, "old": str, "new": str, "done": str},
        pk=("reencryption", "old"),
        not_null={"new", "done"},
        strict=True,
    )
    db.table("reencrypted").create_index(["old"])
    db.table("reencrypted").create_index(["done"])


class Reencryption(msgspec.Struct):
    """New study keys for packs that are archived; times are RFC 3339.

    ``scope`` is ``study`` (with its keyed ``tag`` in hex), ``version`` (with its number) or ``all``. ``ended`` is empty
    until every pack that was chosen at the beginning was looked at; ``left`` says why some are as they were.
    """

    id: str
    uid: int
    reason: str
    begun: str
    scope: str
    tag: str = ""
    version: int = 0
    packs: int = 0
    ended: str = ""
    left: dict[str, str] = msgspec.field(default_factory=dict)


class Moved(msgspec.Struct, frozen=True):
    """A pack on its way from one name and study key to another."""

    old: str
    new: str


@_MIGRATIONS(name="7-backup")
def _backup(db: Database) -> None:
    db.table("backup").create({"id": str, "content": str}, pk="id", strict=True)


class Backup(msgspec.Struct):
    """A backup that was made: where it was put, the lowest key version in it, and what is known of it since.

    ``waiting`` deposits were not admitted yet and are not in it; ``confirmed``: a copy off this machine was checked;
    ``drilled``: it was restored for a trial without a finding.
    """

    id: str
    created: str
    folder: str
    version: int
    packs: int
    bytes: int
    waiting: int
    confirmed: str = ""
    drilled: str = ""


@_MIGRATIONS(name="8-record")
def _record_table(db: Database) -> None:
    prepare(db)


@_MIGRATIONS(name="9-erasure-state")
def _erasure_state(db: Database) -> None:
    db.execute("ALTER TABLE erasure ADD COLUMN state TEXT NOT NULL DEFAULT 'begun'")
    db.execute(
        "UPDATE erasure SET state = CASE WHEN json_extract(content, '$.final') <> '' THEN 'final'"
        " WHEN json_extract(content, '$.erased') <> '' THEN 'erased' ELSE 'begun' END"
    )
    db.table("erasure").create_index(["state"])


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
        """Return all decisions in the order in which they were made; packs have the names that they have now."""
        rows = self._db.execute(
            "SELECT at, uid, kind, pack_id, object_id, other_pack_id, other_object_id, reason FROM decision ORDER BY id"
        ).fetchall()
        made = [Decision(*row) for row in rows]
        return [
            msgspec.structs.replace(d, pack_id=self.name_of(d.pack_id), other_pack_id=self.name_of(d.other_pack_id))
            for d in made
        ]

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

    def erasures(self, *states: str) -> list[Erasure]:
        """Return all erasures, or those that are ``begun``, ``erased`` or ``final``."""
        where = f" WHERE state IN ({', '.join('?' * len(states))})" if states else ""
        rows = self._db.execute(f"SELECT content FROM erasure{where} ORDER BY rowid", list(states))  # noqa: S608
        return [msgspec.json.decode(row[0], type=Erasure) for row in rows]

    def count_erasures(self) -> dict[str, int]:
        """Return how many erasures are in each state."""
        return dict(self._db.execute("SELECT state, count(*) FROM erasure GROUP BY state").fetchall())

    def each_erasure(self, state: str) -> Iterator[Erasure]:
        """Yield the erasures in a state, a few at a time: there are as many as studies went in years.

        What was yielded may be changed meanwhile.
        """
        after = 0
        while True:
            rows = self._db.execute(
                "SELECT rowid, content FROM erasure WHERE state = ? AND rowid > ? ORDER BY rowid LIMIT ?",
                [state, after, _PAGE],
            ).fetchall()
            if not rows:
                return
            after = int(rows[-1][0])
            for _, content in rows:
                yield msgspec.json.decode(content, type=Erasure)

    def erasure(self, erasure_id: str) -> Erasure | None:
        """Return an erasure, or None."""
        row = self._db.execute("SELECT content FROM erasure WHERE id = ?", [erasure_id]).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=Erasure)

    def erasure_of(self, tag: bytes) -> Erasure | None:
        """Return the last erasure of a study, by its keyed tag, or None."""
        row = self._db.execute(
            "SELECT content FROM erasure WHERE tag = ? ORDER BY rowid DESC LIMIT 1", [tag]
        ).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=Erasure)

    def set_erasure(self, erasure: Erasure) -> None:
        """Keep how far an erasure is."""
        state = "final" if erasure.final else "erased" if erasure.erased else "begun"
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO erasure (id, tag, content, state) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET content = excluded.content, state = excluded.state",
                [erasure.id, erasure.tag, msgspec.json.encode(erasure).decode(), state],
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

    # --- re-encryption

    def reencryptions(self) -> list[Reencryption]:
        """Return all re-encryptions, the oldest first."""
        rows = self._db.execute("SELECT content FROM reencryption ORDER BY rowid")
        return [msgspec.json.decode(row[0], type=Reencryption) for row in rows]

    def begin_reencryption(self, begun: Reencryption, packs: list[str]) -> None:
        """Keep that a re-encryption begins, with the packs that it is about, in their order."""
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO reencryption (id, content) VALUES (?, ?)", [begun.id, msgspec.json.encode(begun).decode()]
            )
            rows = [(begun.id, pack_id) for pack_id in packs]
            self._db.conn.executemany("INSERT INTO reencrypted VALUES (?, ?, '', '')", rows)

    def end_reencryption(self, ended: Reencryption) -> None:
        """Keep how a re-encryption ended; packs that it left as they were are not waited for any more."""
        with transaction(self._db):
            self._db.execute(
                "UPDATE reencryption SET content = ? WHERE id = ?", [msgspec.json.encode(ended).decode(), ended.id]
            )
            self._db.execute("DELETE FROM reencrypted WHERE reencryption = ? AND done = ''", [ended.id])

    def planned(self, reencryption: str) -> list[str]:
        """Return the packs that a re-encryption has not done yet, in their order."""
        rows = self._db.execute(
            "SELECT old FROM reencrypted WHERE reencryption = ? AND done = '' ORDER BY rowid", [reencryption]
        )
        return [str(row[0]) for row in rows]

    def reencrypted(self, reencryption: str) -> int:
        """Return how many packs a re-encryption has done."""
        sql = "SELECT count(*) FROM reencrypted WHERE reencryption = ? AND done <> ''"
        return int(self._db.execute(sql, [reencryption]).fetchone()[0])

    def move(self, reencryption: str, moves: list[Moved]) -> None:
        """Keep which packs are about to stand in the place of which, before any of them is there."""
        with transaction(self._db):
            self._db.conn.executemany(
                "INSERT INTO reencrypted VALUES (?, ?, ?, '')"
                " ON CONFLICT (reencryption, old) DO UPDATE SET new = excluded.new",
                [(reencryption, move.old, move.new) for move in moves],
            )

    def unsettled(self) -> list[Moved]:
        """Return the packs that are on their way, or that a crash left there."""
        rows = self._db.execute("SELECT old, new FROM reencrypted WHERE done = '' AND new <> '' ORDER BY rowid")
        return [Moved(*row) for row in rows]

    def settle(self, moves: list[Moved], done: str) -> None:
        """Keep that packs have their new names since a time, or, for an empty one, that they do not get them."""
        with transaction(self._db):
            self._db.conn.executemany(
                "UPDATE reencrypted SET done = ?, new = CASE ? WHEN '' THEN '' ELSE new END WHERE old = ? AND new = ?",
                [(done, done, move.old, move.new) for move in moves],
            )

    def drop_planned(self, reencryption: str, pack_id: str) -> None:
        """Forget that a pack was to be re-encrypted: it is gone."""
        with transaction(self._db):
            self._db.execute(
                "DELETE FROM reencrypted WHERE reencryption = ? AND old = ? AND done = ''", [reencryption, pack_id]
            )

    def name_of(self, pack_id: str) -> str:
        """Return the name that a pack has now."""
        while row := self._db.execute("SELECT new FROM reencrypted WHERE old = ? AND done <> ''", [pack_id]).fetchone():
            pack_id = str(row[0])
        return pack_id

    def backups(self) -> list[Backup]:
        """Return all backups that were made, the oldest first."""
        rows = self._db.execute("SELECT content FROM backup ORDER BY rowid")
        return [msgspec.json.decode(row[0], type=Backup) for row in rows]

    def set_backup(self, made: Backup) -> None:
        """Keep what is known of a backup."""
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO backup (id, content) VALUES (?, ?)"
                " ON CONFLICT (id) DO UPDATE SET content = excluded.content",
                [made.id, msgspec.json.encode(made).decode()],
            )

    def fault(self) -> str:
        """Return what is wrong with the file, in SQLite's words; empty if every page opens and fits the others."""
        for check in ("PRAGMA cipher_integrity_check", "PRAGMA integrity_check"):
            for row in self._db.execute(check):
                if row[0] != "ok":
                    return str(row[0])
        return ""

    def records(self, kind: str, type_: type[_T]) -> Records[_T]:
        """Return the records of a kind, which whoever keeps them describes (see ``storage.records``)."""
        return Records(self._db, kind, type_)

    def copy(self, path: Path, key: tuple[bytes, bytes]) -> None:
        """Copy the ledger to another file under another key."""
        copy(self._db, path, key)
