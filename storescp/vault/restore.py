"""A store made from a backup and enough shares, on a machine that has nothing else.

Runs in the command itself, not in a vault: there is none yet.
Source: docs/design.md, "Backup"; docs/format.md, section 11.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys import encoding, recovery, shares, slots
from keys.anchors import AnchorError
from keys.keyring import KeyringError
from keys.shares import RecoveryError
from storage import backup
from storage.archive import CONSTANT_TIME, Archive
from storage.backup import BackupError, Folder, Manifest
from storage.keysdb import KeysDatabase, StudyKeyRecord
from storage.sqlite import DatabaseError
from storescp.config import Config, Settings, Store, convert, load, render
from storescp.errors import StrongroomError
from storescp.vault.create import hand_over, issue_server
from storescp.vault.rebuild import rebuild
from storescp.vault.recovery import Recovery
from storescp.vault.state import Vault

_PROGRESS_PACKS = 50
_SHOWN = 5
_TRUST = "settings/trust/"
_AGAIN = "remove what was made, and begin again"


class Machine(msgspec.Struct, frozen=True):
    """Where a store is restored, and what the new machine calls itself.

    ``file`` is the configuration, which is there or is made; ``key_file`` is written; ``users`` are the vault's and the
    gate's, where they are two; ``server_names`` are for a certificate, where the store issues its own.
    """

    file: Path
    key_file: Path
    users: tuple[str, str] | None = None
    server_names: tuple[str, ...] = ()


class Source:
    """A backup that shares opened: what it is was proved before anything of it is used."""

    def __init__(self, folder: Folder, generation: Path, exports: list[Path], typed: list[str]) -> None:
        """Open it with shares, those of whichever recovery key an export in it is sealed to.

        Raises:
            StrongroomError: They open no export in it, or the backup is not what the store signed.
        """
        self.folder, self.generation = folder, generation
        self.export, contents = _opened(exports, typed)
        self.recovery = contents.recovery
        seed = Ed25519PrivateKey.from_private_bytes(contents.signing_seed)
        self.signing_key = seed.public_key().public_bytes_raw()
        try:
            self.manifest: Manifest = folder.read(generation, self.signing_key)
        except BackupError as error:
            raise StrongroomError(str(error), hint="take another generation or another copy") from error

    def problems(self) -> list[str]:
        """Return what is wrong with the backup, as far as that can be seen without opening packs."""
        return list(self.folder.check(self.generation, self.manifest))

    @functools.cached_property
    def whole(self) -> list[str]:
        """The names of the files that are as the manifest says."""
        return [one.name for one in self.manifest.files if not backup.file_fault(self.generation, one)]

    def needs(self) -> None:
        """Check that what nothing opens without can be read.

        Raises:
            StrongroomError: It cannot.
        """
        try:
            database = KeysDatabase(self.generation / "keys.db", immutable=True)
            try:
                for _ in records_of(database):
                    pass
            finally:
                database.close()
        except (DatabaseError, OSError, ValueError) as error:
            raise StrongroomError(
                f"keys.db of backup {self.manifest.id} cannot be read, and nothing opens without it: {error}",
                hint="take another generation or another copy",
            ) from error


def _opened(exports: list[Path], typed: list[str]) -> tuple[bytes, recovery.Contents]:
    faults = []
    for path in exports:
        try:
            secret = shares.combine(typed)
            try:
                content = path.read_bytes()
                return content, recovery.open_export(content, secret)
            finally:
                secret[:] = bytes(len(secret))
        except (RecoveryError, OSError) as error:
            faults.append(str(error))
    raise StrongroomError(f"the backup does not open: {faults[-1]}", hint="type each share as it stands on paper")


def find(path: Path, name: str = "") -> tuple[Folder, Path, list[Path]]:
    """Return a backup folder, one of its generations (the newest without a name), and the recovery exports in it.

    Raises:
        StrongroomError: There is none, or none with an export.
    """
    folder = Folder(path)
    try:
        folder.store_id()
        generation = folder.generation(name)
    except BackupError as error:
        raise StrongroomError(str(error), hint="--from names the folder that 'strongroom backup --to' wrote") from error
    exports = sorted(generation.glob(f"*{backup.EXPORT_SUFFIX}"))
    if not exports:
        raise StrongroomError(
            f"backup {generation.name} holds no recovery export",
            hint="put its files beside the store's own anchors, or take 'strongroom recovery rebuild' with an export",
        )
    return folder, generation, exports


def restore(
    source: Source, machine: Machine, typed: list[str], *, incomplete: bool = False
) -> Iterator[dict[str, Any]]:
    """Make a store from a backup; yield what happens.

    Raises:
        StrongroomError: Something of a store is there already, or the backup is damaged.
    """
    problems = source.problems()
    if problems and not incomplete:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise StrongroomError(
            "the backup is damaged: " + "; ".join(problems[:_SHOWN]) + more,
            hint="take another copy or generation; --incomplete restores what is there",
        )
    source.needs()
    key_file = machine.key_file
    config = configuration(source, machine.file, key_file, machine.users)
    if bool(config.settings.gate.user) != (machine.users is not None):
        raise StrongroomError(
            f"{machine.file} and the options do not agree whether gate and vault are two users",
            hint="--vault-user and --gate-user name them where gate.user is set",
        )
    # The configuration's own folder is made.
    if key_file.parent != machine.file.parent and not key_file.parent.is_dir():
        raise StrongroomError(f"there is no folder {key_file.parent} for the key file")
    try:
        yield from lay_out(source, config, source.manifest.packs, _copied(source, config))
        rebuild(config, source.export, typed, key_file)
        yield {"kind": "step", "text": "keyring and anchors are made anew; the index is being filled"}
        vault = Vault(config)
        try:
            vault.unlock(slots.read_key_file(key_file))
            vault.auditor.record("restored", backup=source.manifest.id, made=source.manifest.created)
            # The same shares open what is exported from now on.
            if all(key.id != source.recovery.id for key in vault.unlocked().ring.body.recovery):
                Recovery(vault).add(os.geteuid(), source.recovery)
            counts = vault.unlocked().index.counts()
            ca = vault.unlocked().ring.body.authority
            if ca and machine.server_names and config.trust and not config.certificate.exists():
                issue_server(config, ca, list(machine.server_names))
        finally:
            vault.lock()
            vault.auditor.close()
        for folder in (config.store_path, *config.store_path.rglob("*")):
            if folder.is_dir():
                encoding.sync_folder(folder)
        if machine.users is not None:
            hand_over(config, machine.users, [key_file])
    except OSError as error:
        what = f"{error.filename or machine.file}: {error.strerror}"
        raise StrongroomError(f"not restored: {what}", hint=_AGAIN) from error
    except (KeyringError, AnchorError, slots.UnlockError, DatabaseError, ValueError) as error:
        raise StrongroomError(f"not restored: {error}", hint=_AGAIN) from error
    yield {"kind": "restored", "counts": counts, "problems": problems, "waiting": source.manifest.waiting}


def configuration(source: Source, file: Path, key_file: Path, users: tuple[str, str] | None = None) -> Config:
    """Return the configuration that is there, or make one from the backup's with the store's folders beside it."""
    if file.exists():
        config = load(file)
        if config.signing_key != source.signing_key:
            raise StrongroomError(f"{file} is the configuration of another store")
    else:
        settings = _settings(source)
        settings.unlock.key_file = str(key_file)
        settings.gate.user = users[1] if users else ""
        config = Config(file, settings)
    taken = [p for p in (config.keyring, config.keys_db, config.store_path / "objects", key_file) if p.exists()]
    if config.anchors.exists():
        taken += sorted(config.anchors.glob("anchor-*"))
    if taken:
        raise StrongroomError(
            f"{taken[0]} exists already: a store is never restored over another one",
            hint="name another place with --config DIR/strongroom.toml",
        )
    return config


def _settings(source: Source) -> Settings:
    public = "ed25519:" + encoding.to_base64(source.signing_key).decode()
    store = Store(path="store", anchors="anchors", spool="spool", signing_key=public)
    settings = None
    with contextlib.suppress(OSError, ValueError):
        if "settings/strongroom.toml" not in source.whole:
            raise ValueError
        text = (source.generation / "settings/strongroom.toml").read_text("utf-8")
        settings, _ = convert(tomllib.loads(text), Settings)
    kept = Settings(store=store)
    kept.gate.trust = [f"tls/{name}" for name in _trusted(source).values()]
    if settings is None:
        return kept
    # Of the other machine's: what it is called and what it allows; not its places, users, addresses and token.
    kept.store.reserve_bytes, kept.gate.ae_title = settings.store.reserve_bytes, settings.gate.ae_title
    kept.keys.destroy_after_days = settings.keys.destroy_after_days
    return kept


def _trusted(source: Source) -> dict[str, str]:
    """Return the trusted authorities' files, each with its name in ``tls/``: two may have had one name."""
    found: dict[str, str] = {}
    for name in (name for name in source.whole if name.startswith(_TRUST)):
        numbered = name.removeprefix(_TRUST)
        short = numbered.partition("-")[2]
        found[name] = numbered if short in found.values() else short
    return found


