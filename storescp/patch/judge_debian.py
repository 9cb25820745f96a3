"""The judgement about Debian's packages: what apt would do, and what OSV knows besides. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from storescp.patch import debian, osv, system, versions
from storescp.patch.fixes import Hit, hits, of_hit, oldest, undecided
from storescp.patch.inventory import Inventory
from storescp.patch.items import Bench, Evidence, Fix, Item, day, ok, unfixed, unknown
from storescp.patch.judge import FEED_HINT, UNDECIDED

_KEPT = "apt keeps it back though something newer is there: 'apt-get dist-upgrade' says why"
_SIGNED = "advisories name another source for what is signed here: 'apt-get update' would tell"
_NOT_OFFERED = "apt does not offer it: its lists are old, or a source is missing"
# What Debian's urgency says is how fast an upload wants to be in testing: only the loud ones tell a severity.
_LOUD = {"emergency": "critical", "critical": "critical", "high": "high"}

# A source package and the version that is installed.
Pair = tuple[str, str]
_SIGNED_KERNEL = "linux-signed-"


class Offer(NamedTuple):
    """A source package that apt would upgrade."""

    source: str
    installed: str
    candidate: str
    security: bool


def packages(inventory: Inventory, evidence: Evidence, bench: Bench) -> list[Item]:
    """Judge Debian's packages: a source package an item, and one for all that have nothing unapplied."""
    here = inventory.debian
    if not here.release or here.problem:
        reason = here.problem or "this is no Debian: no source here knows its packages"
        return [unknown("debian", "packages", here.release, reason)]
    feed = evidence.feeds.get("Debian", "the OSV export of Debian is not among patch_age.ecosystems")
    old = bench.stale(here.date) if here.date is not None else "has no date"
    problem = here.upgrades_problem or (f"apt's list of the security suite {old}" if old else "")
    if problem and isinstance(feed, str):
        reason = f"{problem}; {feed}; run 'apt-get update', or: {FEED_HINT}"
        return [unknown("debian", "packages", here.release, reason)]
    pairs = sources(here.packages)
    items: list[Item] = []
    offers = [] if problem else offered(inventory.debian)
    known: dict[Pair, list[Hit]] = {}
    by = f"apt's lists of {day(here.date)}"
    if not isinstance(feed, str):
        ecosystem = f"Debian:{here.release}"
        known = {pair: hits(feed, ecosystem, *advised_as(*pair), versions.debian) for pair in pairs}
        by = f"OSV export of {day(feed.date)}" + (f"; {by}" if not problem else "")
        items += _by_feed(known, {offer[:2] for offer in offers}, feed, bench, asked=not problem)
        if problem:
            # Their advisories stand under another source; apt would know.
            items += [unknown("debian", *pair, _SIGNED) for pair in pairs if pair[0].endswith("-signed")]
    for offer in offers:
        items += _upgrade(offer, known.get(offer[:2], ()), evidence, bench, f"apt's lists of {day(here.date)}")
    if not problem and here.upgrades is not None:
        items += [unknown("debian", name, "", _KEPT) for name in here.upgrades.kept]
    rest = len(set(pairs) - {(item.name, item.installed) for item in items})
    return [*items, ok("debian", f"{rest} other source packages", here.release, by, "nothing is unapplied")]


def sources(installed: Iterable[system.Package]) -> list[Pair]:
    """Return the source packages of binary ones; of several kernels the newest: whether it runs is asked elsewhere."""
    found = {(package.source, package.source_version) for package in installed}
    kernels = [pair for pair in found if pair[0].startswith(_SIGNED_KERNEL)]
    older = sorted(kernels, key=lambda pair: versions.debian(pair[1]))[:-1]
    return sorted(found.difference(older))


def advised_as(source: str, version: str) -> Pair:
    """Return the source package that advisories name: a signed kernel 6.1.37+1 is built from linux 6.1.37-1."""
    return ("linux", version.replace("+", "-", 1)) if source.startswith(_SIGNED_KERNEL) else (source, version)


def offered(what: system.Debian) -> list[Offer]:
    """Return what apt would upgrade, a source package an entry."""
    by_name = {package.name: package for package in what.packages}
    found: dict[Pair, Offer] = {}
    for upgrade in what.upgrades.upgrades if what.upgrades else ():
        package = by_name.get(upgrade.package)
        source, installed = (
            (package.source, package.source_version) if package else (upgrade.package, upgrade.installed)
        )
        security = upgrade.security or ((source, installed) in found and found[source, installed].security)
        candidate = debian.source_version(upgrade.candidate)
        found[source, installed] = Offer(source, installed, candidate, security)
    return [found[pair] for pair in sorted(found)]


def _upgrade(offer: Offer, against: Sequence[Hit], evidence: Evidence, bench: Bench, by: str) -> list[Item]:
    severities = {name: hit.severity for hit in against for name in hit.record.names()}
    entries = evidence.changelogs.get((offer.source, offer.candidate), ())
    reason = "rebuilt from the same source" if offer.candidate == offer.installed else ""
    candidate = "a rebuild" if reason else offer.candidate
    fixes: list[Fix] = []
    if isinstance(entries, str):
        reason = entries
    else:
        later = debian.above(entries, offer.installed)
        # Some binaries have versions of their own; the changelog has the source's.
        candidate = later[0].version if later else candidate
        for entry in later:
            severity = _severity(entry, severities, offer.security)
            source = f"{by}; date: changelog" if entry.date else by
            confidence = "high" if entry.date else "none"
            fixes.append(Fix(severity, entry.date, confidence, candidate, tuple(entry.cves), source))
    if not fixes:
        fixes = [of_hit(hit, candidate, None, by) for hit in against if hit.affected and hit.fixed]
    if not fixes:
        fixes = [Fix("unknown" if offer.security else "update", None, "none", candidate, source=by)]
    groups = oldest(fixes, versions.debian)
    if any(fix.severity != "update" for fix in groups):
        # The plain update comes with the fix.
        groups = [fix for fix in groups if fix.severity != "update"]
    return [bench.item("debian", offer.source, offer.installed, fix, reason) for fix in groups]


def _severity(entry: debian.Entry, severities: Mapping[str, str], security: bool) -> str:
    known = osv.worst(severities.get(cve, "") for cve in entry.cves)
    if known != "unknown":
        return known
    if not security and not entry.cves:
        return "update"
    return _LOUD.get(entry.urgency, "unknown")


def _by_feed(
    known: Mapping[Pair, Sequence[Hit]], offers: set[Pair], feed: osv.Feed, bench: Bench, *, asked: bool
) -> list[Item]:
    items: list[Item] = []
    by = f"OSV export of {day(feed.date)}"
    waiting = 0
    for (source, installed), found in known.items():
        if unclear := undecided(found):
            items.append(unknown("debian", source, installed, UNDECIDED, unclear, by))
        waiting += sum(1 for hit in found if hit.affected and not hit.fixed)
        if (source, installed) in offers:
            continue
        fixes = [of_hit(hit, hit.fixed, None, by) for hit in found if hit.affected and hit.fixed]
        reason = _NOT_OFFERED if asked else ""
        items += [bench.item("debian", source, installed, fix, reason) for fix in oldest(fixes, versions.debian)]
    if waiting:
        reason = f"{waiting} vulnerabilities are known that Debian has no fix for yet"
        items.append(unfixed("debian", "vulnerabilities without a fix", "", "", (), by, reason))
    return items
