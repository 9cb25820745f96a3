"""What an unlocked vault has in hand: keyring, folders, databases, and connections for readers."""

from __future__ import annotations

import contextlib
import os
import pwd
import queue
from collections.abc import Iterator

import msgspec

from keys.keyring import Keyring
from storage.archive import Archive
from storage.index import Index
from storage.keysdb import KeysDatabase
from storage.ledger import Ledger
from storescp import space
from storescp.config import Config
from storescp.errors import StrongroomError
from storescp.vault.admit import Admission


class Reader(msgspec.Struct, frozen=True):
    """Connections of their own for one reader at a time."""

    index: Index
    keys_db: KeysDatabase

    def close(self) -> None:
        """Close both."""
        self.index.close()
        self.keys_db.close()


class Open:
    """An unlocked store."""

    def __init__(self, config: Config, ring: Keyring) -> None:
        self._config = config
        self.ring = ring
        self.archive = Archive(config.store_path, config.incoming)
        self.keys_db = KeysDatabase(config.keys_db, migrate=True)
        version = ring.current()
        self._index_path = config.index(version.version)
        self.index = Index(self._index_path, version.index_key(), migrate=True)
        self.ledger = Ledger(config.ledger(version.version), version.ledger_key(), migrate=True)
        self.gate_uid = gate_uid(config)
        self.admission = Admission(
            self.archive,
            ring,
            self.keys_db,
            self.index,
            self.ledger,
            gate_uid=self.gate_uid,
            room=lambda count: space.archive_has_room(config, count),
        )
        self._readers: queue.SimpleQueue[Reader] = queue.SimpleQueue()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Tell whether the vault was locked meanwhile, so that nothing opens any more."""
        return self._closed

    @contextlib.contextmanager
    def reader(self) -> Iterator[Reader]:
        """Lend a reader's connections; they are kept for the next one."""
        try:
            lent = self._readers.get_nowait()
        except queue.Empty:
            key = self.ring.current().index_key()
            lent = Reader(Index(self._index_path, key), KeysDatabase(self._config.keys_db))
        try:
            yield lent
        finally:
            if self._closed:
                lent.close()
            else:
                self._readers.put(lent)

    def own_ledger(self) -> Ledger:
        """Return a connection to the ledger for another thread than the admitting one."""
        version = self.ring.current()
        return Ledger(self._config.ledger(version.version), version.ledger_key())

    def start(self) -> None:
        """Finish what a crash interrupted; fill an index that is new, or was being filled."""
        if self.index.is_filling() or (self.keys_db.count() and not self.index.archived_packs()):
            self.admission.reindex()
        self.admission.resume()

    def close(self) -> None:
        """Close databases and forget keys."""
        self._closed = True
        while not self._readers.empty():
            self._readers.get_nowait().close()
        self.index.close()
        self.ledger.close()
        self.keys_db.close()
        self.ring.forget()


def gate_uid(config: Config) -> int:
    """Return the user whose deposits are taken: the gate's own, or the vault's where they are one.

    Raises:
        StrongroomError: The configured user does not exist.
    """
    name = config.settings.gate.user
    if not name:
        return os.geteuid()
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise StrongroomError(f"gate.user: there is no user {name} on this machine") from error
