"""The report: inventory, evidence, settings and the date in; items with age, limits, source and confidence out. Pure.

What is not known is ``unknown``, never ``ok``. The reasons for each rule are in docs/patch-age.md.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from storescp.patch import judge, judge_debian
from storescp.patch.inventory import Inventory
from storescp.patch.items import FINDINGS, STATES, Bench, Evidence, Item


class Source(msgspec.Struct, kw_only=True):
    """A source, its own date, and why it proves nothing, if so."""

    name: str
    date: datetime | None = None
    problem: str = ""


class Report(msgspec.Struct, kw_only=True):
    """The whole report; ``seen`` is what the next one wants to know."""

    format: int = 1
    made: datetime
    python: str
    sources: list[Source]
    items: list[Item]
    seen: dict[str, datetime]

    @property
    def findings(self) -> list[Item]:
        """Return what makes the exit status 6."""
        return [item for item in self.items if item.state in FINDINGS]


def assemble(inventory: Inventory, evidence: Evidence, bench: Bench) -> Report:
    """Return the report, the worst first."""
    evidence, sources = fresh(inventory, evidence, bench)
    items = judge.python(inventory, evidence, bench)
    of_debian = judge_debian.packages(inventory, evidence, bench)
    items += judge.components(inventory, evidence, bench, of_debian)
    items += of_debian
    items += judge.kernel(inventory, bench)
    items += judge.libraries(inventory, bench)
    items.sort(key=lambda i: (STATES.index(i.state), -(i.age_days or 0), i.kind, i.name))
    return Report(made=bench.now, python=inventory.python, sources=sources, items=items, seen=bench.seen)


def fresh(inventory: Inventory, evidence: Evidence, bench: Bench) -> tuple[Evidence, list[Source]]:
    """Put a reason in the place of evidence that is too old, and list the sources."""
    sources, feeds, answers = [], {}, {}
    for name, feed in evidence.feeds.items():
        problem = feed if isinstance(feed, str) else bench.stale(feed.date)
        if problem and not isinstance(feed, str):
            problem = f"the OSV export of {name} {problem}"
        feeds[name] = problem or feed
        date = None if isinstance(feed, str) else feed.date
        sources.append(Source(name=f"OSV export of {name}", date=date, problem=problem))
    for name, answer in evidence.answers.items():
        problem = answer if isinstance(answer, str) else bench.stale(answer[1])
        if problem and not isinstance(answer, str):
            problem = f"the package index's answer {problem}"
        answers[name] = problem or answer
    dates = [a[1] for a in answers.values() if not isinstance(a, str)]
    missing = len(inventory.distributions) - len(dates)
    problem = f"no usable answer about {missing} of {len(inventory.distributions)} packages" if missing else ""
    sources.append(Source(name="package index", date=min(dates, default=None), problem=problem))
    system = inventory.debian
    problem = system.problem or system.upgrades_problem
    if not problem and system.date is not None and (old := bench.stale(system.date)):
        problem = f"apt's list of the security suite {old}"
    sources.append(Source(name="apt's package lists", date=system.date, problem=problem))
    return Evidence(feeds, answers, evidence.changelogs), sources
