"""The judgements: one function a kind of thing that runs here. Pure, like the report that they make up."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from storescp.patch import index, osv, versions
from storescp.patch.fixes import Hit, hits, of_hit, oldest, tag_hits, undecided
from storescp.patch.inventory import Component, Distribution, Inventory
from storescp.patch.items import STATES, Bench, Evidence, Fix, Item, day, ok, unfixed, unknown

NO_FIX = "a known vulnerability; no fix is published yet"
UNDECIDED = "whether it is affected cannot be told from the advisory"
FEED_HINT = "'strongroom patch fetch' or 'patch import' brings an OSV export"


def python(inventory: Inventory, evidence: Evidence, bench: Bench) -> list[Item]:
    """Judge the installed Python packages."""
    items: list[Item] = []
    for distribution in inventory.distributions:
        items += _distribution(distribution, inventory.python, evidence, bench)
    return items


def components(inventory: Inventory, evidence: Evidence, bench: Bench, of_debian: Sequence[Item]) -> list[Item]:
    """Judge the interpreter and the C libraries inside; what is part of a Debian package is as old as that."""
    items: list[Item] = []
    for component in inventory.components:
        if not component.version:
            items.append(unknown(component.kind, component.name, "", "its version cannot be told"))
        elif component.package:
            items.append(_with_debian(component, inventory, of_debian))
        else:
            items += _bundled(component, inventory.python, evidence, bench)
    return items


def kernel(inventory: Inventory, bench: Bench) -> list[Item]:
    """Judge the running kernel against the newest installed one."""
    found = inventory.kernel
    if found.problem:
        return [unknown("kernel", "Linux", found.running, found.problem)]
    if found.newest == found.running:
        return [ok("kernel", "Linux", found.running, "dpkg", "the newest installed kernel runs")]
    fix = Fix("unknown", found.since, "high" if found.since else "none", found.newest, source="dpkg")
    return [bench.item("kernel", "Linux", found.running, fix, "a newer kernel is installed: it wants a restart")]


def libraries(inventory: Inventory, bench: Bench) -> list[Item]:
    """Judge libraries that our processes use though they were replaced."""
    found = inventory.libraries
    items = []
    for library in found.found:
        fix = Fix("unknown", library.since, "high" if library.since else "none", "the file on disk", source="/proc")
        reason = f"replaced, and still used by {library.processes} processes of this product: restart them"
        items.append(bench.item("library", library.path, "deleted", fix, reason))
    if found.problem:
        items.append(unknown("library", "mapped libraries", "", found.problem))
    elif not items:
        items.append(ok("library", "mapped libraries", "", "/proc", f"{found.processes} processes use what is on disk"))
    return items


def _distribution(what: Distribution, interpreter: str, evidence: Evidence, bench: Bench) -> list[Item]:
    feed = evidence.feeds.get("PyPI", "the OSV export of PyPI is not among patch_age.ecosystems")
    answer = evidence.answers.get(what.name, "the package index was not asked about it")
    project = None if isinstance(answer, str) else answer[0]
    asked = "" if isinstance(answer, str) else f"package index, asked {day(answer[1])}"
    try:
        after = index.newer(project, what.version) if project else []
        versions.python(what.version)
    except versions.VersionError:
        return [unknown("python", what.name, what.version, "its version is none of Python's (PEP 440)")]
    later = [release for release in after if index.usable(release, interpreter)]
    if not isinstance(feed, str):
        by = f"OSV export of {day(feed.date)}"
        items = _advised(what, interpreter, feed, project, bench)
        if not items and later:
            fix = _update(later, "update", f"{asked}; {by}")
            reason = "no known vulnerability; a newer release is there"
            items = [bench.item("python", what.name, what.version, fix, reason)]
        return items or [ok("python", what.name, what.version, by, "no known vulnerability")]
    if project is None:
        return [unknown("python", what.name, what.version, f"{feed}; {answer}; {FEED_HINT}")]
    if later:
        reason = f"a newer release may hold a fix, and nobody here knows: {feed}"
        return [bench.item("python", what.name, what.version, _update(later, "unknown", asked), reason)]
    if after:
        reason = f"{feed}; {after[-1].version} may hold a fix, and this Python cannot use it"
        return [unknown("python", what.name, what.version, reason)]
    if project.find(what.version) is None:
        reason = f"{feed}; the package index does not list this version: withdrawn, or another project's"
        return [unknown("python", what.name, what.version, reason)]
    return [ok("python", what.name, what.version, asked, "no newer release", confidence="medium")]


def _advised(
    what: Distribution, interpreter: str, feed: osv.Feed, project: index.Project | None, bench: Bench
) -> list[Item]:
    by = f"OSV export of {day(feed.date)}"
    found = hits(feed, "PyPI", what.name, what.version, versions.python)
    fixes, without = [], []
    for hit in (h for h in found if h.affected):
        release = _fix_release(hit, project, what.version, interpreter)
        fixed = hit.fixed or (release.version if release else "")
        if fixed:
            fixes.append(of_hit(hit, fixed, release.uploaded if release else None, by))
        else:
            without.append(hit)
    items = [bench.item("python", what.name, what.version, fix) for fix in oldest(fixes, versions.python)]
    if without:
        worst, ids = osv.worst(h.severity for h in without), [h.record.id for h in without]
        items.append(unfixed("python", what.name, what.version, worst, ids, by, NO_FIX))
    if unclear := undecided(found):
        items.append(unknown("python", what.name, what.version, UNDECIDED, unclear, by))
    return items


def _fix_release(hit: Hit, project: index.Project | None, installed: str, interpreter: str) -> index.Release | None:
    """Return the release that ends a vulnerability, as the index has it."""
    if project is None:
        return None
    if hit.fixed:
        return project.find(hit.fixed)
    # The advisory names no fix, or only the last bad version: the first later release that it does not list.
    entries = [
        affected
        for affected in hit.record.affected or ()
        if affected.package is not None
        and osv.key_of(affected.package.ecosystem, affected.package.name) == ("PyPI", project.name)
    ]
    for release in index.newer(project, installed):
        if index.usable(release, interpreter) and all(
            osv.judge(entry, release.version, versions.python).affected is False for entry in entries
        ):
            return release
    return None


def _update(later: Sequence[index.Release], severity: str, source: str) -> Fix:
    dates = [release.uploaded for release in later if release.uploaded is not None]
    # One release without a date may be the oldest of them.
    since = min(dates) if len(dates) == len(later) else None
    return Fix(severity, since, "medium" if since else "none", later[-1].version, source=source)


def _bundled(component: Component, interpreter: str, evidence: Evidence, bench: Bench) -> list[Item]:
    kind, name, version = component.kind, component.name, component.version
    feed = evidence.feeds.get("GIT", "the OSV export of GIT is not among patch_age.ecosystems")
    hint = _carrier(component, interpreter, evidence)
    about: Sequence[osv.Entry] = ()
    if not isinstance(feed, str):
        about = feed.repositories.get(osv.repository(component.repository), ())
        if not about:
            feed = f"the OSV export of GIT of {day(feed.date)} knows nothing about it"
    if isinstance(feed, str):
        item = unknown(kind, name, version, f"{feed}; {hint}" if hint else feed)
        if component.released is not None:
            # A fix can be no older than the release that lacks it.
            item.since, item.confidence, item.source = component.released, "low", "its own version text"
            item.age_days = round((bench.now - component.released).total_seconds() / 86_400, 1)
            item.reason = f"at most this old: {item.reason}"
        return [item]
    by = f"OSV export of GIT of {day(feed.date)}"
    found = tag_hits(about, component.tags)
    fixes = [of_hit(hit, "a later release", None, by) for hit in found if hit.affected]
    items = [bench.item(kind, name, version, fix, hint) for fix in oldest(fixes, _no_order)]
    if unclear := undecided(found):
        items.append(unknown(kind, name, version, UNDECIDED, unclear, by))
    return items or [ok(kind, name, version, by, "no known vulnerability", confidence="medium")]


def _carrier(component: Component, interpreter: str, evidence: Evidence) -> str:
    """Return what the index says about the package that brought a library along."""
    answer = evidence.answers.get(component.carrier, "")
    if not component.carrier or isinstance(answer, str):
        return ""
    later = [release for release in answer[0].releases if index.usable(release, interpreter)]
    return f"newest {component.carrier} on the index: {later[-1].version}" if later else ""


def _with_debian(component: Component, inventory: Inventory, of_debian: Sequence[Item]) -> Item:
    """Return the item of what is part of a Debian package: that package's worst."""
    text = f"part of Debian's {component.package}"
    own = [i for i in of_debian if i.name in {"packages", component.package}]
    # Where nothing is said of the package itself, what is said of all the others holds for it.
    own = own or [i for i in of_debian if i.name.endswith("other source packages")]
    if not own:
        return unknown(component.kind, component.name, component.version, f"{text}, of which nothing is known")
    worst = min(own, key=lambda item: (STATES.index(item.state), -(item.age_days or 0)))
    installed = next((p.source_version for p in inventory.debian.packages if p.source == component.package), "")
    reason = f"{text} {installed}; {worst.reason}" if worst.reason else f"{text} {installed}"
    return msgspec.structs.replace(
        worst, kind=component.kind, name=component.name, installed=component.version, reason=reason
    )


def _no_order(text: str) -> versions.Key:
    return (text,)
