"""``verify``: open every record of every pack, and say what is missing, damaged, orphaned or waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from keys.anchors import AnchorError
from keys.keyring import KeyringError
from keys.seal import SealError
from storage.keysdb import StudyKeyRecord
from storage.pack import PackError
from storage.packfile import PackFile, Record, frames_digest
from storescp.errors import LOCKED, StrongroomError
from storescp.vault.examine import open_pack
from storescp.vault.opened import Open, Reader

# Progress is told this often, in packs.
_EVERY = 20


def verify(opened: Open, *, rate: float) -> Iterator[dict[str, Any]]:
    """Yield findings and progress.

    Args:
        opened: The unlocked vault.
        rate: Bytes a second to read at most; 0 for as fast as it goes.

    Yields:
        ``{"kind": "progress", "done", "total"}``;
        ``{"kind": "finding", "what", "pack", "reason", "objects"}``, what being ``missing``, ``damaged``, ``orphaned``
        or ``not indexed`` and objects are by study and sender; at the end ``{"kind": "end", ...}`` with counts.
    """
    began = time.monotonic()
    read = records = 0
    with opened.reader() as reader:
        packs = reader.keys_db.packs()
        for number, pack_id in enumerate(packs):
            if number % _EVERY == 0:
                yield {"kind": "progress", "done": number, "total": len(packs)}
            record = reader.keys_db.find(pack_id)
            if opened.closed:
                # What does not open now says nothing about the pack.
                raise StrongroomError("the vault was locked while it was verified", status=LOCKED)
            if record is None:
                # Discarded or erased since the list was made.
                continue
            size, count, finding = check(opened, reader, record)
            if finding:
                if reader.keys_db.find(pack_id) is None or _is_moving(opened, pack_id):
                    # Discarded, erased or under another name since it was looked up, or just now.
                    continue
                # What has come into another pack's place meanwhile is there now.
                size, count, finding = check(opened, reader, record)
            read += size
            records += count
            if finding:
                yield {"kind": "finding", "pack": pack_id, **finding}
            if rate:
                time.sleep(max(0.0, read / rate - (time.monotonic() - began)))
        known = set(packs)
        for path in opened.archive.packs():
            unknown = path.name not in known and reader.keys_db.find(path.name) is None
            # In this order: a pack that another one comes into the place of is unlinked before that is settled.
            if unknown and not _is_moving(opened, path.name) and path.exists():
                reason = "no key record: nothing opens it"
                yield {"kind": "finding", "what": "orphaned", "pack": path.name, "reason": reason, "objects": []}
        waiting = len(opened.archive.deposits())
    yield {"kind": "end", "packs": len(packs), "records": records, "bytes": read, "waiting": waiting}


def _is_moving(opened: Open, pack_id: str) -> bool:
    """Tell whether a pack is getting another name and study key just now, or is the one that gets its place."""
    ledger = opened.own_ledger()
    try:
        return any(pack_id in {move.old, move.new} for move in ledger.unsettled())
    finally:
        ledger.close()


def check(opened: Open, reader: Reader, record: StudyKeyRecord) -> tuple[int, int, dict[str, Any]]:
    """Return bytes read, records that opened, and what is wrong with a pack."""
    rows = reader.index.rows_of(record.pack_id)
    path = opened.archive.find(record.pack_id)
    if path is None:
        return 0, 0, {"what": "missing", "reason": "the pack is not there", "objects": rows}
    try:
        with PackFile(path) as file:
            size = file.size
            pack = open_pack(file, opened.ring, record)
            good = [found.frame for found in pack.records() if isinstance(found, Record)]
    except (OSError, PackError, SealError, KeyringError, AnchorError) as error:
        return 0, 0, {"what": "damaged", "reason": str(error), "objects": rows}
    offsets = {frame.offset for frame in good}
    if frames_digest(good) != record.place.frames_digest:
        bad = [row for row in rows if row["offset"] not in offsets]
        return size, len(good), {"what": "damaged", "reason": "records do not open", "objects": bad}
    if offsets != {row["offset"] for row in rows}:
        return size, len(good), {"what": "not indexed", "reason": "'strongroom reindex' mends it", "objects": []}
    return size, len(good), {}
