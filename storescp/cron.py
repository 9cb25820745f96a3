"""When something is due, and when it may begin: cron expressions and maintenance windows in a named time zone.

Nothing here asks what time it is. Times are in UTC; only the rules are in the zone.
Source: crontab(5) for the five fields; APScheduler 3 computes the times.
"""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Iterable
from datetime import UTC, datetime, time, timedelta, tzinfo

import msgspec

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_TICK = timedelta(microseconds=1)
_MIDNIGHT = 24 * 60
# Long enough for a window that a change of the clock skips once.
_LOOK_DAYS = 16


def _lists(value: str) -> re.Pattern[str]:
    """Return the pattern of a field: ``*`` or values and ranges, each perhaps with a step."""
    one = rf"(?:\*(?:/\d{{1,2}})?|(?:{value})(?:-(?:{value})(?:/\d{{1,2}})?)?)"
    return re.compile(rf"{one}(?:,{one})*", re.ASCII)


_FIELDS = {
    "minute": _lists(r"\d{1,2}"),
    "hour": _lists(r"\d{1,2}"),
    "day": _lists(r"\d{1,2}|last"),
    "month": _lists(rf"\d{{1,2}}|{_MONTHS}"),
    # Programs disagree whether 0 is a Sunday or a Monday.
    "weekday": _lists("|".join(_DAYS)),
}
_WINDOW = re.compile(r"(daily|[a-z,-]+) (\d\d):(\d\d)-(\d\d):(\d\d)", re.ASCII)


class CronError(ValueError):
    """An expression, a window or a zone is malformed; the message says how."""


def zone_of(name: str) -> tzinfo:
    """Return a time zone by its IANA name.

    Raises:
        CronError: This machine does not know it.
    """
    if name == "UTC":
        # Also where the machine has no time zones at all.
        return UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise CronError(f"'{name}' is no time zone that this machine knows, as in Europe/Berlin") from error


class Cron:
    """A cron expression in a zone.

    An expression with fixed hours is due once a day, also on the day on which the clock passes an hour twice; where the
    clock skips its time, an hour later. One with ``*`` for hours goes by the time that passes.
    """

    def __init__(self, expression: str, zone: tzinfo) -> None:
        """Read an expression: minute, hour, day, month, weekday; all of them must match.

        Raises:
            CronError: It is none, or its time never comes.
        """
        # Half as long as all the rest that a command imports.
        from apscheduler.triggers.cron import CronTrigger  # type: ignore[import-untyped]

        fields = expression.lower().split()
        if len(fields) != len(_FIELDS):
            raise CronError(f"'{expression}' has not the five fields minute, hour, day, month, weekday")
        for (name, pattern), text in zip(_FIELDS.items(), fields, strict=True):
            if pattern.fullmatch(text) is None:
                names = "; weekdays are mon, tue and so on, no numbers" if name == "weekday" else ""
                raise CronError(f"'{text}' is no {name}{names}")
        try:
            self._trigger = CronTrigger.from_crontab(" ".join(fields), timezone=zone)
        except ValueError as error:
            raise CronError(f"'{expression}': {str(error)[:1].lower()}{str(error)[1:]}") from error
        self._by_the_clock = not fields[1].startswith("*")
        if self.after(datetime(2000, 1, 1, tzinfo=UTC)) is None:
            raise CronError(f"'{expression}' never comes")

    def after(self, when: datetime) -> datetime | None:
        """Return the next due time behind a time, in UTC; None where there is none."""
        start = when
        while True:
            found = self._trigger.get_next_fire_time(None, start + _TICK)
            if found is None:
                return None
            due: datetime = found.astimezone(UTC)
            if not (found.fold and self._by_the_clock):
                return due
            # The clock shows this time again; an hour ago it was done.
            start = due


class Window(msgspec.Struct, frozen=True):
    """A maintenance window: weekdays (0 is Monday) and minutes of the day; it may reach into the next day."""

    days: frozenset[int]
    begins: int
    ends: int

    def holds(self, local: datetime) -> bool:
        """Tell whether a time of the zone is in it."""
        minute, day = local.hour * 60 + local.minute, local.weekday()
        if self.begins < self.ends:
            return day in self.days and self.begins <= minute < self.ends
        return (day in self.days and minute >= self.begins) or ((day - 1) % 7 in self.days and minute < self.ends)


def window_of(text: str) -> Window:
    """Return the window that a text says: ``sat,sun 01:00-06:00``, ``mon-fri 22:00-05:00`` or ``daily 22:00-24:00``.

    Raises:
        CronError: It says none.
    """
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise CronError(f"'{text}' is no window, as in 'sat,sun 01:00-06:00' or 'daily 22:00-05:00'")
    hours, sixtieths = (found[2], found[4]), (found[3], found[5])
    begins, ends = (int(hour) * 60 + int(minute) for hour, minute in zip(hours, sixtieths, strict=True))
    if begins >= _MIDNIGHT or ends > _MIDNIGHT or begins == ends or max(map(int, sixtieths)) > 59:
        raise CronError(f"'{text}': it begins from 00:00 on, and ends at another time, at 24:00 at the latest")
    return Window(frozenset(_days(found[1], text)), begins, ends)


def _days(named: str, text: str) -> Iterable[int]:
    if named == "daily":
        yield from range(7)
        return
    for part in named.split(","):
        first, dash, last = part.partition("-")
        if first not in _DAYS or (dash and last not in _DAYS):
            raise CronError(f"'{text}': '{part}' is no weekday; they are {', '.join(_DAYS)}")
        begin, end = _DAYS.index(first), _DAYS.index(last or first)
        yield from (day % 7 for day in range(begin, (end if end >= begin else end + 7) + 1))


def opens(windows: Iterable[Window], zone: tzinfo, when: datetime) -> datetime:
    """Return the first time, from one on, that is in a window: that one itself where it is, or there are no windows."""
    windows = list(windows)
    local = when.astimezone(zone)
    if not windows or any(window.holds(local) for window in windows):
        return when
    for number in range(_LOOK_DAYS):
        day = local.date() + timedelta(days=number)
        starts = [
            datetime.combine(day, time(window.begins // 60, window.begins % 60), tzinfo=zone).astimezone(UTC)
            for window in windows
            if day.weekday() in window.days
        ]
        found = [s for s in starts if s >= when and any(w.holds(s.astimezone(zone)) for w in windows)]
        if found:
            return min(found)
    raise AssertionError("a window has a weekday, and a week has them all")
