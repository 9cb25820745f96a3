"""The schedule: what is due is done, one job after the other, in a thread beside admission.

What is due is computed from the ledger's record of each job (``due.py``); nothing else remembers it. While the vault is
locked nothing runs; once it is unlocked, what was missed runs once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import msgspec

from storage.ledger import Ledger
from storage.sqlite import DatabaseError
from storescp.clock import text as written
from storescp.errors import LOCKED, NOTHING, USAGE, StrongroomError
from storescp.vault import due
from storescp.vault.due import JobState, Run
from storescp.vault.jobs import Event, Job
from storescp.vault.opened import Open
from storescp.vault.state import Vault
from storescp.vault.timetable import Timetable

BY_SCHEDULE = "schedule"
_HISTORY = 1000
_TEXT = 300
_AGAIN_SECONDS = 60.0
# A job may be in the middle of a step when the vault stops; what is left is what a crash leaves, and made good later.
_STOP_SECONDS = 10.0

log = logging.getLogger(__name__)


class _StoppedError(Exception):
    """The vault stops: what is being done is broken off between two events."""


class _Seen:
    """What a job said on its way."""

    def __init__(self) -> None:
        self._said = self._finding = ""
        self._findings = 0

    def take(self, event: Event) -> None:
        if event["kind"] == "finding":
            self._findings += 1
            self._finding = self._finding or str(event["text"])
        elif event["kind"] in {"step", "pending"}:
            self._said = str(event["text"])

    def result(self) -> tuple[str, str]:
        if not self._findings:
            return "ok", self._said
        more = f", and {self._findings - 1} more" if self._findings > 1 else ""
        return "findings", f"{self._finding}{more}"


class Schedule:
    """The schedule of a vault. ``tick`` belongs to the admitting thread; the rest may be used by any."""

    def __init__(
        self,
        vault: Vault,
        jobs: dict[str, Job],
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the settings, which were checked.

        Args:
            vault: What jobs work on.
            jobs: By name; each has a field in ``[schedule]``.
            clock: Says what time it is.
            monotonic: Says how many seconds went by.
        """
        self._vault = vault
        self._jobs = jobs
        self._clock = clock
        self._monotonic = monotonic
        self._latest = clock()
        self._table = Timetable(vault.config.settings.schedule, jobs, self._latest)
        # Whose ledger was read last, and whether it has to be read again.
        self._known: Open | None = None
        self._stale = False
        self._unsaved: list[tuple[JobState, Run]] = []
        self._busy = threading.Lock()
        self._at_work = ""
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        # Whoever asks before the first look gets an answer, too: a vault that has just begun does not stand still.
        self._ticked, self._tick_time = monotonic(), written(self._latest)
        self._quiet_until = 0.0

    # --- the admitting thread

    def tick(self) -> None:
        """Begin what is due, if nothing is at work; cheap where there is nothing to begin."""
        now = self._clock()
        self._ticked, self._tick_time = self._monotonic(), written(now)
        if self._vault.opened is None or self._stopping.is_set() or self._ticked < self._quiet_until:
            return
        try:
            self._turn(now)
        except Exception:
            # Whatever it is, the vault goes on to admit.
            log.exception("the schedule cannot go on, and tries again in a minute")
            self._quiet_until = self._ticked + _AGAIN_SECONDS

    def close(self) -> None:
        """Begin nothing more, and let go of what is at work; it is begun again when a vault runs."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def _turn(self, now: datetime) -> None:
        self._agree(now)
        name = "" if self._at_work else self._table.choose(now)
        if not name or not self._busy.acquire(blocking=False):
            return
        try:
            run = self._begin(name, BY_SCHEDULE, now)
            # It has the priority of the admitting thread, which is below that of whoever asks something.
            self._thread = threading.Thread(target=self._work, args=(run,), daemon=True, name="schedule")
            self._thread.start()
        except BaseException:
            self._at_work = ""
            self._busy.release()
            raise

    def _agree(self, now: datetime) -> None:
        """Read what the ledger knows where that may be another than before, and put right what does not fit."""
        self._stale |= now < self._latest or bool(self._unsaved)
        self._latest = now
        if self._vault.opened is self._known and not self._stale:
            return
        with self._vault.admitting() as open_:
            if open_ is None:
                return
            self._save(open_.ledger)
            records = open_.ledger.records("job", JobState)
            for name in self._jobs:
                before = records.get(name)
                state = self._table.agreed(name, before, now)
                if state.running is not None and name != self._at_work:
                    state = self._left(open_.ledger, state, state.running, now)
                if state != before:
                    records.put(name, state)
                self._table.keep(state)
            self._known, self._stale = open_, False

    def _left(self, ledger: Ledger, state: JobState, run: Run, now: datetime) -> JobState:
        """Put a job that was broken off into the history."""
        text = "broken off: the vault was stopped or locked, or ended"
        run = msgspec.structs.replace(run, ended=written(now), result="failed", text=text)
        self._tell(run)
        ledger.records("run", Run).put(run.id, run)
        return due.interrupted(state, run)

    # --- a job, from its beginning to its end

    def _begin(self, name: str, by: str, now: datetime) -> Run:
        """Keep that a job begins, before it does."""
        with self._vault.admitting() as open_:
            if open_ is None:
                raise StrongroomError("the vault is locked", status=LOCKED)
            base = self._table.states[name].base
            state, run = self._table.begun(Run(secrets.token_hex(8), name, by, written(now)), now)
            open_.ledger.records("job", JobState).put(name, state)
            self._table.keep(state)
            self._at_work = name
        if run.missed or self._table.overdue(name, base, now):
            log.warning("job %s was due at %s; with %d later times, it is done once, now", name, run.due, run.missed)
        return run

    def _work(self, run: Run) -> None:
        with contextlib.suppress(StrongroomError, _StoppedError):
            for _ in self._doing(run, os.geteuid()):
                pass

    def _doing(self, run: Run, uid: int) -> Generator[Event, None, None]:
        """Do a job that was begun, and keep how it ended, however it did."""
        began, seen = self._monotonic(), _Seen()
        result, text = "failed", "whoever asked for it went away"
        try:
            with contextlib.closing(_events(self._jobs[run.job], uid)) as events:
                for event in events:
                    seen.take(event)
                    yield event
                    if self._stopping.is_set():
                        raise _StoppedError
            result, text = seen.result()
        except _StoppedError:
            result = ""
            raise
        except StrongroomError as error:
            result, text = _refusal(error), str(error)
            raise
        except Exception as error:
            # What it says may be of a patient.
            text = f"an error of the vault's own ({type(error).__name__}); its log says where"
            log.exception("job %s failed", run.job)
            raise StrongroomError(f"job {run.job}: {text}") from error
        finally:
            seconds = round(self._monotonic() - began, 3)
            line = " ".join(text.split())[:_TEXT]
            try:
                self._end(
                    msgspec.structs.replace(
                        run, ended=written(self._clock()), seconds=seconds, result=result, text=line
                    )
                )
            finally:
                self._busy.release()
        yield {"kind": "ended", "job": run.job, "result": result, "text": line, "seconds": seconds}

    def _end(self, run: Run) -> None:
        if not run.result:
            # As it stands in the ledger, it is begun again when that is read the next time.
            with self._vault.admitting():
                self._at_work, self._stale = "", True
            log.info("job %s is broken off", run.job)
            return
        with self._vault.admitting() as open_:
            state = due.ended(self._table.states[run.job], run)
            self._table.keep(state)
            self._at_work = ""
            self._unsaved.append((state, run))
            if open_ is not None:
                try:
                    self._save(open_.ledger)
                except (DatabaseError, OSError) as error:
                    log.error("how job %s ended is not kept yet: %s", run.job, error)
        self._tell(run)

    def _tell(self, run: Run) -> None:
        self._vault.auditor.tell(
            "job-ended",
            uid=None if run.by == BY_SCHEDULE else int(run.by),
            job=run.job,
            result=run.result,
            due=run.due,
            began=run.began,
            missed=run.missed,
        )
        level = logging.INFO if run.result == "ok" else logging.WARNING
        log.log(level, "job %s: %s%s", run.job, run.result, f": {run.text}" if run.text else "")

    def _save(self, ledger: Ledger) -> None:
        """Put what ended into the ledger, and what is too old out of it."""
        states, runs = ledger.records("job", JobState), ledger.records("run", Run)
        while self._unsaved:
            state, run = self._unsaved[0]
            runs.put(run.id, run)
            states.put(run.job, state)
            del self._unsaved[0]
        if (many := runs.count() - _HISTORY) > 0:
            runs.remove(*[run.id for run in islice(runs.all(), many)])

    # --- for those who ask

    def run(self, name: str, uid: int) -> Iterator[Event]:
        """Do a job now; yield its events, and how it ended.

        Raises:
            StrongroomError: There is no such job, another one is at work, or it failed.
        """
        if name not in self._jobs:
            raise StrongroomError(f"there is no job {name}", hint="'strongroom jobs list' lists them", status=NOTHING)
        self._vault.unlocked()
        if not self._busy.acquire(blocking=False):
            raise StrongroomError(
                f"job {self._at_work or name} is at work", hint="jobs go one after the other: wait until it ends"
            )
        try:
            now = self._clock()
            self._agree(now)
            run = self._begin(name, str(uid), now)
        except BaseException as error:
            self._busy.release()
            if isinstance(error, DatabaseError | OSError):
                raise StrongroomError(f"job {name} is not begun: {error}") from error
            raise
        try:
            yield from self._doing(run, uid)
        except _StoppedError:
            raise StrongroomError(f"job {name} is broken off: the vault stops") from None

    def view(self) -> dict[str, Any]:
        """Return what is known of the jobs, locked or not, without waiting for anybody."""
        now, opened = self._clock(), self._vault.opened
        states = self._table.states if self._known is not None or opened is None else _read(opened)
        return self._table.view(states, now, self._at_work, locked=opened is None) | {
            "ticked": self._tick_time,
            "ticked_seconds": round(self._monotonic() - self._ticked, 1),
        }

    def history(self) -> list[Run]:
        """Return the jobs that ended, the newest first.

        Raises:
            StrongroomError: The vault is locked.
        """
        ledger = self._vault.unlocked().own_ledger()
        try:
            return list(ledger.records("run", Run).all())[::-1]
        finally:
            ledger.close()


def _events(job: Job, uid: int) -> Generator[Event, None, None]:
    yield from job.run(uid)


def _refusal(error: StrongroomError) -> str:
    """Return what an error says of a job; empty for one that is begun again when the vault is unlocked."""
    if error.status == LOCKED:
        return ""
    return "refused" if error.status in {NOTHING, USAGE} else "failed"


def _read(opened: Open) -> dict[str, JobState]:
    """Return what the ledger knows, by a connection of its own."""
    ledger = opened.own_ledger()
    try:
        return {state.job: state for state in ledger.records("job", JobState).all()}
    finally:
        ledger.close()
