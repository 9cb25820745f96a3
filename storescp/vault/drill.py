"""A drill: recovery tried in memory, so that the day on which it is needed is not the first.

The keyring is rebuilt from shares in a scratch folder, everything but the packs is restored there, a sample of the
packs is opened from the backup, and the store signs what was seen. Needs the backup and the shares, and nothing else.
Source: docs/backup.md.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keys import keyring, signed, slots
from keys.anchors import AnchorError, FileAnchors
from keys.keyring import KeyringError
from keys.seal import SealError
from storage import audit, backup
from storage.keysdb import KeysDatabase, StudyKeyRecord
from storage.ledger import Ledger
from storage.pack import PackError
from storage.packfile import PackFile, Record, frames_digest
from storage.sqlite import DatabaseError
from storescp import clock
from storescp.config import Config
from storescp.errors import StrongroomError
from storescp.vault.examine import open_pack
from storescp.vault.opened import database_version
from storescp.vault.rebuild import rebuild
from storescp.vault.restore import Source, configuration, lay_out

_PROGRESS_PACKS = 50
# The newest packs are always in a sample: those that an incremental backup copied last.
_NEWEST = 20


def drill(source: Source, typed: list[str], scratch: Path, sample: int) -> Iterator[dict[str, Any]]:
    """Restore all but the packs into a scratch folder, open a sample of those; yield what happens.

    Args:
        source: The backup.
        typed: The shares.
        scratch: An empty folder in memory: the new keyring and its anchors lie there beside each other.
        sample: How many packs to open, the newest among them; 0 for all.

    Yields:
        At the end ``{"kind": "drilled", "statement", "problems"}``, the statement signed by the store.

    Raises:
        StrongroomError: It cannot be tried.
    """
    problems = source.problems()
    source.needs()
    config = configuration(source, scratch / "strongroom.toml", scratch / "store.key")
    try:
        yield from lay_out(source, config, 0, [])
    except OSError as error:
        raise StrongroomError(
            f"the backup cannot be tried: {error.filename or scratch}: {error.strerror}",
            hint="--scratch names another folder in memory, with room for all but the packs",
        ) from error
    rebuild(config, source.export, typed, scratch / "store.key")
    yield {"kind": "step", "text": "keyring, anchors, keys.db and ledger are restored into the scratch folder"}
    try:
        secret = slots.read_key_file(scratch / "store.key")
        ring = keyring.unlock(config.keyring, secret, FileAnchors(config.anchors))
    except (KeyringError, AnchorError, slots.UnlockError, slots.KeyFileError) as error:
        raise StrongroomError(f"the restored keyring does not open: {error}") from error
    try:
        problems += _ledger_problems(config, ring)
        chain = audit.verify(config.store_path / "audit", ring.store_id, source.signing_key)
        if chain.fault:
            problems.append(f"the audit chain: {chain.fault}")
        chosen = _sample(source, sample)
        opened = 0
        for number, record in enumerate(chosen, 1):
            count, fault = _open_one(source, ring, record)
            opened += count
            problems += [fault] if fault else []
            if number % _PROGRESS_PACKS == 0:
                yield {"kind": "progress", "done": number, "total": len(chosen)}
        statement = {
            "format": 1,
            "store_id": ring.header.store_id,
            "backup": source.manifest.id,
            "made": source.manifest.created,
            "drilled": clock.now(),
            "packs": source.manifest.packs,
            "bytes": source.manifest.bytes,
            "digest": source.manifest.digest,
            "opened_packs": len(chosen),
            "opened_instances": opened,
            "audit_records": chain.head.number,
            "problems": problems,
        }
        content = signed.write(backup.DRILL, statement, ring.signing)
    finally:
        ring.forget()
    yield {"kind": "drilled", "statement": content, "said": statement}


def _ledger_problems(config: Config, ring: keyring.Keyring) -> list[str]:
    try:
        version = database_version(config, ring)
        ledger = Ledger(config.ledger(version), ring.version(version).ledger_key())
        try:
            ledger.rotations()
        finally:
            ledger.close()
    except (DatabaseError, KeyringError, AnchorError) as error:
        return [f"the ledger does not open: {error}"]
    return []


def _sample(source: Source, count: int) -> list[StudyKeyRecord]:
    database = KeysDatabase(source.generation / "keys.db", immutable=True)
    try:
        names = database.packs()
        if count and count < len(names):
            newest = names[-min(_NEWEST, count) :]
            names = newest + random.SystemRandom().sample(names[: -len(newest)], count - len(newest))
        return [record for name in names if (record := database.find(name)) is not None]
    finally:
        database.close()


def _open_one(source: Source, ring: keyring.Keyring, record: StudyKeyRecord) -> tuple[int, str]:
    """Return how many records of a pack opened, and what is wrong with it."""
    try:
        with PackFile(source.folder.pack(record.pack_id)) as file:
            good = [found.frame for found in open_pack(file, ring, record).records() if isinstance(found, Record)]
    except (OSError, PackError, SealError, KeyringError, AnchorError) as error:
        return 0, f"pack {record.pack_id} does not open: {error}"
    if frames_digest(good) != record.place.frames_digest:
        return len(good), f"pack {record.pack_id}: records do not open"
    return len(good), ""
