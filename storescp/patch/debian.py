"""What Debian's own tools say: the upgrades that apt would make, the changelog of a candidate, the date of a list.

All of it parsing, of bytes as they come; who runs the tools is ``system.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from storescp.patch import versions
from storescp.patch.osv import utc

CHANGELOG_BYTES = 16 << 20
_INST = re.compile(r"Inst (\S+) (?:\[(\S+)\] )?\((\S+) ([^()]*)\).*")
_SUMMARY = re.compile(r"(\d+) upgraded, (\d+) newly installed, (?:\d+ downgraded, )?(\d+) to remove")
_EARLY = {"unstable", "experimental", "sid", "testing", "unreleased"}
_KEPT = "The following packages have been kept back:"
_ENTRY = re.compile(r"([A-Za-z0-9][A-Za-z0-9+.-]*) \(([^()\s]+)\)((?: +[A-Za-z0-9.+~-]+)*) *; *(.*)")
_TRAILER = re.compile(r" -- .*>  ?(.*)")
_URGENCY = re.compile(r"urgency *= *([a-z]+)", re.IGNORECASE)
_CVE = re.compile(r"CVE-[0-9]{4}-[0-9]{4,7}", re.ASCII)
_BINARY_REBUILD = re.compile(r"\+b[0-9]+$", re.ASCII)


class DebianError(ValueError):
    """What a tool said, or a file of Debian's, was not understood."""


class Upgrade(NamedTuple):
    """One binary package that apt would upgrade; whether the candidate comes from a security suite."""

    package: str
    installed: str
    candidate: str
    security: bool


class Upgrades(NamedTuple):
    """What apt would do, and what it would leave as it is though something newer is there."""

    upgrades: tuple[Upgrade, ...]
    kept: tuple[str, ...]


class Entry(NamedTuple):
    """One entry of a changelog; whether it was written for unstable or the like, which no release gets."""

    source: str
    version: str
    early: bool
    urgency: str
    date: datetime | None
    cves: frozenset[str]


class Suite(NamedTuple):
    """What a Release file says of itself."""

    label: str
    suite: str
    codename: str
    date: datetime


def parse_upgrades(text: str) -> Upgrades:
    """Return what ``apt-get -s dist-upgrade`` printed, in the C locale.

    Raises:
        DebianError: It was not understood, or its own count differs from what was read.
    """
    summary = _SUMMARY.search(text)
    if summary is None:
        raise DebianError("apt-get's answer ends without its summary")
    found = []
    for line in text.splitlines():
        if line.startswith("Inst "):
            parts = _INST.fullmatch(line)
            if parts is None:
                raise DebianError("a line of apt-get's answer was not understood")
            if parts[2]:
                found.append(Upgrade(parts[1].partition(":")[0], parts[2], parts[3], "security" in parts[4].lower()))
    # A reader that misses lines would read as "nothing to do".
    if len(found) != int(summary[1]):
        raise DebianError(f"apt-get counts {summary[1]} upgrades, and {len(found)} were read")
    return Upgrades(tuple(found), tuple(_kept(text)))


def parse_changelog(content: bytes) -> list[Entry]:
    """Return the entries of a Debian changelog, the newest first. Lines that are none of an entry's are passed over.

    Raises:
        DebianError: There is no entry, or it exceeds CHANGELOG_BYTES.
    """
    if len(content) > CHANGELOG_BYTES:
        raise DebianError("the changelog is larger than its bound")
    entries: list[Entry] = []
    head: re.Match[str] | None = None
    cves: set[str] = set()
    for line in content.decode("utf-8", "replace").split("\n"):
        if head is None:
            head, cves = _ENTRY.fullmatch(line), set()
        elif line.startswith("  "):
            cves.update(_CVE.findall(line))
        elif (trailer := _TRAILER.fullmatch(line)) is not None:
            urgency = _URGENCY.search(head[4])
            word = urgency[1].lower() if urgency else ""
            early = not set(head[3].lower().split()) - _EARLY
            entries.append(Entry(head[1], head[2], early, word, _date(trailer[1]), frozenset(cves)))
            head = None
    if not entries:
        raise DebianError("the changelog holds no entry")
    return entries


def above(entries: Sequence[Entry], installed: str) -> list[Entry]:
    """Return the entries that the installed version lacks, the newest first, each with the date that it came to users.

    Where the installed version has an entry, what stands above it counts: ``1.3`` is newer than ``1.3~deb12u5`` and yet
    part of it. What was written for unstable came to a release with the next entry that was written for one.

    Raises:
        VersionError: The installed version is none.
    """
    here = versions.debian(installed)
    at = next((i for i, entry in enumerate(entries) if entry.version == installed), None)
    lacking = [e for e in entries if _newer(e.version, here)] if at is None else entries[:at]
    found = []
    came = lacking[0].date if lacking else None
    for entry in lacking:
        if not entry.early:
            came = entry.date
        found.append(entry._replace(date=came))
    return found


def parse_release(content: bytes) -> Suite:
    """Return what an ``InRelease`` or ``Release`` file says of its suite.

    Raises:
        DebianError: It names no date.
    """
    fields: dict[str, str] = {}
    for line in content.decode("utf-8", "replace").splitlines():
        name, colon, value = line.partition(":")
        if colon and not line.startswith((" ", "-")):
            fields.setdefault(name, value.strip())
    date = _date(fields.get("Date", ""))
    if date is None:
        raise DebianError("a Release file names no date")
    return Suite(fields.get("Label", ""), fields.get("Suite", ""), fields.get("Codename", ""), date)


def source_version(binary: str) -> str:
    """Return the source version of a binary package's version where only a rebuild sets them apart."""
    return _BINARY_REBUILD.sub("", binary)


def _newer(version: str, here: versions.Key) -> bool:
    try:
        return versions.debian(version) > here
    except versions.VersionError:
        return False


def _kept(text: str) -> list[str]:
    names: list[str] = []
    inside = False
    for line in text.splitlines():
        if inside and line.startswith("  "):
            names += line.split()
        else:
            inside = line == _KEPT
    return names


def _date(text: str) -> datetime | None:
    try:
        return utc(parsedate_to_datetime(text.strip()))
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
