"""Backups: one state of the store in a folder, made while the server runs, and only what is new of the packs.

In one pause ledger and ``keys.db`` are copied; then the audit chain, then the packs that ``keys.db`` names. Whatever
removes packs waits meanwhile. What is not admitted yet is counted, and is not in it.
Source: docs/design.md, "Backup"; docs/format.md, section 11.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keys import encoding, signed
from keys.signed import SignedError
from storage import backup
from storage.backup import BackupError, Folder, Manifest
from storage.ledger import Backup, Rotation
from storage.sqlite import DatabaseError
from storescp import clock
from storescp.config import Config
from storescp.errors import NOTHING, PARTLY, StrongroomError
from storescp.vault.opened import Open
from storescp.vault.recovery import Recovery
from storescp.vault.state import Vault

# What a store is made of besides its content, each where it is there and may be read: no secret is in any of them.
_SETTINGS = "settings"
_EVERY_BYTES = 64 << 20

log = logging.getLogger(__name__)


class Backups:
    """The backups of a vault: one at a time."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._config: Config = vault.config

    def run(self, uid: int, path: Path, *, keep: int = 0, without_export: str = "") -> Iterator[dict[str, Any]]:
        """Make a backup; yield what happens.

        Args:
            uid: Who asks.
            path: The folder for backups.
            keep: Remove all but so many of the newest backups in it, and the packs that only those named; 0 for none.
            without_export: Why there is no recovery export in it.

        Raises:
            StrongroomError: It cannot be made; backups that are there are whole.
        """
        open_ = self._vault.unlocked()
        if not path.is_absolute():
            raise StrongroomError(f"'{path}' is no absolute path", hint="the vault writes it, wherever you are")
        if keep < 0:
            raise StrongroomError(f"{keep} backups cannot be kept", hint="name how many, or 0 for all")
        real = path.resolve()
        for ours in (self._config.store_path, self._config.anchors, self._config.incoming.parent):
            if real.is_relative_to(ours.resolve()) or ours.resolve().is_relative_to(real):
                raise StrongroomError(f"{path} and {ours} are one in the other", hint="name a folder of its own")
        if not open_.packs_lock.acquire(blocking=False):
            raise StrongroomError("another backup is being made, or packs are being removed", hint="wait until it ends")
        try:
            yield from self._run(open_, uid, Folder(path), keep, without_export)
        except BackupError as error:
            raise StrongroomError(f"no backup was made: {error}") from error
        except DatabaseError as error:
            raise StrongroomError(f"no backup was made: {error}", hint="make room there, and begin again") from error
        except OSError as error:
            # Who unlocks removes the copies that a backup left.
            with self._step(open_):
                pass
            user = pwd.getpwuid(os.geteuid()).pw_name
            raise StrongroomError(
                f"no backup was made: {error.filename or path}: {error.strerror}",
                hint=f"the vault's user {user} writes it; in its unit, ReadWritePaths must name the folder",
            ) from error
        finally:
            open_.packs_lock.release()

    def _run(self, open_: Open, uid: int, folder: Folder, keep: int, without_export: str) -> Iterator[dict[str, Any]]:
        folder.prepare(open_.ring.header.store_id)
        name = folder.next_id(secrets.token_hex(4))
        self._vault.auditor.record("backup-begun", uid=uid, backup=name, folder=str(folder.path))
        making = folder.begin(name)
        manifest = self._snapshot(open_, uid, making, name, without_export)
        yield {"kind": "step", "text": "copied keyring, keys.db and ledger"}
        manifest.audit = self._audit(making)
        yield from self._packs(open_, folder, making, manifest)
        manifest.files = backup.listed(making)
        # Before it has its name: who locked and unlocked meanwhile let packs be removed again.
        with self._step(open_):
            pass
        folder.finish(making, manifest, open_.ring.signing)
        with self._step(open_):
            self._vault.auditor.record("backup-made", uid=uid, backup=name, packs=manifest.packs)
            open_.ledger.set_backup(
                Backup(
                    name,
                    manifest.created,
                    str(folder.path),
                    manifest.version,
                    manifest.packs,
                    manifest.bytes,
                    manifest.waiting,
                )
            )
        yield {"kind": "made", "manifest": manifest, "folder": str(folder.path)}
        if keep:
            yield self._keep(uid, folder, keep)

    def _keep(self, uid: int, folder: Folder, keep: int) -> dict[str, Any]:
        """Remove all but the newest backups, and the packs that only those named."""
        gone = folder.generations()[:-keep]
        try:
            for old in gone:
                self._vault.auditor.record("backup-removed", uid=uid, backup=old, folder=str(folder.path))
                folder.remove(old)
            return {"kind": "removed", "backups": len(gone), "packs": folder.prune()}
        except (BackupError, OSError) as error:
            raise StrongroomError(
                f"the backup is made, but older ones are not all removed: {error}",
                hint="mend or remove that one; the next 'strongroom backup --keep' goes on",
                status=PARTLY,
            ) from error

    def _step(self, open_: Open) -> contextlib.AbstractContextManager[None]:
        return self._vault.step(open_, "the backup", "begin again")

    def _snapshot(self, open_: Open, uid: int, making: Path, name: str, without_export: str) -> Manifest:
        """Copy what must be of one moment, here; then to where the backup lies: that may be slow, or never answer."""
        config = self._config
        backup.remove_staging(config.backup_staging)
        staging = config.backup_staging
        staging.mkdir(mode=0o700)
        try:
            with self._step(open_):
                # First: what it copies of the ledger names the exports that go with it.
                if open_.ring.body.recovery:
                    for made, content in Recovery(self._vault).export(uid):
                        encoding.create(staging / f"{made.id}{backup.EXPORT_SUFFIX}", content)
                elif not without_export.strip():
                    raise StrongroomError(
                        "there is no recovery key: without an export in it, a backup opens beside these anchors only",
                        hint="'strongroom recovery init' makes one; --without-export REASON makes one without it",
                    )
                backup.copy_file(config.keyring, staging / "keyring")
                version = open_.database_version
                open_.ledger.copy(staging / config.ledger(version).name, open_.ring.version(version).ledger_key())
                open_.keys_db.copy(staging / "keys.db")
                waiting = len(open_.archive.deposits())
                versions = open_.keys_db.versions()
                generation = open_.ring.header.generation
                raw = [p.name for p in open_.archive.quarantine_files() if open_.keys_db.find(p.name) is None]
            for path in sorted(staging.iterdir()):
                backup.copy_file(path, making / path.name)
        finally:
            backup.remove_staging(config.backup_staging)
        self._settings(making / _SETTINGS)
        packs = list(backup.lengths(making / "keys.db"))
        return Manifest(
            audit=0,
            bytes=sum(length for _, length in packs),
            created=clock.now(),
            digest=backup.digest(packs),
            files=[],
            format=1,
            generation=generation,
            id=name,
            packs=len(packs),
            raw=raw,
            store_id=open_.ring.header.store_id,
            version=min([*versions, version]),
            waiting=waiting,
        )

    def _settings(self, target: Path) -> None:
        """Copy configuration, peer files, trust and certificates of erasure; private keys stay where they are."""
        config = self._config
        target.mkdir(mode=0o700)
        # What the vault's user may not read is another backup's duty.
        with contextlib.suppress(PermissionError):
            backup.copy_file(config.file, target / "strongroom.toml")
        folders = ((config.peers, "peers.d", "*.toml"), (config.store_path / "certificates", "certificates", "*.json"))
        for source, name, pattern in folders:
            (target / name).mkdir(mode=0o700)
            with contextlib.suppress(PermissionError):
                for path in source.glob(pattern):
                    backup.copy_file(path, target / name / path.name)
        (target / "trust").mkdir(mode=0o700)
        for number, path in enumerate(config.trust):
            with contextlib.suppress(PermissionError, FileNotFoundError):
                backup.copy_file(path, target / "trust" / f"{number}-{path.name}")

    def _audit(self, making: Path) -> int:
        """Copy the audit chain as far as it is now, and chains that were put aside; return its last record's number."""
        folder = self._config.store_path
        for aside in folder.glob("audit-*"):
            (making / aside.name).mkdir(mode=0o700)
            for path in aside.iterdir():
                backup.copy_file(path, making / aside.name / path.name)
        (making / "audit").mkdir(mode=0o700)
        with self._vault.auditor.standing() as head:
            # Opened while nobody appends: what comes later is behind the lengths that were read here.
            files = sorted((folder / "audit").glob("*.log"))
            found = [(path.name, path.open("rb"), path.stat().st_size) for path in files]
        for name, file, length in found:
            with file:
                _copy_part(file.fileno(), making / "audit" / name, length)
        return head

    def _packs(self, open_: Open, folder: Folder, making: Path, manifest: Manifest) -> Iterator[dict[str, Any]]:
        copied = done = told = 0
        missing: list[str] = []
        for pack_id, length in backup.lengths(making / "keys.db"):
            done += length
            if not folder.has(pack_id, length):
                path = open_.archive.find(pack_id)
                if path is None or folder.take(path, pack_id) != length:
                    missing.append(pack_id)
                copied += 1
            if done - told >= _EVERY_BYTES:
                told = done
                yield {"kind": "progress", "done": done, "total": manifest.bytes, "copied": copied}
        for pack_id in manifest.raw:
            path = open_.archive.quarantine_path(pack_id)
            if not folder.pack(pack_id).exists() and path.exists():
                folder.take(path, pack_id)
        yield {"kind": "progress", "done": manifest.bytes, "total": manifest.bytes, "copied": copied}
        if missing:
            # Signed all the same it would pass for whole.
            raise StrongroomError(
                f"no backup was made: {len(missing)} packs are missing or damaged, the first is {missing[0]}",
                hint="'strongroom verify' names their studies and senders; have them sent again, or erase them",
                status=PARTLY,
            )

    def known(self) -> list[Backup]:
        """Return the backups that were made."""
        with self._vault.admitting():
            return self._vault.unlocked().ledger.backups()

    def confirm(self, uid: int, backup_id: str) -> Backup:
        """Keep that a copy of a backup off this machine was checked.

        Raises:
            StrongroomError: No such backup was made here.
        """
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            made = _known(open_, backup_id)
            self._vault.auditor.record("backup-confirmed", uid=uid, backup=backup_id)
            made.confirmed = clock.now()
            open_.ledger.set_backup(made)
            return made

    def drilled(self, uid: int, statement: bytes) -> Backup:
        """Keep what a drill saw.

        Args:
            uid: Who asks.
            statement: As the drill signed it.

        Raises:
            StrongroomError: This store did not sign it, or made no such backup.
        """
        try:
            said = signed.read(backup.DRILL, statement, self._config.signing_key)
        except SignedError as error:
            raise StrongroomError(f"the drill's statement does not hold: {error}") from error
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            made = _known(open_, str(said["backup"]))
            self._vault.auditor.record("recovery-drilled", uid=uid, statement=said)
            if not said["problems"]:
                made.drilled = str(said["drilled"])
                open_.ledger.set_backup(made)
            return made


def follows(backups: list[Backup], rotation: Rotation) -> bool:
    """Tell whether a backup that was made after a rotation's rewrap is confirmed."""
    return any(b.confirmed and b.version >= rotation.version for b in backups)


def _known(open_: Open, backup_id: str) -> Backup:
    made = next((b for b in open_.ledger.backups() if b.id == backup_id), None)
    if made is None:
        raise StrongroomError(f"no backup {backup_id} was made here", hint="'strongroom backup list'", status=NOTHING)
    return made


def _copy_part(source: int, target: Path, length: int) -> None:
    with target.open("xb") as file:
        offset = 0
        while part := os.pread(source, min(1 << 20, length - offset), offset):
            file.write(part)
            offset += len(part)
        file.flush()
        os.fsync(file.fileno())