def lay_out(source: Source, config: Config, total: int, packs: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Put a backup's files where the store has them."""
    generation = source.generation
    for folder, mode in (
        (config.file.parent, 0o700),
        (config.store_path, 0o700),
        (config.incoming, 0o700),
        (config.desk_incoming, 0o700),
        (config.outbox, 0o750),
        (config.alert_state, 0o700),
        (config.public, 0o755),
        (config.peers, 0o755),
        (config.socket.parent, 0o750),
    ):
        if not folder.exists():
            folder.mkdir(mode=mode, parents=True)
            folder.chmod(mode)
    Archive(config.store_path, *config.inboxes).prepare()
    for name in ("audit", "recovery", "certificates"):
        (config.store_path / name).mkdir(mode=0o700)
    (config.file.parent / "tls").mkdir(mode=0o755, exist_ok=True)
    chain = [one.name for one in source.manifest.files if one.name.startswith("audit/")]
    audit_whole = set(chain) <= set(source.whole)
    trusted = _trusted(source)
    for name in ["keys.db", *(name for name in source.whole if name != "keys.db")]:
        target = _place(config, name, trusted)
        if target is None or target.exists() or (name.startswith("audit/") and not audit_whole):
            continue
        if not target.parent.exists():
            target.parent.mkdir(mode=0o700)
        backup.copy_file(generation / name, target)
        if not target.is_relative_to(config.store_path):
            # Peers and trust: nothing secret, and the gate's user reads them.
            target.chmod(0o644)
    if not audit_whole:
        _put_aside(config, source, chain)
    for done in packs:
        yield {"kind": "progress", "done": done, "total": total}
    if not config.file.exists():
        encoding.create(config.file, render(config.settings).encode(), mode=0o644)


def _put_aside(config: Config, source: Source, chain: list[str]) -> None:
    """Keep what there is of a chain beside the one that begins, as 'audit restart' keeps it."""
    aside = config.store_path / f"audit-{source.manifest.id}"
    aside.mkdir(mode=0o700)
    for path in (source.generation / "audit" / Path(name).name for name in chain):
        if path.is_file() and not path.is_symlink():
            backup.copy_file(path, aside / path.name)


def _place(config: Config, name: str, trusted: dict[str, str]) -> Path | None:
    """Return where the store has a file of a generation; None for what is made anew."""
    folder, _, rest = name.rpartition("/")
    if folder == "settings/peers.d":
        return config.peers / rest
    if folder == "settings/certificates":
        return config.store_path / "certificates" / rest
    if name in trusted:
        return config.file.parent / "tls" / trusted[name]
    if name.endswith(backup.EXPORT_SUFFIX):
        return config.store_path / "recovery" / rest
    if name == "keys.db" or re.fullmatch(r"ledger-[0-9]+\.db|audit(-[0-9A-Za-z-]+)?/[^/]+", name):
        return config.store_path / name
    return None


def _copied(source: Source, config: Config) -> Iterator[int]:
    """Copy the packs to where they belong; yield how many there are now."""
    archive = Archive(config.store_path, *config.inboxes)
    database = KeysDatabase(source.generation / "keys.db", immutable=True)
    try:
        for number, record in enumerate(records_of(database), 1):
            quarantined = record.place.pack_id != record.place.key_id
            target = archive.quarantine_path(record.pack_id) if quarantined else archive.path(record.pack_id)
            _put(source.folder.pack(record.pack_id), target)
            if number % _PROGRESS_PACKS == 0:
                yield number
    finally:
        database.close()
    for name in filter(backup.is_pack, source.manifest.raw):
        _put(source.folder.pack(name), archive.quarantine_path(name))
    yield source.manifest.packs


def _put(path: Path, target: Path) -> None:
    if not path.exists():
        return
    if not target.parent.exists():
        target.parent.mkdir(mode=0o700)
    backup.copy_file(path, target)
    target.chmod(0o400)
    os.utime(target, CONSTANT_TIME)


def records_of(database: KeysDatabase) -> Iterator[StudyKeyRecord]:
    after = ""
    while batch := database.records(after=after, limit=1000):
        after = batch[-1].pack_id
        yield from batch
