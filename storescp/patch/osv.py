"""OSV exports: one zip an ecosystem, a JSON record an entry. Read as a stream, within bounds.

A feed is evidence only where every one of its records was understood as far as its affected packages: one that was
not might have been about what runs here. Source: Open Source Vulnerability format 1.7, docs/patch-age.md.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import BinaryIO, NamedTuple

import msgspec

from storescp.log import escape
from storescp.patch import cvss
from storescp.patch.settings import SEVERITIES
from storescp.patch.versions import Order, VersionError, normalized

# What a feed may cost: the largest exports of today are a tenth of it.
FILE_BYTES = 2 << 30
CENTRAL_BYTES = 32 << 20
ENTRY_BYTES = 32 << 20
TOTAL_BYTES = 32 << 30
_SLACK = timedelta(days=1)
_WORDS = {"critical": "critical", "high": "high", "moderate": "medium", "medium": "medium", "low": "low"}
_URGENCIES = {"high": "high", "medium": "medium", "low": "low", "unimportant": "low"}


class FeedError(ValueError):
    """A feed or a record of it cannot be used; the message says why."""


class Event(msgspec.Struct):
    """One turn of a range: from here on affected, or no longer."""

    introduced: str | None = None
    fixed: str | None = None
    last_affected: str | None = None


class Range(msgspec.Struct):
    """Versions between events."""

    type: str = ""
    repo: str | None = None
    events: list[Event] = []


class Package(msgspec.Struct):
    """What a record is about."""

    name: str = ""
    ecosystem: str = ""


class Severity(msgspec.Struct):
    """A CVSS vector, or an ecosystem's own word."""

    type: str = ""
    score: str = ""


class Specific(msgspec.Struct):
    """What a database adds; of this only the severity counts, and Debian's urgency."""

    severity: object = None
    urgency: object = None


class Affected(msgspec.Struct):
    """One package of a record, and its affected versions."""

    package: Package | None = None
    ranges: list[Range] | None = None
    versions: list[str] | None = None
    severity: list[Severity] | None = None
    ecosystem_specific: Specific | None = None
    database_specific: Specific | None = None


class Record(msgspec.Struct):
    """One vulnerability."""

    id: str
    modified: datetime
    published: datetime | None = None
    withdrawn: datetime | None = None
    aliases: list[str] | None = None
    upstream: list[str] | None = None
    severity: list[Severity] | None = None
    affected: list[Affected] | None = None
    database_specific: Specific | None = None

    def names(self) -> set[str]:
        """Return every id that this vulnerability is known by."""
        return {self.id, *(self.aliases or ()), *(self.upstream or ())}


class _AboutRange(msgspec.Struct):
    repo: str | None = None


class _AboutAffected(msgspec.Struct):
    package: Package | None = None
    ranges: list[_AboutRange] | None = None


class _About(msgspec.Struct):
    id: str
    modified: datetime
    affected: list[_AboutAffected] | None = None


# A record, and its entry for one package.
Entry = tuple[Record, Affected]


class Feed(NamedTuple):
    """What a feed says about what was asked for, without what was withdrawn.

    Attributes:
        date: The feed's own: the newest change of any of its records.
        records: How many it holds.
        packages: Entries by ecosystem and name.
        repositories: Entries by the URL of the source repository.
    """

    ecosystem: str
    date: datetime
    records: int
    packages: Mapping[tuple[str, str], Sequence[Entry]]
    repositories: Mapping[str, Sequence[Entry]]


class Verdict(NamedTuple):
    """Whether a version is affected (None: cannot be told), and the version that ends it."""

    affected: bool | None
    fixed: str


_RECORD = msgspec.json.Decoder(Record)
_ABOUT = msgspec.json.Decoder(_About)


def parse(content: bytes) -> Record:
    """Return one record.

    Raises:
        FeedError: It is none.
    """
    try:
        return _RECORD.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FeedError(f"no OSV record: {type(error).__name__}") from error


def read(
    file: BinaryIO, ecosystem: str, packages: Iterable[tuple[str, str]], repositories: Iterable[str], now: datetime
) -> Feed:
    """Read an export and keep what it says about given packages and repositories.

    Args:
        file: The zip, from its beginning; at most FILE_BYTES.
        ecosystem: What the export is of, as in PyPI; kept in the result.
        packages: Pairs of an ecosystem as records name it (PyPI, Debian:12) and a name.
        repositories: URLs of source repositories.
        now: Dates after tomorrow are disregarded: they would keep a feed young for ever.

    Raises:
        FeedError: It is no such export, exceeds a bound, or holds what is not understood.
    """
    keys = {key_of(e, n) for e, n in packages} | {("", repository(url)) for url in repositories}
    newest, count, total = None, 0, 0
    found: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    _check_central(file)
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if not entry.filename.endswith(".json"):
                    continue
                content = _content(archive, entry)
                count, total = count + 1, total + len(content)
                if total > TOTAL_BYTES:
                    raise FeedError("the export unpacks to more than its bound")
                about = _about(content, entry.filename)
                modified = utc(about.modified)
                if modified <= now + _SLACK and (newest is None or modified > newest):
                    newest = modified
                if any(not keys.isdisjoint(_keys(affected)) for affected in about.affected or ()):
                    _keep(parse(content), keys, found)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, FeedError):
            raise
        raise FeedError(f"the export cannot be read: {type(error).__name__}") from error
    if newest is None:
        raise FeedError("the export holds no record with a date")
    by_package = {key: entries for key, entries in found.items() if key[0]}
    return Feed(ecosystem, newest, count, by_package, {key[1]: e for key, e in found.items() if not key[0]})


