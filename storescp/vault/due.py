"""What is due, what was missed, what is overdue: decided from a job's record and a time that is given.

A job is due at each time that its expression names, counted from when its expression was first seen or from when it
last began. However many of these times went by, it runs once, and the others are counted as missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, tzinfo

import msgspec

from storescp import clock
from storescp.cron import Cron, Window, opens

# A clock that was set back by less is waited for, so that nothing runs twice; behind one that was set back by more,
# nothing would run for as long as it had been ahead.
_SET_BACK = timedelta(hours=1)
# Nobody counts further what a machine that was off for months missed of a job of every minute.
COUNT_LIMIT = 1000
# A schedule that does one thing after the other is not late at once.
_PATIENCE = timedelta(minutes=30)


class Run(msgspec.Struct):
    """A job that was begun. Times are RFC 3339.

    ``by`` is ``schedule`` or who asked for it, a user id. ``due`` is the first time that it was due for, ``missed`` how
    many later ones went by as well; empty where it was not due. ``result`` is ``ok``, ``findings``, ``failed`` or
    ``refused`` (something that it needs is missing), empty while it is at work. ``text`` is one line, of the store and
    never of a patient.
    """

    id: str
    job: str
    by: str
    began: str
    due: str = ""
    missed: int = 0
    ended: str = ""
    seconds: float = 0.0
    result: str = ""
    text: str = ""


class JobState(msgspec.Struct):
    """What is known of a job, as long as its expression stays.

    ``since`` is when the expression was first seen, ``served`` up to when its due times are done with. ``running`` has
    begun and not ended; ``again`` says that it did so once before and was begun again for that.
    """

    job: str
    expression: str
    zone: str
    since: str
    served: str = ""
    running: Run | None = None
    last: Run | None = None
    again: bool = False

    @property
    def base(self) -> datetime:
        """From when on due times count."""
        return clock.parse(self.served or self.since)


class Due(msgspec.Struct, frozen=True):
    """For when a job is due, and how many later times went by as well."""

    at: datetime
    missed: int


def agreed(state: JobState | None, job: str, expression: str, zone: str, now: datetime) -> JobState:
    """Return a job's record as it is from now on: a new expression, and a clock that was set back, begin anew."""
    if state is None:
        return JobState(job, expression, zone, clock.text(now))
    if (state.expression, state.zone) != (expression, zone):
        return msgspec.structs.replace(state, expression=expression, zone=zone, since=clock.text(now), served="")
    if state.base - now > _SET_BACK:
        return msgspec.structs.replace(state, since=clock.text(now), served="")
    return state


def begun(state: JobState, run: Run, now: datetime) -> JobState:
    """Return a job's record while it is at work: all that was due up to now is done with."""
    return msgspec.structs.replace(state, running=run, served=clock.text(max(now, state.base)))


def ended(state: JobState, run: Run) -> JobState:
    """Return a job's record when it has ended."""
    return msgspec.structs.replace(state, running=None, last=run, again=False)


def interrupted(state: JobState, run: Run) -> JobState:
    """Return the record of a job whose vault ended first: what was due is due again, once."""
    left = msgspec.structs.replace(state, running=None, last=run, again=False)
    if run.due and not state.again:
        before = clock.parse(run.due) - timedelta(seconds=1)
        return msgspec.structs.replace(left, served=clock.text(before), again=True)
    return left


def due(cron: Cron, base: datetime, now: datetime) -> Due | None:
    """Return whether something is due that counts from ``base``."""
    first = cron.after(base)
    if first is None or first > now:
        return None
    missed, following = 0, cron.after(first)
    while following is not None and following <= now and missed < COUNT_LIMIT:
        missed, following = missed + 1, cron.after(following)
    return Due(first, missed)


def overdue(cron: Cron, windows: Sequence[Window], zone: tzinfo, base: datetime, now: datetime) -> bool:
    """Tell whether more than a whole period went by since a job could have begun, and half an hour at least."""
    first = cron.after(base)
    if first is None or first > now:
        return False
    following = cron.after(first)
    period = following - first if following else timedelta.max
    return now - opens(windows, zone, first) > max(period, _PATIENCE)
