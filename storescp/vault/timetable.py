"""The timetable: each job's expression and record, when it is due, and which one goes next. It runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from storescp import clock
from storescp.cron import Cron, opens, window_of, zone_of
from storescp.schedulesettings import ScheduleSettings
from storescp.vault import due
from storescp.vault.due import Due, JobState, Run
from storescp.vault.jobs import Job


class Timetable:
    """The jobs of a schedule in their times.

    ``states`` are what is known of jobs, by name; a record is replaced, never changed, so that any thread may look.
    """

    def __init__(self, settings: ScheduleSettings, jobs: Mapping[str, Job], began: datetime) -> None:
        """Read the settings, which were checked.

        Args:
            settings: With an expression for each job.
            jobs: By name.
            began: From when on jobs count of which nothing is known.
        """
        self._jobs = jobs
        self._began = began
        self._zone_name, self._zone = settings.timezone, zone_of(settings.timezone)
        self._window_texts = list(settings.windows)
        self._windows = [window_of(text) for text in settings.windows]
        self._expressions: dict[str, str] = {name: getattr(settings, name) for name in jobs}
        self._crons = {name: Cron(text, self._zone) for name, text in self._expressions.items() if text}
        self._next: dict[str, datetime] = {}
        self.states: dict[str, JobState] = {}

    def agreed(self, name: str, state: JobState | None, now: datetime) -> JobState:
        """Return a job's record as it is from now on."""
        return due.agreed(state, name, self._expressions[name], self._zone_name, now)

    def keep(self, state: JobState) -> None:
        """Take a job's record, and compute when it is due."""
        self.states[state.job] = state
        cron = self._crons.get(state.job)
        following = cron.after(state.base) if cron else None
        if following is None:
            self._next.pop(state.job, None)
        else:
            self._next[state.job] = following

    def choose(self, now: datetime) -> str:
        """Return the job that waits for longest and may begin; empty where there is none."""
        found = sorted((at, name) for name, at in list(self._next.items()) if at <= now)
        local = now.astimezone(self._zone)
        may = not self._windows or any(window.holds(local) for window in self._windows)
        return next((name for _, name in found if may or not self._jobs[name].heavy), "")

    def begun(self, run: Run, now: datetime) -> tuple[JobState, Run]:
        """Return a job's record while a run of it is at work, and that run with what it was due for."""
        state = self.states[run.job]
        if found := self._due(run.job, now):
            run = msgspec.structs.replace(run, due=clock.text(found.at), missed=found.missed)
        return due.begun(state, run, now), run

    def _due(self, name: str, now: datetime) -> Due | None:
        cron = self._crons.get(name)
        return due.due(cron, self.states[name].base, now) if cron else None

    def overdue(self, name: str, base: datetime, now: datetime) -> bool:
        """Tell whether a job that counts from ``base`` should have begun long ago."""
        cron = self._crons.get(name)
        windows = self._windows if self._jobs[name].heavy else []
        return cron is not None and due.overdue(cron, windows, self._zone, base, now)

    def view(self, states: Mapping[str, JobState], now: datetime, at_work: str, *, locked: bool) -> dict[str, Any]:
        """Return what is known of the jobs, as others are told.

        Args:
            states: What is known of them.
            now: What time it is.
            at_work: The job that is being done.
            locked: Nothing can begin.
        """
        return {
            "format": 1,
            "time": clock.text(now),
            "timezone": self._zone_name,
            "windows": self._window_texts,
            "locked": locked,
            "at_work": at_work,
            "items": [self._item(name, states.get(name), now, at_work, locked=locked) for name in self._jobs],
        }

    def _item(self, name: str, state: JobState | None, now: datetime, at_work: str, *, locked: bool) -> dict[str, Any]:
        job, cron = self._jobs[name], self._crons.get(name)
        base = state.base if state else self._began
        following = cron.after(base) if cron else None
        waits = ""
        if following is not None and following <= now and name != at_work:
            opening = opens(self._windows, self._zone, now) if job.heavy else now
            if locked:
                waits = "'strongroom unlock'"
            elif opening > now:
                waits = f"a maintenance window, at {clock.text(opening)}"
            elif at_work:
                waits = f"job {at_work}"
        last = state.last if state else None
        return {
            "job": name,
            "explained": job.explained,
            "heavy": job.heavy,
            "expression": self._expressions[name],
            "next": clock.text(following) if following else "",
            "waits_for": waits,
            "overdue": name != at_work and self.overdue(name, base, now),
            "running": name == at_work,
            "last": msgspec.to_builtins(last) if last else None,
        }
