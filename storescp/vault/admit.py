"""Admission: deposits become archived packs and index rows; each step can be done again.

Here is the sweep over the folders of deposits: what a name stands for, what is closed, what is listed while it is still
open, what has to wait. One closed deposit is ``vault.intake``'s; what is recorded is filed by ``vault.filing``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from keys.anchors import AnchorError
from keys.keyring import Keyring, KeyringError, UnknownVersionError
from keys.seal import SealError
from storage import attributes, pack
from storage.archive import Archive
from storage.attributes import AttributesError
from storage.index import Index, Row
from storage.keysdb import KeysDatabase
from storage.ledger import Decision, Ledger
from storage.packfile import PackFile, Record, Unreadable
from storage.sqlite import DatabaseError
from storescp.vault.examine import Examiner
from storescp.vault.filing import Filing, study_tag
from storescp.vault.filling import Filling
from storescp.vault.intake import Intake
from storescp.vault.judge import Verdict

# A pack that was not finished making in this long never will be: its gate is gone.
_UNFINISHED_SECONDS = 60
# Holes in an honest deposit are the gaps of under 4,096 bytes behind its records.
_SPARSE_LIMIT = 64 << 20
_ROWS_AT_ONCE = 500
# Of an index that is filled, in one transaction.
_FILL_PACKS = 200
# How often records of packs that stay open are listed though nobody asks.
_LIST_SECONDS = 30.0

log = logging.getLogger(__name__)


class Retired:
    """Versions that no worker can use any more, with the deposits that were there by then: later ones are forged."""

    def __init__(self, deposits: dict[int, frozenset[str]]) -> None:
        self.deposits = deposits

    def refuses(self, version: int, pack_id: str) -> bool:
        """Tell whether a deposit came too late."""
        return version in self.deposits and pack_id not in self.deposits[version]


class Admission:
    """Admits deposits, one caller at a time."""

    def __init__(
        self,
        archive: Archive,
        keyring: Keyring,
        keys_db: KeysDatabase,
        index: Index,
        ledger: Ledger,
        *,
        owners: Mapping[Path, int],
        room: Callable[[int], bool],
        retired: Retired,
        quarantine_resent: bool,
    ) -> None:
        """Prepare to admit.

        Args:
            archive: The store's folders.
            keyring: Unlocked.
            keys_db: Of the admitting thread alone.
            index: Of the admitting thread alone.
            ledger: Of the admitting thread alone.
            owners: Whose deposits are taken out of which folder.
            room: Tells whether the archive has room for so many bytes more.
            retired: What came too late.
            quarantine_resent: Whether somebody is to decide about an erased study that is sent again.
        """
        self._archive = archive
        self._keyring = keyring
        self._keys_db = keys_db
        self._index = index
        self._ledger = ledger
        self._owners = owners
        # By copy where others keep a hold on their files, and where a rename could not cross file systems.
        self._copies = set(owners.values()) != {os.geteuid()} or not archive.one_file_system()
        self._examiner = Examiner(archive, keyring, keys_db, index, self._erased if quarantine_resent else _never)
        self._filing = Filing(archive, keyring, keys_db, index, ledger, self._examiner)
        self._filling = Filling(archive, keys_db, index, ledger, self._filing)
        self._intake = Intake(archive, keyring, keys_db, index, self._examiner, self._filing, copies=self._copies)
        self._room = room
        self._retired = retired
        self._lock = threading.Lock()
        self._said: set[str] = set()
        # Deposits that could not be admitted when it was last tried, each with its study, empty where it is not known.
        self.stuck: dict[str, str] = {}
        self._interrupted = False
        self._listed: dict[str, float] = {}

    # --- all that waits

    def resume(self) -> None:
        """Finish what a crash interrupted."""
        with self._lock:
            self._archive.clear(lambda pack_id: self._keys_db.find(pack_id) is not None)
            self._filing.finish_all()
            for decision in self._ledger.decisions()[-1:]:
                self._filing.apply(decision)

    def begin_filling(self) -> None:
        """Empty the index, to be filled anew."""
        with self._lock:
            self._filling.begin()

    def fill(self, seconds: float) -> bool:
        """Fill an index that is new, or was emptied, for a time; tell whether it is whole.

        Nothing is admitted before it is: what is held already could not be told.
        """
        with self._lock:
            if self._filling.go_on(seconds):
                # What could not be read just now is tried once more.
                self._interrupted = True
            return self._filling.state() is None

    def filling(self) -> tuple[int, int] | None:
        """Return how many packs are in an index that is being filled, of how many; None for a whole one."""
        return self._filling.state()

    def must_be_filled(self) -> None:
        """Check that the index is whole.

        Raises:
            StrongroomError: It is being filled.
        """
        self._filling.must_be_over()

    def catch_up(self) -> int:
        """Admit every deposit that is closed, list the records of those that are open; return how many were admitted.

        When this returns, everything that was acknowledged before it was called can be found.

        Raises:
            StrongroomError: The index is being filled.
        """
        with self._lock:
            self.must_be_filled()
            self._recover()
            deposits = self._archive.deposits()
            self.stuck.clear()
            admitted = sum(self._look_at(path) for path in deposits)
            self._tidy({path.name for path in deposits})
        return admitted

    def advance(self, seconds: float) -> tuple[int, bool]:
        """Do what fits a time, the oldest deposits first; return how many were admitted, and whether that was all.

        Records of packs that stay open are listed now and then only: each would be read twice.
        """
        admitted = 0
        done = True
        if not self.fill(seconds):
            return 0, False
        with self._lock:
            self._recover()
            deposits = self._archive.deposits()
            self._tell_unseen()
            for inbox in self._archive.inboxes:
                # Each has its part of the time: who fills one of them does not hold up the other.
                until = time.monotonic() + seconds / len(self._archive.inboxes)
                for path in deposits:
                    if path.parent != inbox:
                        continue
                    if time.monotonic() > until:
                        done = False
                        break
                    admitted += self._look_at(path, seldom=True)
            if not done:
                return admitted, False
            present = {path.name for path in deposits}
            self._listed = {name: when for name, when in self._listed.items() if name in present}
            self._tidy(present)
        return admitted, True

    def interrupted(self) -> None:
        """Admit nothing more before what was left in the middle is finished."""
        self._interrupted = True

    def _recover(self) -> None:
        if self._interrupted:
            self._filing.finish_all()
            self._interrupted = False

    def _look_at(self, path: Path, *, seldom: bool = False) -> bool:
        try:
            if not self._acceptable(path):
                return False
            with PackFile(path, write=not self._copies) as file:
                if self._retired.refuses(file.header.version, path.name):
                    raise pack.PackError("it names a key version that was retired before it came")
                if not self._has_room(path):
                    # Who erases to make room must find what of the study waits.
                    self._list_open(file)
                    return False
                if file.try_lock():
                    return self._intake.admit(file)
                if not seldom or self._is_long_open(path.name):
                    self._list_open(file)
        except (pack.PackError, SealError, AttributesError, UnknownVersionError) as error:
            self._set_aside(path, str(error))
        except (KeyringError, AnchorError, OSError, DatabaseError) as error:
            # It may have got as far as its key record: what is recorded but not indexed is finished at the next look.
            self._interrupted = True
            if path.exists():
                self.stuck[path.name] = self._study_in(path)
                self._say_once(path.name, f"deposit {path.name} is not admitted yet: {error}")
        return False

    def _set_aside(self, path: Path, reason: str) -> None:
        """Put what cannot be admitted into quarantine, if there is room for what it has on the disk."""
        try:
            if self._room(path.lstat().st_blocks * 512):
                self._intake.set_aside(path, reason)
            else:
                self.stuck[path.name] = ""
        except OSError as error:
            self.stuck[path.name] = ""
            self._say_once(path.name, f"deposit {path.name} cannot be set aside: {error.strerror}")

    def _study_in(self, path: Path) -> str:
        """Return the study of a deposit that cannot be admitted, empty where it does not open."""
        with contextlib.suppress(pack.PackError, SealError, KeyringError, AnchorError, OSError), PackFile(path) as file:
            for found in self._examiner.deposit(file).records(whole=False, closed=False):
                if isinstance(found, Record):
                    return found.attributes.text(attributes.STUDY)
        return ""

    def _has_room(self, path: Path) -> bool:
        """Tell whether the archive has room for a deposit."""
        if self._room(path.lstat().st_size if self._copies else 0):
            self._said.discard("room")
            return True
        self._say_once("room", "the archive has no room for what waits; deposits stay where they are")
        return False

    def _acceptable(self, path: Path) -> bool:
        """Check what a deposit's name stands for before it is opened; remove what can be none."""
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            # One for all: whoever makes many fills neither memory nor log.
            said = f"{path.name} in {path.parent.name} is a folder and is left where it is, as others are that follow"
            self._say_once(f"folders in {path.parent.name}", said)
            return False
        if not stat.S_ISREG(found.st_mode):
            log.error("%s in %s is no regular file and is removed", path.name, path.parent.name)
            self._archive.remove_deposit(path)
            return False
        owner = self._owners.get(path.parent)
        if owner is None:
            self._say_once(str(path.parent), f"what is in {path.parent.name} waits: desk.user says whose it is")
            return False
        if found.st_uid != owner:
            raise pack.PackError("it does not belong to the user who deposits there")
        if found.st_size - found.st_blocks * 512 > _SPARSE_LIMIT:
            raise pack.PackError("it is a sparse file")
        if found.st_nlink != 1 and self._copies:
            raise pack.PackError("it has more than one name")
        return True

    def _is_long_open(self, pack_id: str) -> bool:
        """Tell whether an open pack was neither seen nor listed for a while."""
        now = time.monotonic()
        if now - self._listed.setdefault(pack_id, now) < _LIST_SECONDS:
            return False
        self._listed[pack_id] = now
        return True

    def _list_open(self, file: PackFile) -> None:
        pack_id = file.path.name
        scanned = self._index.scanned(pack_id)
        if (scanned or pack.PAGE) < file.size and self._keys_db.find(pack_id) is None:
            rows: list[Row] = []
            study = ""
            end = scanned or pack.PAGE
            for judged in self._examiner.judge(self._examiner.deposit(file), start=end, whole=False, closed=False):
                if isinstance(judged, Unreadable):
                    # What does not open in an open pack is no finding: its writer may not be done.
                    break
                study = study or judged.record.attributes.text(attributes.STUDY)
                state = "pending" if judged.verdict is Verdict.QUARANTINE else judged.verdict.value
                rows.append(Row(judged.record, "pending" if state == "heal" else state, judged.reason))
                end = pack.page_after(judged.record.frame.end)
                if len(rows) == _ROWS_AT_ONCE:
                    self._index.add(pack_id, study, rows, end)
                    rows = []
            if rows:
                self._index.add(pack_id, study, rows, end)

    def _erased(self, study: str) -> bool:
        return attributes.is_uid(study) and self._ledger.erasure_of(study_tag(self._keyring, study)) is not None

    # --- decisions

    def decide(self, decision: Decision) -> None:
        """Record what an admin decided about a quarantined instance, and do it."""
        with self._lock:
            self._ledger.record(decision)
            self._filing.apply(decision)

    # --- telling

    def _tell_unseen(self) -> None:
        for inbox in self._archive.unseen:
            self._say_once(str(inbox), f"{inbox.name} cannot be read: what is in it waits until its user opens it")

    def _say_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.error("%s", message)

    def _tidy(self, present: set[str]) -> None:
        for pack_id in self._index.waiting_packs():
            if pack_id not in present and self._archive.find(pack_id) is None:
                log.error("pack %s is gone before it was admitted; its rows are removed", pack_id)
                self._index.drop(pack_id)
        for path in self._archive.unfinished():
            try:
                if time.time() - path.lstat().st_mtime > _UNFINISHED_SECONDS and not self._archive.is_locked(path):
                    path.unlink()
            except FileNotFoundError:
                # It was finished meanwhile, and has its name.
                continue
            except OSError:
                self._say_once(path.name, f"{path.name} in {path.parent.name} is no deposit and cannot be removed")


def _never(_study: str) -> bool:
    return False
