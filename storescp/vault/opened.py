"""What an unlocked vault has in hand: keyring, folders, databases, and connections for readers."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator

import msgspec

from keys.keyring import Keyring
from storage import backup, sqlite
from storage.archive import Archive
from storage.index import Index
from storage.keysdb import KeysDatabase
from storage.ledger import Ledger
from storage.retentionrules import QUARANTINE
from storescp import space
from storescp.config import Config
from storescp.inboxes import owners
from storescp.vault.admit import Admission, Retired
from storescp.vault.filing import study_tag


class Reader(msgspec.Struct, frozen=True):
    """Connections of their own for one reader at a time."""

    version: int
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
        self.archive = Archive(config.store_path, *config.inboxes)
        self.keys_db = KeysDatabase(config.keys_db, migrate=True)
        self.owners = owners(config)
        self.rotating = threading.Lock()
        # Held while a backup copies packs, and by whoever removes one: what a backup names must not go meanwhile.
        self.packs_lock = threading.Lock()
        # Which versions were destroyed, and which exports there were, when certificates were last made final.
        self.finalized: tuple[object, ...] | None = None
        self._retired = Retired({})
        self._readers: queue.SimpleQueue[Reader] = queue.SimpleQueue()
        # Held while readers' connections are lent or given back, and while the databases are exchanged.
        self._exchange = threading.Lock()
        self._closed = False
        self._open_databases(database_version(config, ring))

    def _open_databases(self, version: int) -> None:
        config, keys = self._config, self.ring.version(version)
        with contextlib.ExitStack() as failed:
            index = Index(config.index(version), keys.index_key(), migrate=True)
            failed.callback(index.close)
            ledger = Ledger(config.ledger(version), keys.ledger_key(), migrate=True)
            failed.callback(ledger.close)
            admission = Admission(
                self.archive,
                self.ring,
                self.keys_db,
                index,
                ledger,
                owners=self.owners,
                room=lambda count: space.archive_has_room(config, count),
                retired=self._retired,
                quarantine_resent=config.settings.retention.resent == QUARANTINE,
            )
            failed.pop_all()
        with self._exchange:
            self.database_version = version
            self.index, self.ledger, self.admission = index, ledger, admission
            while not self._readers.empty():
                self._readers.get_nowait().close()
        self.retire()

    def retire(self) -> None:
        """Let no deposit in that was made under a version that nobody can use any more (see ``rotate``)."""
        self._retired.deposits = {
            r.old: frozenset(r.sealed_off) for r in self.ledger.rotations() if r.sealed_off is not None
        }

    def rekey(self, version: int) -> None:
        """Go on with copies of index and ledger under the keys of another version. Nobody admits meanwhile.

        The ledger's file is renamed last: which one is there says which databases count, also after a crash.
        """
        config, keys = self._config, self.ring.version(version)
        before = self.index, self.ledger
        # The ledger first, here and below: where it lies, it counts.
        copies = config.ledger(version), config.index(version)
        try:
            for path in copies:
                sqlite.remove(path)
            self.index.copy(config.index(version), keys.index_key())
            self.ledger.copy(config.ledger(version), keys.ledger_key())
            self._open_databases(version)
        except BaseException:
            # Everything goes on with the old ones, also after a restart.
            for path in copies:
                sqlite.remove(path)
                sqlite.remove(path.with_name(f"{path.name}.new"))
            raise
        for database in before:
            database.close()
        self.remove_old_databases()

    def remove_old_databases(self) -> None:
        """Remove the databases of earlier versions, which a change of the version left behind."""
        for version in range(1, self.database_version):
            sqlite.remove(self._config.index(version))
            sqlite.remove(self._config.ledger(version))

    def is_being_erased(self, study: str) -> bool:
        """Tell whether an erasure of a study has begun and is not done."""
        erasure = self.ledger.erasure_of(study_tag(self.ring, study))
        return erasure is not None and not erasure.erased

    def all_indexed(self, study: str) -> bool:
        """Tell whether the index has rows of every pack of a study: rules see what it has, and nothing else."""
        packs = {record.pack_id for record in self.keys_db.of_study(study_tag(self.ring, study))}
        return packs <= set(self.index.packs_of(study))

    @property
    def closed(self) -> bool:
        """Tell whether the vault was locked meanwhile, so that nothing opens any more."""
        return self._closed

    @contextlib.contextmanager
    def reader(self) -> Iterator[Reader]:
        """Lend a reader's connections; they are kept for the next one."""
        with self._exchange:
            try:
                lent = self._readers.get_nowait()
            except queue.Empty:
                version = self.database_version
                index = Index(self._config.index(version), self.ring.version(version).index_key())
                lent = Reader(version, index, KeysDatabase(self._config.keys_db))
        try:
            yield lent
        finally:
            with self._exchange:
                if self._closed or lent.version != self.database_version:
                    lent.close()
                else:
                    self._readers.put(lent)

    def own_ledger(self) -> Ledger:
        """Return a connection to the ledger for another thread than the admitting one."""
        version = self.database_version
        return Ledger(self._config.ledger(version), self.ring.version(version).ledger_key())

    def start(self) -> None:
        """Finish what a crash interrupted; an index that is new is to be filled before anything is admitted."""
        if self.index.filled_to() is None:
            if self.keys_db.count() and not self.index.has_archived():
                self.admission.begin_filling()
            else:
                self.admission.resume()
        self.remove_old_databases()
        backup.remove_staging(self._config.backup_staging)

    def close(self) -> None:
        """Close databases and forget keys."""
        with self._exchange:
            self._closed = True
            while not self._readers.empty():
                self._readers.get_nowait().close()
        self.index.close()
        self.ledger.close()
        self.keys_db.close()
        self.ring.forget()


def database_version(config: Config, ring: Keyring) -> int:
    """Return under which version's keys the databases are: in the middle of a rotation not the newest one's."""
    known = [record.version for record in ring.body.versions if config.ledger(record.version).exists()]
    return max(known, default=ring.current().version)
