"""Free space: watched for ``incoming/`` and the archive apart, with a reserve that receiving never uses."""

from __future__ import annotations

import os
from pathlib import Path

from storescp.config import Config

# Of the reserve, what even admission leaves: for key records, index, ledger and erasures.
_LAST_PART = 4


def free(path: Path) -> int:
    """Return the bytes that a process of ours may still write below a path."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def archive_has_room(config: Config, count: int) -> bool:
    """Tell whether the vault may write so many bytes more into the archive."""
    return count == 0 or free(config.store_path) - count > config.settings.store.reserve_bytes // _LAST_PART


def shortage(config: Config) -> str:
    """Return why nothing more may be received now, empty if it may.

    The archive must hold what waits besides what comes. Where both are one file system, what waits is counted there
    already.
    """
    reserve = config.settings.store.reserve_bytes
    if free(config.incoming) < reserve:
        return "incoming has less free space than store.reserve_bytes"
    waiting = 0
    if config.incoming.stat().st_dev != os.stat(config.store_path).st_dev or config.settings.gate.user:
        with os.scandir(config.incoming) as entries:
            waiting = sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
    if free(config.store_path) - waiting < reserve:
        return "the archive has less free space than store.reserve_bytes and what waits for admission"
    return ""
