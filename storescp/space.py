"""Free space: watched for a folder of deposits and the archive apart, with a reserve that receiving never uses."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from storescp.config import Config

# Of the reserve, what even admission leaves: for key records, index, ledger and erasures.
_LAST_PART = 4
_MEASURE_AFTER = 16 << 20


def free(path: Path) -> int:
    """Return the bytes that a process of ours may still write below a path."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def archive_has_room(config: Config, count: int) -> bool:
    """Tell whether the vault may write so many bytes more into the archive."""
    return count == 0 or free(config.store_path) - count > config.settings.store.reserve_bytes // _LAST_PART


class Watch:
    """What may still be received: measured each tick, and counted down in between as objects arrive."""

    def __init__(self, config: Config, inbox: Path) -> None:
        """Measure for the first time.

        Args:
            config: The configuration.
            inbox: The folder of the deposits that are watched.
        """
        self._config = config
        self._inbox = inbox
        self._reserve = config.settings.store.reserve_bytes
        self._room = 0
        self._taken = 0
        self.look()

    def look(self) -> None:
        """Measure the archive's room.

        The archive must hold what waits besides what comes. Where both are one file system, what waits is counted there
        already. What is being copied counts twice for a moment: better refused once, and sent again, than lost.
        """
        config = self._config
        self._taken = 0
        waiting = 0
        if self._inbox.stat().st_dev != os.stat(config.store_path).st_dev or config.settings.gate.user:
            with os.scandir(self._inbox) as entries:
                for entry in entries:
                    # What is prepared for packs to come is not waiting for the archive; what is gone was admitted.
                    if not entry.name.endswith(".new"):
                        with contextlib.suppress(FileNotFoundError):
                            waiting += entry.stat(follow_symlinks=False).st_blocks * 512
        self._room = free(config.store_path) - waiting - self._reserve

    @property
    def room(self) -> int:
        """What the archive may still take, in bytes."""
        return self._room

    def told(self, room: int) -> None:
        """Take what another process measured."""
        self._room = room
        self._taken = 0

    def took(self, count: int) -> None:
        """Count what arrived since the archive was measured. Others count theirs: after much of it, measure again."""
        self._room -= count
        self._taken += count
        if self._taken > _MEASURE_AFTER:
            self.look()

    def shortage(self) -> str:
        """Return why nothing more may be received now, empty if it may."""
        if free(self._inbox) < self._reserve:
            return f"{self._inbox.name} has less free space than store.reserve_bytes"
        if self._room < 0:
            return "the archive has less free space than store.reserve_bytes and what waits for admission"
        return ""


def shortage(config: Config) -> str:
    """Return why something is not received now, at the gate or by the desk; empty if all is."""
    if short := Watch(config, config.incoming).shortage():
        return short
    # The desk's user may close its folder, and need not have one.
    with contextlib.suppress(OSError):
        return Watch(config, config.desk_incoming).shortage()
    return ""
