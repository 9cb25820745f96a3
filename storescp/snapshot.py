"""What gate and vault let others count: numbers in one small file each, ``spool/metrics/<process>/numbers.json``.

Numbers, times, and names out of the configuration or of fixed tables: AE titles, jobs, reasons. No patient, no UID, no
key. A file is replaced whole and not synced: after a power cut the next one comes in seconds. Counters are of one
process, and begin again with it; ``started`` says when that was. Whoever reads believes nothing that does not fit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import stat
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from storescp.config import Config

FORMAT = 1
_FILE_LIMIT = 4 << 20
_FILE_MODE, _FOLDER_MODE = 0o640, 0o2750
# After so many of its intervals a process that wrote nothing new is taken for dead, and not before a minute.
_INTERVALS, _LEAST_SECONDS = 4, 60.0

log = logging.getLogger(__name__)

Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Seconds = Annotated[float, Meta(ge=0, le=1e11)]
# A label's value: whatever it is, it is not long.
Name = Annotated[str, Meta(max_length=100)]
_Counts = dict[Name, Count]
_Few = Meta(max_length=10_000)


class Disk(msgspec.Struct):
    """A file system, in bytes."""

    free: Count
    total: Count


class Ends(msgspec.Struct):
    """When a certificate or list ends: seconds since 1970. ``kind``: server, authority, crl, peer or store."""

    kind: Name
    name: Name
    until: Seconds


class Job(msgspec.Struct):
    """How a job ended the last time; ``result`` is empty and ``ended`` 0 where it never did."""

    job: Name
    result: Name
    ended: Seconds
    seconds: Seconds
    overdue: bool
    running: bool


class Key(msgspec.Struct):
    """A key version, and when it was made."""

    version: Count
    state: Name
    created: Seconds


class Patches(msgspec.Struct):
    """The last patch report: when, how many items in each state, since when the oldest fix of a severity waits."""

    made: Seconds
    states: _Counts = msgspec.field(default_factory=dict)
    oldest: dict[Name, Seconds] = msgspec.field(default_factory=dict)


class Inside(msgspec.Struct):
    """What only an unlocked vault can tell; times are 0 where there is none."""

    keys: Annotated[list[Key], _Few]
    counts: _Counts
    stored: Annotated[dict[Name, Seconds], _Few]
    quarantine: Count
    backup: Seconds
    export: Seconds
    certificates: list[Ends]


class VaultNumbers(msgspec.Struct):
    """What the vault tells. ``every``: in how many seconds at most it means to tell it anew."""

    format: int
    time: Seconds
    every: Seconds
    started: Seconds
    locked_since: Seconds
    packs: Count
    bytes: Count
    lag: Seconds
    disks: dict[Name, Disk]
    slots: Count
    audit_fault: bool
    alerts: dict[Name, dict[Name, Count]]
    jobs: list[Job]
    patches: Patches | None = None
    inside: Inside | None = None


class Received(msgspec.Struct):
    """What a peer did: associations accepted, objects stored and their bytes, refusals by reason, last store."""

    associations: Count = 0
    objects: Count = 0
    bytes: Count = 0
    refused: _Counts = msgspec.field(default_factory=dict)
    last: Seconds = 0.0


class GateNumbers(msgspec.Struct):
    """What the gate tells. ``latency``: C-STOREs in each bucket of ``gate/meter.py``, the last for all longer ones."""

    started: Seconds
    workers: Count
    latency: Annotated[list[Count], Meta(max_length=100)]
    latency_seconds: Seconds = 0.0
    format: int = FORMAT
    time: Seconds = 0.0
    every: Seconds = 0.0
    ready: Count = 0
    restarts: Count = 0
    connections: Count = 0
    receiving: bool = True
    room: int = 0
    turned_away: _Counts = msgspec.field(default_factory=dict)
    peers: Annotated[dict[Name, Received], _Few] = msgspec.field(default_factory=dict)
    certificates: Annotated[list[Ends], _Few] = msgspec.field(default_factory=list)


_Numbers = TypeVar("_Numbers", VaultNumbers, GateNumbers)


class Writer:
    """Writes a process's numbers. A disk or folder that refuses them is logged once, and stops nothing."""

    def __init__(self, config: Config, process: str) -> None:
        self._file = file_of(config, process)
        self._failing = False

    def write(self, numbers: VaultNumbers | GateNumbers) -> None:
        """Replace the file."""
        try:
            self._write(msgspec.json.encode(numbers))
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.error("numbers for monitoring cannot be written to %s: %s", self._file.parent, error.strerror)
            self._failing = True

    def _write(self, content: bytes) -> None:
        folder, new = self._file.parent, self._file.with_suffix(".new")
        if not folder.exists():
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(new, flags, _FILE_MODE), "wb") as file:
            # Whatever the umask is: who serves the numbers reads them as the folder's group.
            os.fchmod(file.fileno(), _FILE_MODE)
            file.write(content)
        os.rename(new, self._file)


