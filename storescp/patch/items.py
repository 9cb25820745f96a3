"""What a report is made of: evidence, an item, a fix, and the bench that puts a fix's age against its limits. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import msgspec

from storescp.patch import debian, index, osv
from storescp.patch.folder import Window
from storescp.patch.settings import CLASSES, Limit, PatchAge, duration

STATES = ("unknown", "breach", "planned", "due", "ok")
# First sightings that are kept, and how wrong a clock may be.
_REMEMBERED = 20_000
_SLACK = timedelta(days=1)
FINDINGS = frozenset({"unknown", "breach"})


class Evidence(NamedTuple):
    """What the sources say; a text where one says nothing, with the reason.

    Attributes:
        feeds: OSV's exports by ecosystem.
        answers: What the index says about each package, and when it was asked.
        changelogs: Entries by source package and candidate.
    """

    feeds: Mapping[str, osv.Feed | str]
    answers: Mapping[str, tuple[index.Project, datetime] | str]
    changelogs: Mapping[tuple[str, str], Sequence[debian.Entry] | str]


class Item(msgspec.Struct, kw_only=True):
    """One thing that runs here, and its oldest unapplied fix of one severity.

    Attributes:
        kind: ``python``, ``cpython``, ``openssl``, ``sqlcipher``, ``debian``, ``kernel`` or ``library``.
        since: When the fix was published; None where there is no fix, or nobody can tell.
        source: Who says so, and as of when.
        confidence: ``high`` the fix's own date, ``medium`` the advisory's, ``low`` a bound, ``none``.
        state: ``ok``, ``due`` (past its target), ``breach`` (past its limit), ``planned`` (a breach inside an announced
            window), ``unknown``.
    """

    kind: str
    name: str
    installed: str
    candidate: str = ""
    severity: str = ""
    ids: list[str] = []
    since: datetime | None = None
    age_days: float | None = None
    target: str = ""
    limit: str = ""
    source: str = ""
    confidence: str = "none"
    state: str = "unknown"
    reason: str = ""

    @property
    def open(self) -> bool:
        """Whether there is anything to do or to find out."""
        return self.state != "ok" or bool(self.candidate)


class Fix(NamedTuple):
    """Something that could be applied: how bad, since when, who says so."""

    severity: str
    since: datetime | None
    confidence: str
    candidate: str = ""
    ids: tuple[str, ...] = ()
    source: str = ""


class Bench:
    """What every judgement needs: the date, the limits, the windows, what was seen before."""

    def __init__(
        self,
        settings: PatchAge,
        now: datetime,
        seen: Mapping[str, datetime],
        windows: Sequence[Window] = (),
        *,
        remembers: bool = True,
    ) -> None:
        self.settings = settings
        self.now = now
        # What is not asked about today, because a source is missing, must not begin to count anew tomorrow.
        newest = sorted(seen.items(), key=lambda entry: entry[1], reverse=True)
        self.seen = dict(newest[:_REMEMBERED])
        self._windows = windows
        self._remembers = remembers
        self._feed_limit = duration(settings.feed_limit)

    def stale(self, date: datetime) -> str:
        """Return why evidence of this date proves nothing; nothing where it does."""
        if self.now - date > self._feed_limit:
            return f"is of {day(date)}, older than {self.settings.feed_limit}"
        if date - self.now > _SLACK:
            return f"is of {day(date)}, which is still to come: a clock is wrong"
        return ""

    def item(self, kind: str, name: str, installed: str, fix: Fix, reason: str = "") -> Item:
        """Return the item of a fix: its age against the limits of its severity."""
        limits: Limit = getattr(self.settings, fix.severity if fix.severity in CLASSES else "unknown")
        # A date to come would make an item young for ever.
        since = fix.since if fix.since is not None and fix.since <= self.now + _SLACK else None
        dated, confidence = since is not None, fix.confidence
        item = Item(kind=kind, name=name, installed=installed, candidate=fix.candidate, severity=fix.severity)
        item.ids, item.source = sorted(fix.ids), fix.source
        item.target, item.limit = limits.target, limits.limit
        if since is None:
            # Without the candidate: the next release must not make the wait for this one shorter.
            since = self._first_seen(" ".join((kind, name, installed, fix.severity)))
            confidence = "low"
            item.source = ", ".join(part for part in (fix.source, "first seen") if part)
            if since is None:
                item.reason = "no source dates this fix, and when it was first seen cannot be written down"
                return item
        item.since, item.confidence, item.reason = since, confidence, reason
        if not dated:
            item.reason = "; ".join(part for part in (reason, "it is older than this: no source dates it") if part)
        age = max(self.now - since, timedelta(0))
        item.age_days = round(age / timedelta(days=1), 1)
        item.state = self._state(age, limits)
        if not dated and item.state == "ok":
            # Counted from when it was first seen, it is younger than it is.
            item.state = "due"
        return item

    def _state(self, age: timedelta, limits: Limit) -> str:
        if age > duration(limits.limit):
            held = age <= duration(limits.limit) + duration(self.settings.window_limit)
            inside = any(w.begin <= self.now < w.end for w in self._windows)
            return "planned" if held and inside else "breach"
        return "due" if age > duration(limits.target) else "ok"

    def _first_seen(self, key: str) -> datetime | None:
        known = self.seen.get(key)
        if known is None or known > self.now:
            known = self.now if self._remembers else None
        if known is not None:
            self.seen[key] = known
        return known


def day(date: datetime | None) -> str:
    """Return a date for people."""
    return date.strftime("%Y-%m-%d") if date is not None else "?"


def ok(kind: str, name: str, installed: str, source: str, reason: str, *, confidence: str = "high") -> Item:
    """Return the item of something that has nothing unapplied."""
    return Item(
        kind=kind, name=name, installed=installed, source=source, confidence=confidence, state="ok", reason=reason
    )


def unknown(kind: str, name: str, installed: str, reason: str, ids: Sequence[str] = (), source: str = "") -> Item:
    """Return the item of something that cannot be told."""
    return Item(kind=kind, name=name, installed=installed, reason=reason, ids=sorted(ids), source=source)


def unfixed(kind: str, name: str, installed: str, severity: str, ids: Sequence[str], source: str, reason: str) -> Item:
    """Return the item of what is known and cannot be applied yet: it has no age, and is not well."""
    item = unknown(kind, name, installed, reason, ids, source)
    item.state, item.severity = "due", severity
    return item
