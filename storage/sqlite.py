"""Connections to SQLite and SQLCipher through sqlite-utils: one driver, one set of pragmas, explicit transactions."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import sqlcipher3
import sqlcipher3.dbapi2

# sqlite-utils looks for this name and falls back to the standard library's driver, whose errors it would then
# catch in place of SQLCipher's: the alias stands before its first import, and nowhere else is it imported.
sys.modules.setdefault("pysqlite3", sqlcipher3)
sys.modules.setdefault("pysqlite3.dbapi2", sqlcipher3.dbapi2)

from sqlite_utils import Database  # noqa: E402
from sqlite_utils.migrations import Migrations  # noqa: E402

from keys import encoding  # noqa: E402

__all__ = ["Database", "DatabaseError", "Migrations", "checkpoint", "connect", "copy", "remove", "transaction"]

# How long to wait for another process that writes.
_BUSY_SECONDS = 30

DatabaseError: type[Exception] = sqlcipher3.DatabaseError


def connect(path: Path, key: tuple[bytes, bytes] | None = None, *, immutable: bool = False) -> Database:
    """Open a database, or make it.

    Args:
        path: The file.
        key: SQLCipher's raw key (32 bytes) and salt (16 bytes); None for plain SQLite.
        immutable: Nobody writes it: it is only read, and nothing is made beside it, where nothing may be written.

    Raises:
        DatabaseError: It is no database, or another key's.
    """
    if immutable:
        place = f"{path.absolute().as_uri()}?immutable=1"
        return Database(sqlcipher3.connect(place, uri=True, isolation_level=None, check_same_thread=False))
    connection = sqlcipher3.connect(str(path), isolation_level=None, check_same_thread=False, timeout=_BUSY_SECONDS)
    try:
        if key is not None:
            # Not PRAGMA key: that text reaches trace callbacks.
            connection.set_key("x'" + key[0].hex() + key[1].hex() + "'")
            connection.execute("PRAGMA cipher_log_level = NONE")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode NORMAL can lose the last commits at a power cut; what was admitted must stay admitted.
        connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close()
        raise
    return Database(connection)


def copy(source: Database, path: Path, key: tuple[bytes, bytes] | None) -> None:
    """Copy a database to another file under another key or none, durably: whole under its name, or not there.

    Raises:
        DatabaseError, OSError: The disk refused it.
    """
    making = path.with_name(f"{path.name}.new")
    for leftover in (making, *(making.with_name(making.name + end) for end in ("-wal", "-shm"))):
        leftover.unlink(missing_ok=True)
    target = connect(making, key)
    try:
        source.conn.backup(target.conn)
        target.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        target.conn.close()
    os.chmod(making, 0o600)
    descriptor = os.open(making, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(making, path)
    encoding.sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a database with the files beside it."""
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


def checkpoint(database: Database) -> None:
    """Write the log into the file and cut it, unless somebody reads: nobody waits for a reader that takes its time."""
    database.execute("PRAGMA busy_timeout = 0")
    try:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        database.execute(f"PRAGMA busy_timeout = {_BUSY_SECONDS * 1000}")


@contextlib.contextmanager
def transaction(database: Database) -> Iterator[None]:
    """Run a write transaction that takes its lock at once: one begun deferred fails when another writer was faster.

    Within another one it is a part of that.
    """
    if database.conn.in_transaction:
        yield
        return
    database.conn.execute("BEGIN IMMEDIATE")
    try:
        yield
        # Within: a commit that a full disk refused leaves its transaction open, and the next could not begin.
        database.conn.execute("COMMIT")
    except BaseException:
        if database.conn.in_transaction:
            database.conn.execute("ROLLBACK")
        raise
