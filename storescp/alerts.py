"""Alerts: what is wrong and stays wrong until somebody acts. One file for each that stands, in the outbox.

Whoever notices raises an alert, as often as it is noticed, and resolves it when it is over. The log says it here; the
errand that sends alerts (``errands/alert.py``) reads the outbox and writes elsewhere. What an alert says comes from one
table: text, the command that resolves it, counts, and at most one name of a form that is fixed. No caller can put free
text into it, so none can put a patient or a UID there.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shlex
import stat
import string
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from keys import encoding
from storescp import clock

# Standing at a time; what comes after them is told as one alert, TOO_MANY.
LIMIT = 100
TOO_MANY = "too-many-alerts"
_FILE_LIMIT = 4096
_MODE = 0o640
_FOLDER_MODE = 0o750
_COUNT_LIMIT = 1 << 60
_FILE_NAME = re.compile(r"[a-z-]{1,40}\.[0-9a-f]{16}\.json", re.ASCII)

# What a name in an alert may be. Long numbers, and many with dots between them, are UIDs or a patient's.
NO_NAME = re.compile(r"")
WORD = re.compile(r"[a-z][a-z0-9-]{0,39}", re.ASCII)
PEER = re.compile(r"[ -\[\]-~]{1,16}", re.ASCII)
_UID = re.compile(r"\d+(\.\d+){4,}|\d{12,}", re.ASCII)

log = logging.getLogger(__name__)


class Kind(NamedTuple):
    """What alerts of a kind say. ``{what}`` may stand in text and command, counts in the text; ``name`` is its form."""

    severity: str
    text: str
    command: str
    name: re.Pattern[str] = NO_NAME

    def counts(self) -> frozenset[str]:
        """Return the names of the counts in the text."""
        return frozenset(name for _, name, _, _ in string.Formatter().parse(self.text) if name) - {"what"}


SEVERITIES = ("critical", "warning")
KINDS = {
    "locked": Kind(
        "critical", "the vault is locked: what arrives is kept, nothing is admitted, erased or checked", "unlock"
    ),
    "space-short": Kind(
        "critical",
        "nothing more is received: a disk has less free space than store.reserve_bytes. Free space or add a disk; "
        "the status says which",
        "status",
    ),
    "total-loss": Kind(
        "critical",
        "ONE FAILURE FROM TOTAL LOSS: if keyring or anchors are lost, every study is lost, backups included. "
        "The status says what is missing",
        "status",
    ),
    "audit-fault": Kind("critical", "the audit chain takes no records, so that no admin's act is done", "audit verify"),
    "unreadable": Kind(
        "critical",
        "places in deposits that did not open: {count}. Have what was sent then sent again; "
        "the vault's log names the packs",
        "status",
    ),
    "quarantine": Kind("warning", "in quarantine, not admitted until somebody decides: {count}", "quarantine list"),
    "scrub-damage": Kind("critical", "the scrub found packs that are damaged or missing: {count}", "verify"),
    "job-failed": Kind("warning", "the scheduled job {what} failed", "status", WORD),
    "job-findings": Kind("warning", "the scheduled job {what} found what somebody must look at: {count}", "status", WORD),
    "job-overdue": Kind("warning", "the scheduled job {what} is overdue", "status", WORD),
    "backup-old": Kind("warning", "the newest confirmed backup is {days} days old", "backup list"),
    "patch-breach": Kind("warning", "fixes that are not applied in time: {count}", "patch report"),
    "patch-unknown": Kind("warning", "what nobody can tell to be patched or not: {count}", "patch report"),
    "retention-brake": Kind(
        "critical", "retention stopped by itself: {count} studies were to go, more than it may erase at once", "status"
    ),
    "certificate-server": Kind("critical", "the server's certificate expires in {days} days", "status"),
    "certificate-peer": Kind("warning", "the certificate of {what} expires in {days} days", "peer renew {what}", PEER),
    "crl-old": Kind("critical", "revocation lists that expire soon or have expired: {count}", "status"),
    "test": Kind("warning", "this is a test: nothing is wrong", "alerts list"),
    TOO_MANY: Kind("critical", "more alerts stand than are told apart; the rest is in the log only", "alerts list"),
}


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
        if not kind.name.fullmatch(self.what) or _UID.search(self.what):
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
            # Whoever else writes here ends it as anybody else: a file of root's could not be read by who sends it.
            if os.fstat(self._descriptor).st_uid != os.geteuid():
                raise PermissionError(1, "only its owner raises alerts")
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
    return Outbox(sorted(alerts, key=lambda a: (SEVERITIES.index(a.severity), a.since, a.name)), unreadable)


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
