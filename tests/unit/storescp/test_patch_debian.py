"""What Debian's tools say: upgrades that are counted twice, changelogs with dates and CVE ids, lists and their age."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storescp.patch import debian, system
from storescp.patch.debian import DebianError, Upgrade

QUICK = settings(deadline=None, derandomize=True, max_examples=200)
UPGRADES = """\
Reading package lists...
The following packages have been kept back:
  held-one held-two
  held-three
The following packages will be upgraded:
  libplanted1 planted
2 upgraded, 1 newly installed, 0 to remove and 3 not upgraded.
Inst libplanted1:i386 [1:1.0-1] (1:1.0-1+deb12u1 Debian:12.9/stable, Debian-Security:12/stable-security [i386]) []
Inst planted-new (2.0 Debian:12.9/stable [amd64])
Inst planted [1.0-1] (1.0-1+b2 Debian:12.9/stable [amd64]) [libplanted1:i386 on planted:amd64]
Conf planted (1.0-1+b2 Debian:12.9/stable [amd64])
"""
CHANGELOG = b"""\
planted (1.0-3~deb12u2) bookworm-security; urgency=high

  * Fix CVE-2027-0002 and
    CVE-2027-0003.

 -- A Maintainer <a@example.org>  Tue, 05 Jan 2027 10:00:00 +0100

planted (1.0-3) unstable; urgency=medium

  * Fix CVE-2027-0001.

 -- A Maintainer <a@example.org>  Fri, 01 Jan 2027 10:00:00 +0000

planted (1.0-2) bookworm; urgency=low

  * Nothing to see.

 -- A Maintainer <a@example.org>  Mon, 01 Jun 2026 10:00:00 +0000
"""
RELEASE = b"""\
-----BEGIN PGP SIGNED MESSAGE-----
Hash: SHA256

Origin: Debian
Label: %b
Suite: %b
Codename: bookworm
Date: Sat, 09 Jan 2027 10:00:00 UTC
SHA256:
 00 1 main
