"""Alerts: what is wrong and stays wrong until somebody acts. One file for each that stands, in the outbox.

Whoever notices raises an alert, as often as it is noticed, and resolves it when it is over. The log says it here; the
errand that sends alerts (``errands/alert.py``) reads the outbox and writes elsewhere. What an alert says comes from one
table (``alertkinds.py``), no caller's text.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shlex
import stat
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from keys import encoding
from storescp import clock
from storescp.alertkinds import KINDS, SEVERITIES, TOO_MANY, UID

# Standing at a time; what comes after them is told as one alert, TOO_MANY.
LIMIT = 100
_FILE_LIMIT = 4096
_MODE = 0o640
_FOLDER_MODE = 0o750
_COUNT_LIMIT = 1 << 60
_FILE_NAME = re.compile(r"[a-z-]{1,40}\.[0-9a-f]{16}\.json", re.ASCII)

log = logging.getLogger(__name__)


class Alert(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An alert that stands. ``since`` is when it was raised first, ``last_seen`` when it last was; RFC 3339, UTC."""

    format: int
    kind: str
    what: str
    counts: dict[str, int]
    since: str
    last_seen: str

    @property
    def name(self) -> str:
        """One for each kind and what it is about; a part of a file's name."""
        return f"{self.kind}.{hashlib.sha256(self.what.encode()).hexdigest()[:16]}"

    @property
    def severity(self) -> str:
        """``critical`` or ``warning``."""
        return KINDS[self.kind].severity

    @property
    def text(self) -> str:
        """What is wrong."""
        return KINDS[self.kind].text.format(what=self.what, **self.counts)

    @property
    def command(self) -> str:
        """The command that resolves it, or says what does."""
        return "strongroom " + KINDS[self.kind].command.format(what=shlex.quote(self.what))

    def check(self) -> None:
        """Check that this can be said.

        Raises:
            ValueError: There is no such kind, or name and counts are not what it has.
        """
        kind = KINDS.get(self.kind)
        if self.format != 1 or kind is None:
            raise ValueError("no alert of a kind that is known")
        if not kind.name.fullmatch(self.what) or UID.search(self.what):
            raise ValueError(f"an alert of kind {self.kind} cannot name this")
        if self.counts.keys() != kind.counts() or not all(-1 < n < _COUNT_LIMIT for n in self.counts.values()):
            raise ValueError(f"an alert of kind {self.kind} has other counts")
        clock.parse(self.since)
        clock.parse(self.last_seen)


class Outbox(NamedTuple):
    """What lies in an outbox: alerts, and the names of what stands but could not be read."""

    alerts: list[Alert]
    unreadable: list[str]


class Alerts:
    """The alerts that stand, in a folder of its own. For threads and processes of the folder's owner.

    Needs no key: it works while the vault is locked.
    """

    def __init__(self, folder: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._folder = folder
        self._now = now
        self._lock = threading.Lock()
        self._failing = False

    def raise_(self, kind: str, what: str = "", **counts: int) -> None:
        """Raise an alert, or say of a standing one that it still is so: its time of raising stays.

        Args:
            kind: One of ``KINDS``.
            what: What it is about, where the kind has a name for it: a job, a peer. Never a patient or a UID.
            counts: Those that the kind's text has.

        A disk that refuses the file is logged and raises nothing: whoever notices something goes on.

        Raises:
            ValueError: The kind has no such name or counts.
        """
        now = clock.text(self._now())
        alert = Alert(1, kind, what, counts, now, now)
        alert.check()
        try:
            with self._held():
                self._raise(alert)
            self._failing = False
        except OSError as error:
            self._fail(alert, error)

    def resolve(self, kind: str, what: str = "") -> None:
        """Say that something is over. Nothing happens where it was not raised.

        Raises:
            ValueError: There is no such kind.
        """
        if kind not in KINDS:
            raise ValueError("no alert of a kind that is known")
        path = self._path(Alert(1, kind, what, {}, "", ""))
        if not path.exists():
            return
        try:
            with self._held():
                path.unlink(missing_ok=True)
                if len(_names(self._folder)) <= LIMIT and kind != TOO_MANY:
                    self._path(Alert(1, TOO_MANY, "", {}, "", "")).unlink(missing_ok=True)
                encoding.sync_folder(self._folder)
            log.warning("alert resolved: %s%s", kind, f" ({what})" if what else "")
        except OSError as error:
            log.error("the alert %s cannot be resolved: %s", kind, error.strerror)

    def standing(self) -> list[Alert]:
        """Return the alerts that stand, the worst and then the oldest first.

        Raises:
            OSError: The outbox cannot be read.
        """
        return read(self._folder).alerts

    def _raise(self, alert: Alert) -> None:
        path = self._path(alert)
        old = _read(path)
        if old is None:
            names = _names(self._folder)
            if path.name not in names and len(names) >= LIMIT and alert.kind != TOO_MANY:
                self._raise(Alert(1, TOO_MANY, "", {}, alert.since, alert.last_seen))
                return
            log.warning("ALERT (%s): %s; '%s'", alert.severity, alert.text, alert.command)
            encoding.replace(path, encoding.canonical(alert), _MODE)
        elif (alert.last_seen, alert.counts) != (old.last_seen, old.counts):
            encoding.replace(path, encoding.canonical(msgspec.structs.replace(alert, since=old.since)), _MODE)

    def _path(self, alert: Alert) -> Path:
        return self._folder / f"{alert.name}.json"

    def _held(self) -> _Held:
        if not self._folder.exists():
            self._folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)
            encoding.sync_folder(self._folder.parent)
        return _Held(self._lock, self._folder)

    def _fail(self, alert: Alert, error: OSError) -> None:
        # The same alerts come each minute.
        if not self._failing:
            log.error("ALERT (%s): %s; '%s'", alert.severity, alert.text, alert.command)
            log.error("alerts cannot be written to %s, so that nobody sends them: %s", self._folder, error.strerror)
        self._failing = True


class _Held:
    """The outbox for one thread of one process at a time."""

    def __init__(self, lock: threading.Lock, folder: Path) -> None:
        self._lock, self._folder = lock, folder
        self._descriptor = -1

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            found = os.fstat(self._descriptor)
            # Nobody else writes here, not even root: a file of root's could not be read by who sends it.
            if found.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "only its owner raises alerts")
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(errno.EPERM, "others can write it; chmod go-w")
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._lock.release()


def read(folder: Path) -> Outbox:
    """Return what lies in an outbox, the worst and then the oldest first; what is not checked is not believed.

    Raises:
        OSError: It cannot be read.
    """
    alerts, unreadable = [], []
    for name in _names(folder)[: 2 * LIMIT]:
        try:
            alert = _read(folder / name)
        except OSError:
            alert = None
        if alert is not None and f"{alert.name}.json" == name:
            alerts.append(alert)
        elif (folder / name).is_symlink() or (folder / name).exists():
            unreadable.append(name.removesuffix(".json"))
    return Outbox(sorted(alerts, key=lambda a: (SEVERITIES.index(a.severity), a.since, a.kind, a.what)), unreadable)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if _FILE_NAME.fullmatch(name))
    except FileNotFoundError:
        # Nothing was raised yet.
        return []


def _read(path: Path) -> Alert | None:
    """Return the alert in a file, None where there is none that can be understood.

    Raises:
        OSError: It is there and cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        content = file.read(_FILE_LIMIT)
    try:
        alert = encoding.decode(content, Alert)
        alert.check()
    except (msgspec.MsgspecError, ValueError, UnicodeDecodeError):
        return None
    return alert
