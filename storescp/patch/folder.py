"""The folder between the fetching process, imports and reports: its layout, what is checked on the way in and out.

::

    inbox/osv/<ecosystem>.zip, .json      what was fetched, and when, from where, with which digest
    inbox/index/<package>.json            an index's answers; manifest.json has the same about each
    inbox/debian/<source>_<version>       changelogs of candidates
    imported/osv/<ecosystem>.zip, .json   what was imported
    seen.json                             when a report first saw each open item that no source dates
    windows.json                          announced windows

The inbox belongs to the fetching process, the rest to who runs the reports.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

import msgspec

from keys import encoding
from storescp.errors import StrongroomError
from storescp.patch import debian, index, osv

_T = TypeVar("_T")
_SMALL = 16 << 20
_SLICE = 1 << 20


class Origin(msgspec.Struct, kw_only=True):
    """Where a file came from: written beside it by whoever brought it; an imported one's own date."""

    format: int = 1
    sha256: str
    brought: datetime
    source: str
    etag: str = ""
    date: datetime | None = None


class Manifest(msgspec.Struct, kw_only=True):
    """What an index said, a package an entry."""

    format: int = 1
    packages: dict[str, Origin] = {}


class Seen(msgspec.Struct, kw_only=True):
    """When each open item was first seen."""

    format: int = 1
    items: dict[str, datetime] = {}


class Window(msgspec.Struct, kw_only=True):
    """A planned slot: breaches inside it are planned."""

    id: str
    begin: datetime
    end: datetime
    reason: str


class Windows(msgspec.Struct, kw_only=True):
    """The announced slots."""

    format: int = 1
    windows: list[Window] = []


class Folder:
    """The folder's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inbox = path / "inbox"
        self.imported = path / "imported"
        self.seen = path / "seen.json"
        self.windows = path / "windows.json"
        self.manifest = self.inbox / "index" / "manifest.json"

    def feeds(self, ecosystem: str) -> list[Path]:
        """Return where an export may be."""
        return [place / "osv" / f"{ecosystem}.zip" for place in (self.inbox, self.imported)]

    def answer(self, name: str) -> Path:
        """Return where an index's answer about a package is."""
        return self.inbox / "index" / f"{quote(name, safe='')}.json"

    def changelog(self, source: str, version: str) -> Path:
        """Return where the changelog of a candidate is."""
        # Debian's versions hold no slash; what apt says is quoted all the same.
        return self.inbox / "debian" / quote(f"{source}_{version}", safe="+~_")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a link, a pipe or a device is none.

    Raises:
        OSError: It cannot be opened, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "it is no regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def load(path: Path, kind: type[_T]) -> _T | None:
    """Return a small JSON file; None where it is missing.

    Raises:
        StrongroomError: It is there and cannot be read.
    """
    try:
        with open_regular(path) as file:
            content = file.read(_SMALL + 1)
        if len(content) > _SMALL:
            raise ValueError("too large")
        return encoding.decode(content, kind)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, msgspec.MsgspecError, RecursionError) as error:
        hint = "remove it: the next run makes a new one"
        raise StrongroomError(f"{path} cannot be read: {_why(error)}", hint=hint) from error


def save(path: Path, content: Any) -> None:
    """Replace a small JSON file, whole.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    encoding.replace(path, encoding.canonical(content) + b"\n", mode=0o644)


def digest(file: BinaryIO, most: int) -> str:
    """Return the SHA-256 of a file, in hex, and go back to its beginning.

    Raises:
        FeedError: It is longer than ``most`` bytes.
    """
    made, total = hashlib.sha256(), 0
    while part := file.read(_SLICE):
        total += len(part)
        if total > most:
            raise osv.FeedError(f"the file is larger than {most >> 20} MiB")
        made.update(part)
    file.seek(0)
    return made.hexdigest()


@contextmanager
def checked(path: Path) -> Iterator[tuple[BinaryIO, Origin]]:
    """Open a file that was brought here, after comparing it with its digest.

    Raises:
        FeedError: One of both is missing or damaged, or they do not belong together.
    """
    try:
        origin = load(path.with_suffix(".json"), Origin)
        if origin is None:
            raise FileNotFoundError
        with open_regular(path) as file:
            if digest(file, osv.FILE_BYTES) != origin.sha256:
                raise osv.FeedError("the file does not match its digest: it was changed, or is half replaced")
            yield file, origin
    except FileNotFoundError as error:
        raise osv.FeedError("there is none here") from error
    except (OSError, StrongroomError) as error:
        raise osv.FeedError(_why(error)) from error


def read_feed(
    folder: Folder, ecosystem: str, packages: set[tuple[str, str]], repositories: set[str], now: datetime
) -> osv.Feed:
    """Return the newest usable export of an ecosystem, fetched or imported.

    Raises:
        FeedError: There is none; the message has the reason.
    """
    found, problems = [], []
    for path in folder.feeds(ecosystem):
        try:
            with checked(path) as (file, _):
                found.append(osv.read(file, ecosystem, packages, repositories, now))
        except osv.FeedError as error:
            problems.append(str(error))
    if not found:
        # One that is there and no good tells more than one that is not.
        telling = [p for p in problems if p != "there is none here"] or ["none was fetched or imported"]
        raise osv.FeedError(f"no OSV export of {ecosystem}: {telling[0]}")
    return max(found, key=lambda feed: feed.date)


def read_answer(folder: Folder, manifest: Manifest, name: str) -> tuple[index.Project, datetime]:
    """Return what the index said about a package, and when it was asked.

    Raises:
        AnswerError: It was not asked, or its answer is no good.
    """
    origin = manifest.packages.get(name)
    if origin is None:
        raise index.AnswerError("the package index was not asked about it")
    try:
        with open_regular(folder.answer(name)) as file:
            content = file.read(index.DOCUMENT_BYTES + 1)
    except OSError as error:
        raise index.AnswerError(f"the package index's answer cannot be read: {_why(error)}") from error
    if hashlib.sha256(content).hexdigest() != origin.sha256:
        raise index.AnswerError("the package index's answer does not match its digest")
    return index.parse(content, name), origin.brought


def read_changelog(folder: Folder, source: str, version: str) -> list[debian.Entry]:
    """Return a candidate's changelog; nothing where there is none.

    Raises:
        DebianError: It is no good.
    """
    try:
        with open_regular(folder.changelog(source, version)) as file:
            content = file.read(debian.CHANGELOG_BYTES + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise debian.DebianError(f"the changelog of {source} cannot be read: {_why(error)}") from error
    return debian.parse_changelog(content)


def _why(error: BaseException) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error) or type(error).__name__).lower()
    return str(error)
