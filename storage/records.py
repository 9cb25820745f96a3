"""Records of the ledger, a kind of them at a time: each has an id, perhaps a state to find it by, and its content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import msgspec

from storage.sqlite import Database, transaction

_T = TypeVar("_T", bound=msgspec.Struct)
_PAGE = 500
_PUT = (
    "INSERT INTO record (kind, id, state, content) VALUES (?, ?, ?, ?)"
    " ON CONFLICT (kind, id) DO UPDATE SET state = excluded.state, content = excluded.content"
)


def prepare(db: Database) -> None:
    """Make the table; a new kind needs no change of it."""
    db.table("record").create(
        {"number": int, "kind": str, "id": str, "state": str, "content": str}, pk="number", strict=True
    )
    db.table("record").create_index(["kind", "id"], unique=True)
    db.table("record").create_index(["kind", "state", "number"])


class Records(Generic[_T]):
    """The records of one kind. Used by one thread at a time, as the ledger that they are in."""

    def __init__(self, db: Database, kind: str, type_: type[_T]) -> None:
        self._db = db
        self._kind = kind
        self._type = type_

    def get(self, record_id: str) -> _T | None:
        """Return a record, or None."""
        row = self._db.execute(
            "SELECT content FROM record WHERE kind = ? AND id = ?", [self._kind, record_id]
        ).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=self._type)

    def all(self, state: str | None = None) -> Iterator[_T]:
        """Yield the records, or those in a state, in the order in which they were first put; flat in memory."""
        after = 0
        while page := self.page(state, after=after):
            after = page[-1][0]
            for _, record in page:
                yield record

    def page(self, state: str | None = None, *, after: int = 0, limit: int = _PAGE) -> list[tuple[int, _T]]:
        """Return some of the records, as ``all`` does, each with its number: those behind a number, at most so many.

        For who changes records on the way, or lets others use the ledger between two pages.
        """
        where, values = ("", []) if state is None else (" AND state = ?", [state])
        rows = self._db.execute(
            f"SELECT number, content FROM record WHERE kind = ?{where} AND number > ? ORDER BY number LIMIT ?",  # noqa: S608
            [self._kind, *values, after, limit],
        )
        return [(row[0], msgspec.json.decode(row[1], type=self._type)) for row in rows]

    def count(self, state: str | None = None) -> int:
        """Return how many records there are, or how many in a state."""
        where, values = ("", []) if state is None else (" AND state = ?", [state])
        row = self._db.execute(
            f"SELECT count(*) FROM record WHERE kind = ?{where}",  # noqa: S608
            [self._kind, *values],
        ).fetchone()
        return int(row[0])

    def count_of(self, prefix: str) -> int:
        """Return how many records there are whose id begins so."""
        row = self._db.execute(
            "SELECT count(*) FROM record WHERE kind = ? AND id >= ? AND id < ?",
            [self._kind, prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)],
        ).fetchone()
        return int(row[0])

    def put(self, record_id: str, record: _T, state: str = "") -> None:
        """Keep a record durably, in place of an earlier one with its id."""
        self.put_all([(record_id, record, state)])

    def put_all(self, records: Iterable[tuple[str, _T, str]]) -> None:
        """Keep records durably, all or none."""
        with transaction(self._db):
            for record_id, record, state in records:
                content = msgspec.json.encode(record).decode()
                self._db.execute(_PUT, [self._kind, record_id, state, content])

    def remove(self, *record_ids: str) -> None:
        """Remove records."""
        with transaction(self._db):
            for record_id in record_ids:
                self._db.execute("DELETE FROM record WHERE kind = ? AND id = ?", [self._kind, record_id])
