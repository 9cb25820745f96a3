"""The report: every state by its rule; what cannot be told is unknown, whatever is missing, and never ok."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from storescp.patch import debian, fixes, index, inventory, osv, report, system, versions
from storescp.patch.folder import Window
from storescp.patch.inventory import Component, Distribution, Inventory
from storescp.patch.items import Bench, Evidence, Fix, Item
from storescp.patch.settings import Limit, PatchAge

NOW = datetime(2027, 1, 10, tzinfo=UTC)
DAY = timedelta(days=1)
NO_UPGRADES = debian.Upgrades((), ())
OPENSSL = inventory.dated("OpenSSL 3.6.0 1 Oct 2025", "OpenSSL of planted", carrier="planted")
BIG = "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H"


def ago(days: float) -> datetime:
    return NOW - days * DAY


YESTERDAY, FIVE_DAYS_AGO = ago(1), ago(5)


def record(
    name: str = "X-1",
    *,
    fixed: str = "2.0",
    published: datetime | None = FIVE_DAYS_AGO,
    score: str = BIG,
    aliases: tuple[str, ...] = (),
    ecosystem: str = "PyPI",
    package: str = "planted",
    **more: Any,
) -> osv.Record:
    events = [osv.Event(introduced="0"), *([osv.Event(fixed=fixed)] if fixed else [])]
    affected = osv.Affected(osv.Package(package, ecosystem), [osv.Range("ECOSYSTEM", None, events)])
    severity = [osv.Severity("CVSS_V3", score)] if score else None
    return osv.Record(name, ago(1), published, aliases=list(aliases), severity=severity, affected=[affected], **more)


def feed(*records: osv.Record, date: datetime = YESTERDAY, ecosystem: str = "PyPI") -> osv.Feed:
    packages: dict[tuple[str, str], list[osv.Entry]] = {}
    repositories: dict[str, list[osv.Entry]] = {}
    for found in records:
        for affected in found.affected or ():
            if affected.package is not None:
                key = osv.key_of(affected.package.ecosystem, affected.package.name)
                packages.setdefault(key, []).append((found, affected))
            for span in affected.ranges or ():
                if span.repo:
                    repositories.setdefault(osv.repository(span.repo), []).append((found, affected))
    return osv.Feed(ecosystem, date, len(records), packages, repositories)


def project(**uploaded: float) -> index.Project:
    """Make an answer: v1_0=30 was uploaded 30 days ago."""
    found = [(name[1:].replace("_", "."), ago(days)) for name, days in uploaded.items()]
    return index.Project("planted", tuple(index.Release(v, versions.python(v), date) for v, date in found))


def machine(
    *components: Component, version: str = "1.0", upgrades: debian.Upgrades | None = NO_UPGRADES, **more: Any
) -> Inventory:
    packages = (
        system.Package("libplanted1", "1.0-1", "planted-src", "1.0-1"),
        system.Package("quiet", "3.0-1", "quiet", "3.0-1"),
    )
    fields: dict[str, Any] = {
        "python": "3.11.2",
        "distributions": (Distribution("planted", version),),
        "components": components,
        "debian": system.Debian("12", packages, "", upgrades, ago(1), ""),
        "kernel": system.Kernel("6.1", "6.1", None, ""),
        "libraries": system.Libraries((), 2, ""),
    }
    return Inventory(**fields | more)


def judged(
    what: Inventory | None = None,
    *,
    feeds: Mapping[str, osv.Feed | str] | None = None,
    answer: index.Project | str = "not asked",
    asked: datetime = YESTERDAY,
    changelogs: Mapping[tuple[str, str], Any] | None = None,
    bench: Bench | None = None,
) -> report.Report:
    answers = {"planted": answer if isinstance(answer, str) else (answer, asked)}
    everything: dict[str, osv.Feed | str] = {"PyPI": feed(), "Debian": feed(ecosystem="Debian"), "GIT": "none"}
    evidence = Evidence(everything | dict(feeds or {}), answers, changelogs or {})
    return report.assemble(what or machine(), evidence, bench or Bench(PatchAge(), NOW, {}))


def of(found: report.Report, kind: str, name: str = "") -> list[Item]:
    return [item for item in found.items if item.kind == kind and (not name or item.name == name)]


def one(found: report.Report, kind: str, name: str = "") -> Item:
    (item,) = of(found, kind, name)
    return item


@pytest.mark.parametrize(
    ("days", "state"), [(0, "ok"), (3, "ok"), (3.1, "due"), (7, "due"), (7.1, "breach"), (400, "breach"), (-1, "ok")]
)
def test_an_open_fix_is_ok_until_its_target_due_until_its_limit_and_a_breach_after_it(days: float, state: str) -> None:
    item = one(judged(feeds={"PyPI": feed(record())}, answer=project(v1_0=900, v2_0=days)), "python")
    assert (item.state, item.candidate, item.severity) == (state, "2.0", "critical")
    assert (item.target, item.limit, item.ids, item.confidence) == ("P3D", "P7D", ["X-1"], "high")
    assert item.age_days == max(days, 0)
    assert item.open


def test_the_fix_s_upload_dates_it_before_the_advisory_and_the_advisory_before_first_seen() -> None:
    by_index = one(judged(feeds={"PyPI": feed(record())}, answer=project(v1_0=900, v2_0=6)), "python")
    by_advisory = one(judged(feeds={"PyPI": feed(record())}), "python")
    by_nobody = one(judged(feeds={"PyPI": feed(record(published=None))}), "python")
    assert [(i.since, i.confidence) for i in (by_index, by_advisory, by_nobody)] == [
        (ago(6), "high"),
        (ago(5), "medium"),
        (NOW, "low"),
    ]
    assert "package index" in by_index.source
    assert "advisory" in by_advisory.source
    assert "first seen" in by_nobody.source
    # It is older than that, so it cannot be said to be in time.
    assert by_nobody.state == "due"


def test_first_seen_is_remembered_and_a_date_to_come_is_not_believed() -> None:
    evidence = {"PyPI": feed(record(published=None))}
    first = judged(feeds=evidence)
    ((key, date),) = first.seen.items()
    assert date == NOW
    later = judged(feeds=evidence, bench=Bench(PatchAge(), NOW, {key: ago(8), "gone": ago(9)}))
    assert (one(later, "python").state, later.seen) == ("breach", {key: ago(8), "gone": ago(9)})
    assert judged(feeds=evidence, bench=Bench(PatchAge(), NOW, {key: NOW + DAY})).seen == {key: NOW}


def test_what_cannot_be_remembered_is_unknown() -> None:
    found = judged(feeds={"PyPI": feed(record(published=None))}, bench=Bench(PatchAge(), NOW, {}, remembers=False))
    assert one(found, "python").state == "unknown"
    assert found.findings


@pytest.mark.parametrize(
    ("feeds", "answer", "asked", "state", "source"),
    [
        ({}, "not asked", 1, "ok", "OSV export of 2027-01-09"),
        ({}, project(v1_0=30), 1, "ok", "OSV export of 2027-01-09"),
        ({"PyPI": "cannot be reached"}, "not asked", 1, "unknown", ""),
        ({"PyPI": feed(date=ago(8))}, "not asked", 1, "unknown", ""),
        ({"PyPI": feed(date=NOW + 3 * DAY)}, "not asked", 1, "unknown", ""),
        ({"PyPI": feed(record(), date=ago(8))}, project(v1_0=30), 8, "unknown", ""),
        # The newest release lacks no fix that there is.
        ({"PyPI": "cannot be reached"}, project(v1_0=30), 1, "ok", "package index, asked 2027-01-09"),
        ({"PyPI": "cannot be reached"}, project(v0_9=30), 1, "unknown", ""),
        ({"PyPI": "cannot be reached"}, project(v1_0=30, v1_1=2), 1, "ok", "package index, asked 2027-01-09"),
        (
            {"PyPI": "cannot be reached"},
            project(v1_0=30, v1_1=8, v1_2=1),
            1,
            "breach",
            "package index, asked 2027-01-09",
        ),
    ],
)
def test_without_usable_evidence_a_package_is_unknown(
    feeds: dict[str, osv.Feed | str], answer: index.Project | str, asked: float, state: str, source: str
) -> None:
    item = one(judged(feeds=feeds, answer=answer, asked=ago(asked)), "python")
    assert (item.state, item.source) == (state, source)
    assert item.reason


def test_a_newer_release_that_this_python_cannot_use_is_no_update_and_without_advisories_unknown() -> None:
    later = index.Release("2.0", versions.python("2.0"), ago(9), ">=3.12")
    answer = project(v1_0=30)._replace(releases=(*project(v1_0=30).releases, later))
    assert one(judged(answer=answer), "python").state == "ok"
    item = one(judged(feeds={"PyPI": "cannot be reached"}, answer=answer), "python")
    assert (item.state, "2.0 may hold a fix" in item.reason) == ("unknown", True)


def test_a_newer_release_that_no_advisory_asks_for_has_limits_of_its_own() -> None:
    item = one(judged(answer=project(v1_0=900, v1_1=100, v2_0=10)), "python")
    assert (item.state, item.severity, item.candidate, item.limit) == ("due", "update", "2.0", "P365D")


def test_a_fix_a_severity_and_the_records_of_one_vulnerability_have_one() -> None:
    records = (
        record("GHSA-1", fixed="1.5", score=BIG, published=ago(2), aliases=("CVE-1",)),
        record("PYSEC-1", fixed="1.5", score="", published=ago(4), aliases=("CVE-1",)),
        record("X-2", fixed="2.0", score="", published=ago(40)),
    )
    items = of(judged(feeds={"PyPI": feed(*records)}), "python")
    assert {i.severity: (i.state, i.candidate, i.since, i.ids) for i in items} == {
        "critical": ("due", "1.5", ago(4), ["CVE-1", "GHSA-1", "PYSEC-1"]),
        "unknown": ("breach", "2.0", ago(40), ["X-2"]),
    }


def test_a_fix_without_a_date_does_not_hide_behind_one_that_has_one() -> None:
    found = fixes.oldest(
        [Fix("high", ago(1), "high", "1.1", ("A",)), Fix("high", None, "none", "1.2", ("B",))], versions.python
    )
    assert [(f.since, f.candidate, set(f.ids)) for f in found] == [(ago(1), "1.2", {"A", "B"}), (None, "1.2", {"B"})]


def test_a_vulnerability_without_a_fix_is_due_and_one_that_cannot_be_judged_is_unknown() -> None:
    assert one(judged(feeds={"PyPI": feed(record(fixed=""))}), "python").state == "due"
    # With the index the first release that the advisory does not list is the fix.
    listed = record(fixed="")
    entry = (listed.affected or [])[0]
    entry.ranges, entry.versions = None, ["1.0", "1.1"]
    item = one(judged(feeds={"PyPI": feed(listed)}, answer=project(v1_0=90, v1_1=80, v1_2=20)), "python")
    assert (item.candidate, item.since, item.state) == ("1.2", ago(20), "breach")
    odd = one(judged(feeds={"PyPI": feed(record(fixed="some day"))}), "python")
    assert (odd.state, odd.ids) == ("unknown", ["X-1"])
    assert one(judged(machine(version="of my own")), "python").state == "unknown"


@pytest.mark.parametrize(
    ("days", "begin", "end", "state"),
    [
        (8, ago(1), NOW + DAY, "planned"),
        (8, NOW, NOW + DAY, "planned"),
        (8, ago(1), NOW, "breach"),
        (8, NOW + DAY, NOW + 2 * DAY, "breach"),
        (21, ago(1), NOW + DAY, "planned"),
        (21.1, ago(1), NOW + DAY, "breach"),
        (5, ago(1), NOW + DAY, "due"),
    ],
)
def test_a_window_holds_a_breach_back_for_so_long_and_no_longer(
    days: float, begin: datetime, end: datetime, state: str
) -> None:
    bench = Bench(PatchAge(), NOW, {}, [Window(id="w", begin=begin, end=end, reason="r")])
    found = judged(feeds={"PyPI": feed(record(published=ago(days)))}, bench=bench)
    assert one(found, "python").state == state
    assert bool(found.findings) == (state == "breach")


def test_a_window_holds_nothing_unknown_back() -> None:
    bench = Bench(PatchAge(), NOW, {}, [Window(id="w", begin=ago(1), end=NOW + DAY, reason="r")])
    assert judged(feeds={"PyPI": "none"}, bench=bench).findings


def test_limits_are_those_of_the_settings() -> None:
    bench = Bench(PatchAge(critical=Limit(target="PT1H", limit="PT2H")), NOW, {})
    item = one(judged(feeds={"PyPI": feed(record(published=ago(0.5)))}, bench=bench), "python")
    assert (item.state, item.limit) == ("breach", "PT2H")


def git_record(*tags: str, repo: str = OPENSSL.repository) -> osv.Record:
    affected = osv.Affected(None, [osv.Range("GIT", f"{repo}.git", [])], list(tags))
    return osv.Record("CVE-9", ago(1), ago(9), severity=[osv.Severity("CVSS_V3", BIG)], affected=[affected])


@pytest.mark.parametrize(
    ("git", "state", "confidence"),
    [
        ("none was fetched", "unknown", "low"),
        (feed(git_record("openssl-3.6.0"), date=ago(9), ecosystem="GIT"), "unknown", "low"),
        (feed(git_record("x", repo="https://github.com/other/other"), ecosystem="GIT"), "unknown", "low"),
        (feed(git_record(), ecosystem="GIT"), "unknown", "none"),
        (feed(git_record("openssl-3.5.0"), ecosystem="GIT"), "ok", "medium"),
        (feed(git_record("openssl-3.5.0", "openssl-3.6.0"), ecosystem="GIT"), "breach", "medium"),
    ],
)
def test_a_bundled_library_is_judged_by_its_tags_and_else_is_unknown_and_at_most_so_old(
    git: osv.Feed | str, state: str, confidence: str
) -> None:
    item = one(judged(machine(OPENSSL), feeds={"GIT": git}), "openssl")
    assert (item.state, item.confidence, item.installed) == (state, confidence, "3.6.0")
    if confidence == "low":
        assert (item.since, item.age_days) == (datetime(2025, 10, 1, tzinfo=UTC), 466.0)


@pytest.mark.parametrize(
    ("text", "version", "released", "tag"),
    [
        ("OpenSSL 3.6.0 1 Oct 2025", "3.6.0", datetime(2025, 10, 1, tzinfo=UTC), "openssl-3.6.0"),
        ("OpenSSL 1.1.1w  11 Sep 2023", "1.1.1w", datetime(2023, 9, 11, tzinfo=UTC), "OpenSSL_1_1_1w"),
        ("OpenSSL 3.0.22+quic 25 Aug 2026", "3.0.22", datetime(2026, 8, 25, tzinfo=UTC), "openssl-3.0.22"),
        ("OpenSSL 3.6.0", "3.6.0", None, "openssl-3.6.0"),
        ("OpenSSL 3.6.0 31 Feb 2025", "3.6.0", None, "openssl-3.6.0"),
    ],
)
def test_an_openssl_s_version_text_has_its_version_date_and_tag(
    text: str, version: str, released: datetime | None, tag: str
) -> None:
    found = inventory.dated(text, "OpenSSL")
    assert (found.version, found.released) == (version, released)
    assert tag in found.tags


def test_this_machine_s_own_parts_are_named_with_their_versions() -> None:
    found = {c.name: c.version for c in inventory.components(debian_with(packages=()))}
    assert set(found) == {
        *("CPython", "OpenSSL of the standard library", "OpenSSL of cryptography"),
        *("SQLCipher of sqlcipher3", "OpenSSL of sqlcipher3"),
    }
    assert all(found.values())
    names = {d.name for d in inventory.distributions()}
    assert {"cryptography", "sqlcipher3", "pydicom"} <= names
    assert "strongroom" not in names


def test_a_component_without_a_version_is_unknown() -> None:
    assert one(judged(machine(inventory.dated("", "OpenSSL of nothing"))), "openssl").state == "unknown"


def upgrade(candidate: str = "1.0-2", *, security: bool = True) -> debian.Upgrades:
    return debian.Upgrades((debian.Upgrade("libplanted1", "1.0-1", candidate, security),), ())


def entry(version: str, days: float, *cves: str, urgency: str = "medium") -> debian.Entry:
    return debian.Entry("planted-src", version, False, urgency, ago(days), frozenset(cves))


def test_debian_s_oldest_lacking_entry_dates_the_fix_and_osv_tells_how_bad_it_is() -> None:
    known = record("DEBIAN-CVE-1", package="planted-src", ecosystem="Debian:12", fixed="1.0-3", aliases=("CVE-1",))
    entries = [entry("1.0-4", 1), entry("1.0-3", 6, "CVE-1"), entry("1.0-2", 20, "CVE-2", urgency="high")]
    found = judged(
        machine(upgrades=upgrade("1.0-4")),
        feeds={"Debian": feed(known, ecosystem="Debian")},
        changelogs={("planted-src", "1.0-4"): entries},
    )
    items = {i.severity: (i.state, i.since, i.ids) for i in of(found, "debian", "planted-src")}
    assert items["critical"] == ("due", ago(6), ["CVE-1"])
    assert items["high"] == ("breach", ago(20), ["CVE-2"])
    # A security upload whose entry names no severity.
    assert items["unknown"] == ("ok", ago(1), [])
    assert one(found, "debian", "1 other source packages").state == "ok"


@pytest.mark.parametrize(("security", "severity", "target"), [(True, "unknown", "P3D"), (False, "update", "P90D")])
def test_an_upgrade_without_a_changelog_counts_from_when_it_was_first_seen(
    security: bool, severity: str, target: str
) -> None:
    item = one(judged(machine(upgrades=upgrade(security=security))), "debian", "planted-src")
    assert (item.severity, item.target, item.confidence, item.state) == (severity, target, "low", "due")


def debian_with(**more: Any) -> system.Debian:
    return machine().debian._replace(**more)


@pytest.mark.parametrize(
    ("what", "state"),
    [
        (debian_with(upgrades=None, date=None, upgrades_problem="apt has no package lists"), "unknown"),
        (debian_with(date=ago(8)), "unknown"),
        (debian_with(date=None), "unknown"),
        (debian_with(date=NOW + 3 * DAY), "unknown"),
        (debian_with(problem="there is no dpkg-query here"), "unknown"),
        (debian_with(release=""), "unknown"),
        (debian_with(), "ok"),
    ],
)
def test_debian_without_fresh_lists_and_without_a_feed_is_unknown(what: system.Debian, state: str) -> None:
    found = judged(machine(debian=what), feeds={"Debian": "none was fetched"})
    assert {item.state for item in of(found, "debian")} == {state}


def test_with_a_feed_debian_is_judged_without_apt_s_lists() -> None:
    what = debian_with(upgrades=None, date=None, upgrades_problem="apt has no package lists")
    known = record("D-1", package="planted-src", ecosystem="Debian:12", fixed="1.0-3")
    unfixed = record("D-2", package="quiet", ecosystem="Debian:12", fixed="")
    other = record("D-3", package="quiet", ecosystem="Debian:13", fixed="9")
    found = judged(machine(debian=what), feeds={"Debian": feed(known, unfixed, other, ecosystem="Debian")})
    assert one(found, "debian", "planted-src").state == "due"
    assert one(found, "debian", "vulnerabilities without a fix").state == "due"
    assert one(found, "debian", "1 other source packages").state == "ok"


def test_a_signed_kernel_is_judged_by_the_kernel_s_advisories_and_other_signed_packages_by_apt_alone() -> None:
    installed = (
        system.Package("linux-image-6.1.0-9-amd64", "6.1.27-1", "linux-signed-amd64", "6.1.27+1"),
        system.Package("linux-image-6.1.0-10-amd64", "6.1.37-1", "linux-signed-amd64", "6.1.37+1"),
        system.Package("shim-signed", "1.39+15.7-1", "shim-signed", "1.39"),
    )
    known = record("D-1", package="linux", ecosystem="Debian:12", fixed="6.1.38-1")
    evidence = {"Debian": feed(known, ecosystem="Debian")}
    what = machine(debian=debian_with(packages=installed))
    assert {(i.name, i.installed, i.state) for i in of(judged(what, feeds=evidence), "debian")} == {
        ("linux-signed-amd64", "6.1.37+1", "due"),
        ("1 other source packages", "12", "ok"),
    }
    offline = debian_with(packages=installed, upgrades=None, date=None, upgrades_problem="apt has no package lists")
    assert one(judged(machine(debian=offline), feeds=evidence), "debian", "shim-signed").state == "unknown"


def test_a_fix_that_is_dated_to_come_counts_from_when_it_was_first_seen() -> None:
    item = one(judged(feeds={"PyPI": feed(record(published=NOW + 900 * DAY))}), "python")
    assert (item.since, item.confidence, item.state) == (NOW, "low", "due")


def test_the_next_release_does_not_shorten_the_wait_for_an_undated_fix() -> None:
    first = judged(
        feeds={"PyPI": feed(record(published=None, fixed="2.0"), date=ago(9))}, bench=Bench(PatchAge(), ago(9), {})
    )
    assert one(first, "python").state == "due"
    later = judged(feeds={"PyPI": feed(record(published=None, fixed="2.1"))}, bench=Bench(PatchAge(), NOW, first.seen))
    assert (one(later, "python").candidate, one(later, "python").state) == ("2.1", "breach")


def test_a_fix_that_apt_does_not_offer_is_named_and_what_is_kept_back_is_unknown() -> None:
    known = record("D-1", package="planted-src", ecosystem="Debian:12", fixed="1.0-3")
    what = machine(upgrades=debian.Upgrades((), ("held",)))
    found = judged(what, feeds={"Debian": feed(known, ecosystem="Debian")})
    assert "does not offer" in one(found, "debian", "planted-src").reason
    assert one(found, "debian", "held").state == "unknown"


def test_what_is_part_of_a_debian_package_is_as_old_as_that() -> None:
    cpython = inventory.component("cpython", "CPython", "3.11.2", package="planted-src")
    quiet = inventory.component("openssl", "OpenSSL", "3.0.1", package="quiet")
    entries = {("planted-src", "1.0-2"): [entry("1.0-2", 30, "CVE-2")]}
    found = judged(machine(cpython, quiet, upgrades=upgrade()), changelogs=entries)
    assert (one(found, "cpython").state, one(found, "cpython").since) == ("breach", ago(30))
    assert one(found, "openssl").state == "ok"
    without = machine(cpython, debian=debian_with(problem="there is no dpkg-query here"))
    assert one(judged(without), "cpython").state == "unknown"


@pytest.mark.parametrize(
    ("kernel", "state"),
    [
        (system.Kernel("6.1", "6.1", None, ""), "ok"),
        (system.Kernel("6.1", "6.2", ago(8), ""), "breach"),
        (system.Kernel("6.1", "6.2", None, ""), "due"),
        (system.Kernel("6.1", "", None, "the host's"), "unknown"),
    ],
)
def test_a_kernel_that_waits_for_a_restart_has_an_age(kernel: system.Kernel, state: str) -> None:
    assert one(judged(machine(kernel=kernel)), "kernel").state == state


@pytest.mark.parametrize(
    ("libraries", "states"),
    [
        (system.Libraries((), 3, ""), {"ok"}),
        (system.Libraries((), 3, "hidden"), {"unknown"}),
        (system.Libraries((system.Library("/lib/a.so", 2, ago(8)),), 3, ""), {"breach"}),
        (system.Libraries((system.Library("/lib/a.so", 2, ago(1)),), 3, "hidden"), {"ok", "unknown"}),
    ],
)
def test_replaced_libraries_have_an_age_and_hidden_processes_are_unknown(
    libraries: system.Libraries, states: set[str]
) -> None:
    assert {item.state for item in of(judged(machine(libraries=libraries)), "library")} == states


def test_sources_are_listed_with_their_own_dates_and_problems() -> None:
    found = judged(feeds={"PyPI": feed(date=ago(8)), "GIT": "none was fetched"})
    sources = {s.name: (s.date, s.problem) for s in found.sources}
    assert sources["OSV export of PyPI"] == (ago(8), "the OSV export of PyPI is of 2027-01-02, older than P7D")
    assert sources["OSV export of GIT"] == (None, "none was fetched")
    assert sources["package index"] == (None, "no usable answer about 1 of 1 packages")
    assert sources["apt's package lists"] == (ago(1), "")


def test_the_worst_comes_first() -> None:
    found = judged(machine(OPENSSL), feeds={"PyPI": feed(record(published=ago(30)))})
    assert [item.state for item in found.items] == ["unknown", "breach", "ok", "ok", "ok"]