"""


def test_upgrades_are_read_with_origin_and_what_is_kept_back() -> None:
    assert debian.parse_upgrades(UPGRADES) == (
        (Upgrade("libplanted1", "1:1.0-1", "1:1.0-1+deb12u1", True), Upgrade("planted", "1.0-1", "1.0-1+b2", False)),
        ("held-one", "held-two", "held-three"),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Inst planted [1] (2 x [amd64])\n",
        UPGRADES.replace("2 upgraded", "3 upgraded"),
        UPGRADES.replace("Inst planted [1.0-1] (", "Inst planted [1.0-1] "),
    ],
)
def test_an_answer_that_does_not_add_up_is_no_answer(text: str) -> None:
    with pytest.raises(DebianError):
        debian.parse_upgrades(text)


def test_a_changelog_says_what_an_installed_version_lacks_and_since_when_a_release_had_it() -> None:
    entries = debian.parse_changelog(CHANGELOG)
    assert [(e.version, e.early, e.urgency, sorted(e.cves)) for e in entries] == [
        ("1.0-3~deb12u2", False, "high", ["CVE-2027-0002", "CVE-2027-0003"]),
        ("1.0-3", True, "medium", ["CVE-2027-0001"]),
        ("1.0-2", False, "low", []),
    ]
    lacking = debian.above(entries, "1.0-2")
    # What was written for unstable on 1 January came to the release on the 5th.
    assert [(e.version, e.date) for e in lacking] == [
        ("1.0-3~deb12u2", datetime(2027, 1, 5, 9, tzinfo=UTC)),
        ("1.0-3", datetime(2027, 1, 5, 9, tzinfo=UTC)),
    ]


@pytest.mark.parametrize(
    ("installed", "lacks"),
    [
        ("1.0-3~deb12u2", []),
        # Newer by its number and yet part of what is installed.
        ("1.0-3", ["1.0-3~deb12u2"]),
        # Of another branch: no entry of its own.
        ("1.0-2+deb12u1", ["1.0-3~deb12u2", "1.0-3"]),
        ("2.0-1", []),
    ],
)
def test_what_stands_above_the_installed_version_is_lacking(installed: str, lacks: list[str]) -> None:
    assert [e.version for e in debian.above(debian.parse_changelog(CHANGELOG), installed)] == lacks


def test_a_list_is_as_old_as_the_security_suite_s_and_without_one_nothing_is_known() -> None:
    main, security = RELEASE % (b"Debian", b"stable"), RELEASE % (b"Debian-Security", b"stable-security")
    assert system.list_date([main, security]) == datetime(2027, 1, 9, 10, tzinfo=UTC)
    with pytest.raises(DebianError, match="security suite"):
        system.list_date([main])
    with pytest.raises(DebianError, match="never ran"):
        system.list_date([])
    with pytest.raises(DebianError, match="no date"):
        debian.parse_release(security.replace(b"Date: Sat, 09 Jan 2027", b"Date: some day"))


@QUICK
@given(
    st.one_of(
        st.binary(max_size=400),
        st.lists(st.sampled_from([*CHANGELOG.split(b"\n"), b" --", b"a (b) c; d", b" -- a <b>  Fri, 99 Foo"])).map(
            b"\n".join
        ),
    )
)
def test_any_bytes_are_a_changelog_a_release_and_upgrades_or_the_one_error(content: bytes) -> None:
    for parse in (
        debian.parse_changelog,
        debian.parse_release,
        lambda c: debian.parse_upgrades(c.decode("utf-8", "replace")),
        lambda c: system.parse_packages(c.decode("utf-8", "replace")),
    ):
        try:
            found = parse(content)
        except DebianError:
            continue
        if isinstance(found, list):
            debian.above(found, "1.0")


def packages(*lines: str, problem: str = "") -> system.Debian:
    found = tuple(system.Package(*line.split()) for line in lines)
    return system.Debian("12", found, problem, None, None, "")


def uname(release: str, version: str) -> os.uname_result:
    return os.uname_result(("Linux", "host", release, version, "x86_64"))


OLD, NEW = (
    "linux-image-6.1.0-9-amd64 6.1.27-1 linux-signed 6.1.27+1",
    "linux-image-6.1.0-10-amd64 6.1.37-1 linux-signed 6.1.37+1",
)


@pytest.mark.parametrize(
    ("running", "build", "installed", "newest", "problem"),
    [
        ("6.1.0-10-amd64", "#1 SMP Debian 6.1.37-1 (2023-07-03)", [OLD, NEW], "6.1.0-10-amd64", ""),
        ("6.1.0-9-amd64", "#1 SMP Debian 6.1.27-1 (2023-05-08)", [OLD, NEW], "6.1.0-10-amd64", ""),
        ("6.1.0-10-amd64", "#1 SMP Debian 6.1.34-1 (2023-06-03)", [OLD, NEW], "6.1.0-10-amd64 (6.1.37-1)", ""),
        ("6.1.0-9-amd64", "#1 SMP Debian 6.1.27-1 (2023-05-08)", [], "", "no kernel package is installed here"),
        ("6.9.1-cloud", "#1 SMP Tue", [OLD], "", "none of Debian's"),
    ],
)
def test_the_running_kernel_is_compared_with_the_newest_installed(
    running: str, build: str, installed: list[str], newest: str, problem: str
) -> None:
    found = system.kernel(uname(running, build), packages(*installed))
    assert found.newest == newest
    assert problem in found.problem
    assert bool(found.problem) == bool(problem)


def test_libraries_that_were_replaced_are_found_in_processes_of_ours_alone(tmp_path: Path) -> None:
    gone = "7f00-7f01 r-xp 00000000 fe:00 7 /usr/lib/libssl.so.3 (deleted)\n"
    gone += "7f01-7f02 rw-s 00000000 00:01 8 /memfd:x (deleted)\n"
    for number, command in (
        ("1", b"init"),
        ("20", b"python\0-m\0storescp\0gate"),
        ("21", b"/opt/strongroom\0vault"),
        ("22", b"other\0"),
    ):
        (tmp_path / number).mkdir()
        (tmp_path / number / "cmdline").write_bytes(command)
        (tmp_path / number / "maps").write_text(gone)
    found = system.libraries(tmp_path)
    assert [(library.path, library.processes) for library in found.found] == [("/usr/lib/libssl.so.3", 2)]
    assert (found.processes, found.problem) == (2, "")
    (tmp_path / "1").rename(tmp_path / "one")
    assert "hidden" in system.libraries(tmp_path).problem
