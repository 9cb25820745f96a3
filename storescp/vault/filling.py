"""Filling the index: anew from packs, key records and the ledger's decisions, in slices, while the vault answers."""

from __future__ import annotations

import logging
import time

from storage.archive import Archive
from storage.index import Index
from storage.keysdb import KeysDatabase
from storage.ledger import Ledger
from storescp.errors import StrongroomError
from storescp.vault.filing import Filing

# In one transaction.
_PACKS = 200

log = logging.getLogger(__name__)


class Filling:
    """An index that is new, or was emptied, on its way to be whole. Of the admitting thread alone."""

    def __init__(self, archive: Archive, keys_db: KeysDatabase, index: Index, ledger: Ledger, filing: Filing) -> None:
        self._archive = archive
        self._keys_db = keys_db
        self._index = index
        self._ledger = ledger
        self._filing = filing
        self._names_synced = False

    def begin(self) -> None:
        """Empty the index."""
        self._index.begin_anew()

    def go_on(self, seconds: float) -> bool:
        """Fill the index for a time, in the order of admission; tell whether it has become whole."""
        until = time.monotonic() + seconds
        while (done := self._index.filled_to()) is not None:
            if not self._names_synced:
                # A pack may have its name since a moment before a crash: its rows must not be more durable.
                self._archive.sync_names()
                self._names_synced = True
            batch = self._keys_db.admitted(done, _PACKS)
            if not batch:
                self._archive.clear(lambda pack_id: self._keys_db.find(pack_id) is not None)
                self._filing.finish_all()
                for decision in self._ledger.decisions():
                    self._filing.apply(decision)
                self._index.filled()
                log.info("the index is whole")
                return True
            with self._index.filling():
                for record in batch:
                    self._filing.finish(record.pack_id, synced=True)
                self._index.filled_up_to(batch[-1].place.admission)
            if time.monotonic() > until:
                return False
        return False

    def state(self) -> tuple[int, int] | None:
        """Return how many packs are in the index, of how many; None for a whole one."""
        if self._index.filled_to() is None:
            return None
        return self._index.archived_count(), self._keys_db.count()

    def must_be_over(self) -> None:
        """Check that the index is whole.

        Raises:
            StrongroomError: It is being filled.
        """
        if (state := self.state()) is not None:
            raise StrongroomError(
                f"the index is being filled: {state[0]} of {state[1]} packs are in it",
                hint="it goes on by itself while the vault runs; 'strongroom status' says how far it is",
            )
