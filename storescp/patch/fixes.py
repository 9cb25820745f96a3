"""From advisories to fixes: what a feed has against a version, and the oldest fix of each severity. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from storescp.patch import osv, versions
from storescp.patch.items import Fix
from storescp.patch.settings import CLASSES


class Hit(NamedTuple):
    """A vulnerability that concerns what is installed; ``affected`` None where that could not be told."""

    record: osv.Record
    affected: bool | None
    severity: str
    fixed: str


def hits(feed: osv.Feed, ecosystem: str, name: str, version: str, order: versions.Order) -> list[Hit]:
    """Return what a feed has against a version of a package."""
    found = []
    for record, affected in feed.packages.get(osv.key_of(ecosystem, name), ()):
        verdict = osv.judge(affected, version, order)
        if verdict.affected is not False:
            found.append(Hit(record, verdict.affected, osv.severity(record, affected), verdict.fixed))
    return _agreed(found)


def tag_hits(entries: Iterable[osv.Entry], tags: Sequence[str]) -> list[Hit]:
    """Return what a feed has against a release that has these tags."""
    found = []
    for record, affected in entries:
        verdict = osv.judge_tags(affected, tags)
        if verdict.affected is not False:
            found.append(Hit(record, verdict.affected, osv.severity(record, affected), ""))
    return _agreed(found)


def undecided(found: Iterable[Hit]) -> list[str]:
    """Return the ids of the advisories that may or may not concern what is installed."""
    return sorted({hit.record.id for hit in found if hit.affected is None})


def of_hit(hit: Hit, candidate: str, dated: datetime | None, source: str) -> Fix:
    """Return the fix of a vulnerability: dated by itself, else by its advisory."""
    published = osv.utc(hit.record.published) if hit.record.published is not None else None
    confidence = "high" if dated else "medium" if published else "none"
    by = f"{source}; date: {'package index' if dated else 'advisory'}" if dated or published else source
    return Fix(hit.severity, dated or published, confidence, candidate, tuple(hit.record.names()), by)


def oldest(fixes: Iterable[Fix], order: versions.Order) -> list[Fix]:
    """Return a fix a severity: the oldest, with the ids of all, and the version that has them all."""
    by_severity: dict[str, list[Fix]] = defaultdict(list)
    for fix in fixes:
        by_severity[fix.severity].append(fix)
    found = []
    for severity in sorted(by_severity, key=CLASSES.index):
        group = by_severity[severity]
        dated = [f for f in group if f.since is not None]
        first = min(dated, key=lambda f: f.since or datetime.max) if dated else group[0]
        ids = {name for fix in group for name in fix.ids}
        found.append(first._replace(ids=tuple(ids), candidate=_highest((f.candidate for f in group), order)))
        # Without a date a fix may be older than the oldest that has one.
        found += [f._replace(ids=tuple(f.ids)) for f in group if f.since is None and dated]
    return found


def _highest(candidates: Iterable[str], order: versions.Order) -> str:
    given = list(candidates)
    try:
        return max(given, key=order)
    except versions.VersionError:
        return given[0]


def _agreed(found: Sequence[Hit]) -> list[Hit]:
    """Give the records of one vulnerability one severity: the worst that one of them knows."""
    known: dict[str, list[str]] = defaultdict(list)
    for hit in found:
        for name in hit.record.names():
            known[name].append(hit.severity)
    return [
        hit._replace(severity=osv.worst(severity for name in hit.record.names() for severity in known[name]))
        for hit in found
    ]