def judge(affected: Affected, version: str, order: Order) -> Verdict:
    """Tell whether a version is among an entry's affected ones, by its list and its ranges."""
    listed = version in (affected.versions or ())
    undecided = False
    inside, fixed = False, ""
    for span in affected.ranges or ():
        if span.type == "GIT":
            continue
        try:
            hit, end = _in_range(span, version, order)
        except VersionError:
            undecided = True
            continue
        inside = inside or hit
        fixed = fixed or end
    if listed or inside:
        return Verdict(True, fixed)
    return Verdict(None if undecided else False, "")


def judge_tags(affected: Affected, tags: Iterable[str]) -> Verdict:
    """Tell whether one of a release's tags is among the affected ones; without a list nobody can tell from here."""
    if not affected.versions:
        return Verdict(None, "")
    return Verdict(not set(tags).isdisjoint(affected.versions), "")


def severity(record: Record, affected: Affected) -> str:
    """Return the worst severity that a record names for one of its packages; ``unknown`` where none is understood."""
    found = [cvss.severity(s.score) for s in [*(record.severity or ()), *(affected.severity or ())]]
    specifics = (record.database_specific, affected.database_specific, affected.ecosystem_specific)
    words = (s.severity for s in specifics if s is not None)
    found += [_WORDS.get(word.lower(), "") for word in words if isinstance(word, str)]
    own = affected.ecosystem_specific
    if not any(found) and own is not None and isinstance(own.urgency, str):
        found.append(_URGENCIES.get(own.urgency.strip("*").lower(), ""))
    return worst(found)


def worst(names: Iterable[str]) -> str:
    """Return the worst of severities; ``unknown`` where there is none."""
    return min((n for n in names if n in SEVERITIES), key=SEVERITIES.index, default="unknown")


def key_of(ecosystem: str, name: str) -> tuple[str, str]:
    """Return what a package is found by: its ecosystem as records name it, and its name in one spelling."""
    return ecosystem, normalized(name) if ecosystem == "PyPI" else name


def repository(url: str) -> str:
    """Return a repository's URL in one spelling."""
    return url.rstrip("/").removesuffix(".git").lower()


def utc(date: datetime) -> datetime:
    """Return a date with a zone; one without is in UTC."""
    return date.replace(tzinfo=UTC) if date.tzinfo is None else date


def _in_range(span: Range, version: str, order: Order) -> tuple[bool, str]:
    turns = []
    for event in span.events:
        if event.introduced is not None:
            turns.append(((0,) if event.introduced == "0" else (1, order(event.introduced)), 0, event))
        elif event.fixed is not None:
            turns.append(((1, order(event.fixed)), 1, event))
        elif event.last_affected is not None:
            turns.append(((1, order(event.last_affected)), 2, event))
    turns.sort(key=lambda turn: turn[:2])
    here = (1, order(version))
    hit = False
    for at, kind, event in turns:
        if kind == 0 and here >= at:
            hit = True
        elif (kind == 1 and here >= at) or (kind == 2 and here > at):
            hit = False
        elif kind == 1 and hit:
            return True, event.fixed or ""
    return hit, ""


def _about(content: bytes, name: str) -> _About:
    try:
        return _ABOUT.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FeedError(f"the export's entry {escape(name[:64])} is no OSV record: {type(error).__name__}") from error


def _keys(affected: _AboutAffected | Affected) -> Iterator[tuple[str, str]]:
    if affected.package is not None:
        yield key_of(affected.package.ecosystem, affected.package.name)
    for span in affected.ranges or ():
        if span.repo:
            yield "", repository(span.repo)


def _keep(record: Record, keys: set[tuple[str, str]], found: dict[tuple[str, str], list[Entry]]) -> None:
    if record.withdrawn is None:
        for affected in record.affected or ():
            for key in keys.intersection(_keys(affected)):
                found[key].append((record, affected))


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} or entry.flag_bits & 1:
        raise FeedError("the export's entries are encrypted or packed in an unusual way")
    if entry.file_size > ENTRY_BYTES:
        raise FeedError(f"a record is larger than {ENTRY_BYTES >> 20} MiB")
    with archive.open(entry) as stream:
        # What an entry says of its size may be a lie.
        content = stream.read(ENTRY_BYTES + 1)
    if len(content) > ENTRY_BYTES:
        raise FeedError(f"a record is larger than {ENTRY_BYTES >> 20} MiB")
    return content


def _check_central(file: BinaryIO) -> None:
    """Refuse a zip whose table of contents would fill the memory; zipfile reads it whole before anything else."""
    size = file.seek(0, 2)
    if size > FILE_BYTES:
        raise FeedError(f"the export is larger than {FILE_BYTES >> 30} GiB")
    file.seek(max(0, size - 65_557 - 76))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise FeedError("the export is no zip file")
    central = int.from_bytes(tail[at + 12 : at + 16], "little")
    if at >= 76 and tail[at - 20 : at - 16] == b"PK\x06\x07" and tail[at - 76 : at - 72] == b"PK\x06\x06":
        # As zipfile does, the record right before its locator counts, wherever the locator points.
        central = int.from_bytes(tail[at - 36 : at - 28], "little")
    if central > CENTRAL_BYTES:
        raise FeedError("the export's table of contents is larger than its bound")
    file.seek(0)