class Pace:
    """How often something is done: each so many seconds, and less often where it takes more than its hundredth."""

    def __init__(self, seconds: float) -> None:
        self._seconds = self.every = seconds
        self._next: float | None = None

    def due(self, now: float) -> bool:
        """Tell whether it is time, by a clock that only goes on."""
        return self._next is None or now >= self._next

    def done(self, began: float, ended: float) -> None:
        """Take in that it was done."""
        self.every = max(self._seconds, 100 * (ended - began))
        self._next = began + self.every


def file_of(config: Config, process: str) -> Path:
    """Return where a process, ``gate`` or ``vault``, writes its numbers."""
    return config.metrics / process / "numbers.json"


def read(config: Config, process: str, kind: type[_Numbers]) -> _Numbers | None:
    """Return the numbers of a process; None where there are none that can be understood."""
    try:
        descriptor = os.open(file_of(config, process), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            content = file.read(_FILE_LIMIT + 1)
        numbers = msgspec.json.decode(content, type=kind) if len(content) <= _FILE_LIMIT else None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return numbers if numbers is not None and numbers.format == FORMAT else None


def is_fresh(numbers: VaultNumbers | GateNumbers, now: float) -> bool:
    """Tell whether numbers are of a process that still writes them; a clock that was set back makes none old."""
    return now - numbers.time <= max(_LEAST_SECONDS, _INTERVALS * numbers.every)


class _Item(msgspec.Struct):
    state: str
    severity: str = ""
    candidate: str = ""
    since: datetime | None = None


class _Report(msgspec.Struct):
    made: datetime
    items: list[_Item]


def patches_of(document: bytes) -> Patches:
    """Return the numbers of what ``patch report --json`` printed.

    Raises:
        msgspec.MsgspecError: It is something else.
    """
    report = msgspec.json.decode(document, type=_Report)
    states: dict[str, int] = {}
    oldest: dict[str, float] = {}
    for item in report.items:
        states[item.state] = states.get(item.state, 0) + 1
        if item.since is not None and (item.state != "ok" or item.candidate):
            severity, since = item.severity or "none", item.since.timestamp()
            oldest[severity] = min(oldest.get(severity, since), since)
    return Patches(report.made.timestamp(), states, oldest)


def prepare(config: Config, vault: int, gate: str) -> None:
    """Make the folders of a store with two users, as root; the gate's user, who has no key, serves both.

    Args:
        config: The store.
        vault: The vault's user id.
        gate: The gate's user.

    Raises:
        OSError: They cannot be made.
    """
    found = pwd.getpwnam(gate)
    config.metrics.mkdir(mode=0o755, exist_ok=True)
    config.metrics.chmod(0o755)
    for process, uid in (("vault", vault), ("gate", found.pw_uid)):
        folder = file_of(config, process).parent
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            os.chown(folder, uid, found.pw_gid)
            folder.chmod(_FOLDER_MODE)


def now() -> float:
    """Return the seconds since 1970, as these files have times."""
    return round(time.time(), 3)
