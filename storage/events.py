"""The gate's events on their way to the audit chain: one small sealed file for what happened in a few seconds.

A pack like any deposit, with flag 1 in its header, one record, the label ``event`` in its seal, and a name that ends
in ``.events``; the gate can write it and nobody but the vault can open it. It never gets into the archive.
Source: docs/format.md, section 2.4.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from keys import encoding
from keys.seal import SealError, context, open_sealed, seal
from keys.versions import Version, new_key
from storage import direct, pack
from storage.openpack import Keys

SUFFIX = ".events"
# Of what a gate writes in one file; the vault has it in memory.
CONTENT_LIMIT = 192 << 10
_FILE_LIMIT = CONTENT_LIMIT + (64 << 10)


class EventsError(Exception):
    """A file of events is none, or does not open; the message says why."""


def deposit(folder: Path, store_id: bytes, keys: Keys, content: bytes) -> None:
    """Write events durably: when this returns, they are the vault's.

    Args:
        folder: Where deposits go.
        store_id: 16 bytes.
        keys: Where the deposit key comes from.
        content: At most ``CONTENT_LIMIT`` bytes.

    Raises:
        DepositError: No usable deposit key is published.
        OSError: The disk refused it; nothing is left of it.
    """
    key_id, object_id, key = secrets.token_bytes(16), secrets.token_bytes(16), new_key()
    making = folder / f"{key_id.hex()}.new"
    try:
        with keys.held() as deposit_key:
            wrapped = deposit_key.wrap(key, key_id)
            header = pack.Header(store_id, key_id, deposit_key.version, wrapped, pack.EVENTS)
            sealed = seal(content, key, _context("event", header, object_id))
            nothing = seal(b"{}", key, _context("attributes", header, object_id))
            frame = pack.Frame(pack.PAGE, object_id, len(sealed), len(nothing))
            encoding.create(making, header.encode() + frame.encode() + sealed + nothing, mode=0o640)
            os.rename(making, making.with_suffix(SUFFIX))
            encoding.sync_folder(folder)
    except BaseException:
        making.unlink(missing_ok=True)
        making.with_suffix(SUFFIX).unlink(missing_ok=True)
        raise


def found(folder: Path) -> list[Path]:
    """Return the files of events in a folder, the oldest first."""
    mine = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                # Whoever writes the folder could remove it again in this moment.
                with contextlib.suppress(FileNotFoundError):
                    mine.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.path))
    return [Path(path) for _, path in sorted(mine)]


def read(path: Path, store_id: bytes, version: Callable[[int], Version], owner: int) -> bytes:
    """Return the events in a file.

    Args:
        path: The file.
        store_id: 16 bytes.
        version: Returns a key version; what it raises passes through.
        owner: The user who deposits there, whose file it must be.

    Raises:
        EventsError: It is malformed, another's, or does not open.
        OSError: It cannot be read.
    """
    # Before it is opened: an open of a link or a socket fails each time, as a disk does that may answer later.
    if not stat.S_ISREG(path.lstat().st_mode):
        raise EventsError("it is no regular file")
    with direct.opened(path) as descriptor:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != owner or about.st_size > _FILE_LIMIT:
            raise EventsError("it is no regular file of the user who deposits there, or is too large")
        content = direct.Pages(descriptor).read(0, about.st_size)
    try:
        header = pack.parse_header(content[: pack.PAGE])
        frame = pack.frame_at(lambda offset, length: content[offset : offset + length], pack.PAGE, len(content))
        if frame is None or header.flags != pack.EVENTS or header.store_id != store_id or not header.version:
            raise EventsError("it is no file of this store's events")
        if header.key_id.hex() != path.name.removesuffix(SUFFIX):
            raise EventsError("its name is not the one in its header")
        key = version(header.version).unwrap_deposit(header.wrapped, header.key_id)
        sealed = content[frame.dataset_start : frame.attributes_start]
        return open_sealed(sealed, key, _context("event", header, frame.object_id))
    except (pack.PackError, SealError) as error:
        raise EventsError(str(error)) from error


def _context(label: str, header: pack.Header, object_id: bytes) -> bytes:
    return context(label, header.bound(), object_id)
