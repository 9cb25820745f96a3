"""Nine weeks, of which the last is reviewed and the eight before are what it is held against; counts by week."""

from __future__ import annotations

from bisect import bisect_right
from datetime import UTC, date, datetime, time, timedelta, tzinfo

import msgspec

WEEKS = 9
NOW = WEEKS - 1


class Weeks(msgspec.Struct, frozen=True):
    """Nine weeks from Monday to Monday, and the days of the last one; in UTC, the ends among them."""

    edges: tuple[datetime, ...]
    days: tuple[datetime, ...]
    monday: date

    def of(self, when: datetime) -> int:
        """Return which week a time is in, 0 to 8; below that it is before them, above behind."""
        return bisect_right(self.edges, when) - 1


def weeks_of(day: date, zone: tzinfo) -> Weeks:
    """Return the week that a day is in, with the eight before it."""
    monday = day - timedelta(days=day.weekday())

    def begin(days: int) -> datetime:
        return datetime.combine(monday + timedelta(days=days), time(), tzinfo=zone).astimezone(UTC)

    edges = tuple(begin(7 * week) for week in range(1 - WEEKS, 2))
    return Weeks(edges, tuple(begin(number) for number in range(8)), monday)


class Series(msgspec.Struct):
    """Counts of the nine weeks, and the first record of the last one."""

    weeks: list[int] = msgspec.field(default_factory=lambda: [0] * WEEKS)
    record: int = 0
    # In which week it was first seen, below 0 before all of them.
    since: int = WEEKS

    def add(self, week: int, count: int, record: int) -> None:
        """Count something."""
        self.since = min(self.since, week)
        if week >= 0:
            self.weeks[week] += count
        if week == NOW and not self.record:
            self.record = record

    @property
    def now(self) -> int:
        """The count of the week that is reviewed."""
        return self.weeks[NOW]

    @property
    def past(self) -> list[int]:
        """The counts of the weeks before, the oldest first."""
        return self.weeks[:NOW]


class PeerCount(msgspec.Struct):
    """What a peer stored, and what it was given through the desk, in instances."""

    instances: Series = msgspec.field(default_factory=Series)
    bytes: Series = msgspec.field(default_factory=Series)
    associations: Series = msgspec.field(default_factory=Series)
    refused: Series = msgspec.field(default_factory=Series)
    fetched: Series = msgspec.field(default_factory=Series)


class UserCount(msgspec.Struct):
    """What a user did: acts by their type, those outside of working hours, and the studies taken out and erased."""

    acts: dict[str, Series] = msgspec.field(default_factory=dict)
    outside: dict[str, Series] = msgspec.field(default_factory=dict)
    exports: Series = msgspec.field(default_factory=Series)
    exported: Series = msgspec.field(default_factory=Series)
    erasures: Series = msgspec.field(default_factory=Series)
    erased: Series = msgspec.field(default_factory=Series)


class Noted(msgspec.Struct):
    """Something of the week that is told by its type: how often, by whom, and its first record."""

    count: int = 0
    record: int = 0
    uids: set[int] = msgspec.field(default_factory=set)


class Seen(msgspec.Struct, frozen=True):
    """A name that was never seen before the week."""

    what: str
    name: str
    peer: str
    record: int
