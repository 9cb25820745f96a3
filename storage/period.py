"""Days and periods of days: ISO 8601 periods, DICOM dates, days of reception. No clock here, and no time zone.

A day is counted forward in the calendar, never by an average length of a month or year. What lies beyond the year 9999
is None: never.
"""

from __future__ import annotations

import calendar
import re
from datetime import date

import msgspec

_PERIOD = re.compile(r"P(?:(\d{1,4})Y)?(?:(\d{1,4})M)?(?:(\d{1,4})W)?(?:(\d{1,6})D)?", re.ASCII)
# With dots it is the form of ACR-NEMA 2.0, which PS3.5 (VR DA) still names: old archives hold it.
_DA = re.compile(r"(\d{4})(\.?)(\d{2})\2(\d{2})", re.ASCII)
_TIME = re.compile(r"(\d{4}-\d{2}-\d{2})T\d{2}:\d{2}:\d{2}(?:\.\d+)?Z", re.ASCII)


class PeriodError(ValueError):
    """A text is no period of days."""


class Period(msgspec.Struct, frozen=True):
    """Years, months, weeks and days, as ISO 8601 writes them (``P1Y6M``); none is turned into another."""

    years: int = 0
    months: int = 0
    weeks: int = 0
    days: int = 0

    def __str__(self) -> str:
        """Return the period as ISO 8601 writes it."""
        parts = zip((self.years, self.months, self.weeks, self.days), "YMWD", strict=True)
        return "P" + ("".join(f"{number}{unit}" for number, unit in parts if number) or "0D")

    def __bool__(self) -> bool:
        """Tell whether it is longer than nothing."""
        return self != Period()


def parse(text: str) -> Period:
    """Return the period that an ISO 8601 text names, of whole days: ``P10Y``, ``P1Y6M``, ``P90D``, ``P2W``.

    Raises:
        PeriodError: It is none, has a time of day or a fraction, or more than 4 digits (days: 6).
    """
    found = _PERIOD.fullmatch(text)
    if found is None or text == "P":
        raise PeriodError(f"'{text}' is no period of days, as in P10Y, P18M, P2W or P90D")
    return Period(*(int(number or 0) for number in found.groups()))


def add(day: date, period: Period) -> date | None:
    """Return the day that a period leads to, None beyond the year 9999.

    Years and months come first, then weeks and days. Where the month has no such day it is the month's last: a month
    from 31 January is 28 or 29 February. The anniversary of a 29 February is 1 March where there is none: of the two
    days that law and custom know, the later, so that nothing is kept shorter and nobody is of age earlier. A later day
    never leads to an earlier one.
    """
    months = day.year * 12 + day.month - 1 + period.years * 12 + period.months
    year, month = months // 12, months % 12 + 1
    if year > date.max.year:
        return None
    last = calendar.monthrange(year, month)[1]
    ordinal = date(year, month, min(day.day, last)).toordinal() + period.weeks * 7 + period.days
    if (day.month, day.day, month, last) == (2, 29, 2, 28):
        ordinal += 1
    return date.fromordinal(ordinal) if ordinal <= date.max.toordinal() else None


def following(day: date | None) -> date | None:
    """Return the day after, None beyond the year 9999."""
    return None if day is None else add(day, Period(days=1))


def parse_da(text: str) -> date | None:
    """Return the day of a DICOM date (VR DA), None for one that is missing, malformed or a range."""
    found = _DA.fullmatch(text.strip(" \0"))
    try:
        return date(int(found[1]), int(found[3]), int(found[4])) if found else None
    except ValueError:
        return None


def parse_reception(text: str) -> date | None:
    """Return the day, in UTC, of a time of reception (RFC 3339, UTC with ``Z``), None if it is no such time."""
    found = _TIME.fullmatch(text)
    try:
        return date.fromisoformat(found[1]) if found else None
    except ValueError:
        return None
