"""Re-encryption: new study keys for what is archived, packs written anew and verified before the old ones go.

Online: receiving, admission and exports go on; what arrives meanwhile has study keys of its own. Which packs it is
about is kept at the beginning, each one's way in the ledger, so that a second run goes on where the first one stopped.
What a study key was leaked with, it opens for ever; what is on this disk from now on it does not open.
Source: docs/keys.md.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import time
from collections.abc import Generator, Iterator
from typing import Any

import msgspec

from keys.anchors import AnchorError
from keys.keyring import KeyringError
from keys.seal import SealError
from storage.keysdb import StudyKeyRecord
from storage.ledger import Reencryption
from storage.pack import PackError
from storage.sqlite import DatabaseError
from storescp import clock, space
from storescp.config import Config
from storescp.errors import NOTHING, StrongroomError, plural
from storescp.vault.filing import study_tag
from storescp.vault.opened import Open
from storescp.vault.repack import Repack, settle
from storescp.vault.state import Vault

_POLL_SECONDS = 0.5
# Progress within a pack is told this often.
_EVERY_BYTES = 64 << 20
# A pack that others change meanwhile is begun again so often.
_ATTEMPTS = 3
_GO_ON = "'strongroom keys reencrypt' goes on where it stopped"

log = logging.getLogger(__name__)

Progress = dict[str, Any]


class Scope(msgspec.Struct, frozen=True):
    """Which packs: those of a study, those whose key a version wraps, or all; nothing of these to go on."""

    study: str = ""
    version: int = 0
    everything: bool = False

    def __bool__(self) -> bool:
        """Tell whether anything is chosen."""
        return bool(self.study or self.version or self.everything)


class _LeftError(Exception):
    """A pack stays as it is; the message says why."""

    def __init__(self, reason: str, pack_id: str = "") -> None:
        super().__init__(reason)
        self._pack_id = pack_id

    def reason(self, pack_id: str) -> str:
        """Return why a pack stays as it is, perhaps because of another one."""
        alone = self._pack_id in {"", pack_id}
        return str(self) if alone else f"pack {self._pack_id} is under the same study key: {self}"


class _ChangedError(Exception):
    """Somebody changed, erased or discarded a pack meanwhile."""


class Reencrypt:
    """The re-encryption of a vault: one at a time, and none while a rotation is at work."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._config: Config = vault.config

    def run(self, uid: int, scope: Scope, reason: str) -> Iterator[Progress]:
        """Begin a re-encryption, or go on with the one that was begun; yield what happens.

        Yields:
            ``step`` and ``waiting`` with a text; ``progress`` with ``done``, ``total`` (packs) and ``bytes``; ``left``
            with a pack, its study and why it stays as it is; ``summary`` in the end.

        Raises:
            StrongroomError: It cannot go on.
        """
        open_ = self._vault.unlocked()
        if not open_.rotating.acquire(blocking=False):
            raise StrongroomError(
                "another 'keys reencrypt' or 'keys rotate' is at work on this store", hint="wait until it ends"
            )
        try:
            job = self._begin(open_, uid, scope, reason)
            yield {"kind": "step", "text": f"re-encryption {job.id}: {plural(job.packs, 'pack')}"}
            size = yield from self._packs(open_, job)
            yield from self._end(open_, job, size)
        except (AnchorError, KeyringError, DatabaseError, OSError) as error:
            raise StrongroomError(
                f"the re-encryption stopped: {error}", hint=f"mend that; {_GO_ON}, and until then nothing is lost"
            ) from error
        finally:
            open_.rotating.release()

    def _step(self, open_: Open) -> contextlib.AbstractContextManager[None]:
        return self._vault.step(open_, "the re-encryption", _GO_ON)

    # --- the beginning

    def _begin(self, open_: Open, uid: int, scope: Scope, reason: str) -> Reencryption:
        with self._step(open_):
            ledger = open_.ledger
            # What was acknowledged up to here belongs to it; what a crash left half way is finished first.
            self._vault.admit()
            settle(open_.archive, open_.keys_db, open_.index, ledger)
            asked = self._asked(open_, scope)
            under_way = next((r for r in ledger.reencryptions() if not r.ended), None)
            if under_way is not None:
                if scope and (asked.scope, asked.tag, asked.version) != (
                    under_way.scope,
                    under_way.tag,
                    under_way.version,
                ):
                    raise StrongroomError(
                        f"re-encryption {under_way.id} is under way, of other packs",
                        hint="'strongroom keys reencrypt' alone goes on with it",
                    )
                return under_way
            if not scope:
                raise StrongroomError(
                    "no re-encryption is under way", hint="begin one with --study UID, --version V or --all"
                )
            if not reason.strip():
                raise StrongroomError("a re-encryption needs a reason", hint="--reason TEXT")
            packs = open_.keys_db.chosen(tag=bytes.fromhex(asked.tag), version=asked.version)
            if not packs:
                raise StrongroomError(*self._nothing(scope), status=NOTHING)
            asked.uid, asked.reason, asked.packs = uid, reason, len(packs)
            of = {"study": scope.study} if scope.study else {"version": scope.version} if scope.version else {}
            self._vault.auditor.record(
                "reencrypt-begun",
                uid=uid,
                reencryption=asked.id,
                reason=reason,
                scope=asked.scope,
                **of,
                packs=len(packs),
            )
            ledger.begin_reencryption(asked, packs)
            return asked

    def _asked(self, open_: Open, scope: Scope) -> Reencryption:
        kind = "study" if scope.study else "version" if scope.version else "all"
        # The ledger outlives studies that are erased: of a study it has the keyed hash.
        tag = study_tag(open_.ring, scope.study).hex() if scope.study else ""
        return Reencryption(secrets.token_hex(8), 0, "", clock.now(), kind, tag, scope.version)

    def _nothing(self, scope: Scope) -> tuple[str]:
        if scope.study:
            return (f"study {scope.study} has nothing archived here",)
        if scope.version:
            return (f"no study key is wrapped under version {scope.version}: a rotation wraps all under the new one",)
        return ("nothing is archived here",)

    # --- pack by pack

    def _packs(self, open_: Open, job: Reencryption) -> Generator[Progress, None, int]:
        """Re-encrypt what is planned; return how many bytes of packs were written."""
        with self._step(open_):
            planned = open_.ledger.planned(job.id)
            done = open_.ledger.reencrypted(job.id)
        total, size = done + len(planned), 0
        job.left = {}
        for pack_id in planned:
            try:
                count, written = yield from self._with_its_key(open_, job, pack_id, done, total, size)
                done, size = done + count, size + written
            except _LeftError as error:
                why = job.left[pack_id] = error.reason(pack_id)
                with self._step(open_):
                    study = open_.index.study_of(pack_id)
                log.error("pack %s is not re-encrypted: %s", pack_id, why)
                yield {"kind": "left", "pack": pack_id, "study": study, "reason": why}
            yield {"kind": "progress", "done": done, "total": total, "bytes": size}
        return size

    def _with_its_key(
        self, open_: Open, job: Reencryption, pack_id: str, done: int, total: int, size: int
    ) -> Generator[Progress, None, tuple[int, int]]:
        """Re-encrypt a pack with all others under its study key, so that nothing stays under that.

        Returns:
            How many packs, and their bytes; nothing for one that is gone, or went with another.

        Raises:
            _LeftError: They stay as they are.
        """
        for _ in range(_ATTEMPTS):
            parts = self._open(open_, job, pack_id)
            if not parts:
                return 0, 0
            try:
                told = written = 0
                for part in parts:
                    for count in _built(part):
                        written += count
                        if written - told >= _EVERY_BYTES:
                            told = written
                            # Every byte is written once and read back once.
                            yield {"kind": "progress", "done": done, "total": total, "bytes": size + written // 2}
                yield from self._exchange(open_, parts)
                return len(parts), sum(part.place.length for part in parts)
            except _ChangedError:
                continue
            finally:
                self._close(open_, parts)
        raise _LeftError("it is changed by others all the time; run this again")

    def _open(self, open_: Open, job: Reencryption, pack_id: str) -> list[Repack]:
        """Open the packs under one study key, and keep their new names; none where the pack is gone."""
        with self._step(open_), contextlib.ExitStack() as failed:
            record = open_.keys_db.find(pack_id)
            if record is None:
                open_.ledger.drop_planned(job.id, pack_id)
                return []
            records = open_.keys_db.of_key(record.place.key_id)
            self._check_room(sum(one.place.length for one in records))
            self._check(open_, records)
            parts = []
            for one in records:
                parts.append(part := _opened(open_, one))
                failed.callback(part.close)
            open_.archive.building.update(part.moved.new for part in parts)
            failed.callback(open_.archive.building.difference_update, [part.moved.new for part in parts])
            open_.ledger.move(job.id, [part.moved for part in parts])
            failed.pop_all()
            return parts

    def _check_room(self, count: int) -> None:
        if not space.archive_has_room(self._config, count):
            raise StrongroomError(
                "the archive has no room for the old and the new pack beside each other",
                hint=f"make room; {_GO_ON}",
            )

    def _check(self, open_: Open, records: list[StudyKeyRecord]) -> None:
        """Check that nothing else is under way with these packs.

        Raises:
            _LeftError: Something is.
        """
        names = {name for r in records for name in (r.pack_id, r.place.key_id.hex())}
        for erasure in open_.ledger.erasures("begun"):
            if names & {*erasure.packs, *erasure.fenced}:
                raise _LeftError(f"erasure {erasure.id} concerns it")
        # It would be admitted anew, as if nothing of it were held.
        if any(open_.archive.waiting(name) for name in names):
            raise _LeftError("its deposit is not accounted for yet; run this again")

    def _exchange(self, open_: Open, parts: list[Repack]) -> Iterator[Progress]:
        """Let the new packs stand in the place of the old ones.

        Raises:
            _ChangedError: The old ones are not as they were; nothing was changed.
            _LeftError: Something else is under way with them.
        """
        while True:
            with self._step(open_):
                # Never waited for in here: who makes a backup needs the vault's state now and then.
                if open_.packs_lock.acquire(blocking=False):
                    try:
                        self._exchange_now(open_, parts)
                        return
                    finally:
                        open_.packs_lock.release()
            yield {"kind": "waiting", "text": "a backup is being made, which names the old packs"}
            time.sleep(_POLL_SECONDS)

    def _exchange_now(self, open_: Open, parts: list[Repack]) -> None:
        self._check(open_, [part.record for part in parts])
        # For the databases: between them nothing may fail for want of room.
        self._check_room(1)
        if len(open_.keys_db.of_key(parts[0].record.place.key_id)) != len(parts):
            raise _ChangedError
        current = open_.ring.current()
        changes = [(part.record, part.new_record(current)) for part in parts]
        try:
            if not open_.keys_db.exchange(changes):
                raise _ChangedError
            # From here on it is not undone.
            open_.archive.building.difference_update(part.moved.new for part in parts)
            settle(open_.archive, open_.keys_db, open_.index, open_.ledger)
        except (OSError, DatabaseError):
            open_.admission.interrupted()
            raise

    def _close(self, open_: Open, parts: list[Repack]) -> None:
        """Forget keys; undo what was not exchanged, or leave that to whoever unlocks."""
        for part in parts:
            part.close()
        with self._vault.admitting():
            mine = [part for part in parts if part.moved.new in open_.archive.building]
            open_.archive.building.difference_update(part.moved.new for part in mine)
            if self._vault.opened is not open_ or not mine:
                return
            try:
                settle(open_.archive, open_.keys_db, open_.index, open_.ledger)
            except (OSError, DatabaseError) as error:
                log.error("what was begun of a re-encryption is undone later: %s", error)
                open_.admission.interrupted()

    # --- the end

    def _end(self, open_: Open, job: Reencryption, size: int) -> Iterator[Progress]:
        with self._step(open_):
            open_.keys_db.forget()
            log_ = self._config.keys_db.with_name(self._config.keys_db.name + "-wal")
            if log_.exists() and log_.stat().st_size:
                raise StrongroomError(
                    "keys.db is being read, so that old study keys are still in the log before it",
                    hint="'strongroom keys reencrypt' once more, in a while, ends this",
                )
            open_.index.forget()
            job.ended = clock.now()
            done = open_.ledger.reencrypted(job.id)
            waiting = len(open_.index.waiting_packs())
            backups = sum(backup.created < job.ended for backup in open_.ledger.backups())
            named = sorted({r.version for r in open_.ring.body.versions if r.state != "destroyed"})
            self._vault.auditor.record("reencrypted", reencryption=job.id, packs=done, left=len(job.left))
            open_.ledger.end_reencryption(job)
        yield {
            "kind": "summary",
            "id": job.id,
            "packs": done,
            "bytes": size,
            "left": len(job.left),
            "waiting": waiting,
            "backups": backups,
            "versions": named,
        }


def _opened(open_: Open, record: StudyKeyRecord) -> Repack:
    """Open an old pack.

    Raises:
        _LeftError: It does not open, so that it is kept for whoever can mend it.
    """
    path = open_.archive.find(record.pack_id)
    if path is None:
        raise _LeftError("it is not there", record.pack_id)
    with _mendable(record.pack_id):
        return Repack(open_.archive, path, record, open_.ring.version(record.version))


def _built(part: Repack) -> Iterator[int]:
    with _mendable(part.record.pack_id):
        yield from part.build()


@contextlib.contextmanager
def _mendable(pack_id: str) -> Iterator[None]:
    """Leave a pack that does not open, for whoever can mend it; a disk that takes nothing more ends everything.

    Raises:
        _LeftError: It does not open.
    """
    try:
        yield
    except (PackError, SealError, OverflowError, KeyringError, AnchorError) as error:
        raise _LeftError(f"it does not open, and is kept for whoever can mend it: {error}", pack_id) from error
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise _LeftError(f"it cannot be read: {error.strerror}", pack_id) from error
