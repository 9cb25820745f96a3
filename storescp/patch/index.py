"""A package index's JSON: which releases there are, and when each was uploaded.

Source: the simple repository API, PEP 691 (JSON) and PEP 700 (``upload-time``); PEP 592 (yanked), PEP 503 (names).
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import msgspec

from storescp.patch import versions
from storescp.patch.osv import utc

ACCEPT = "application/vnd.pypi.simple.v1+json"
DOCUMENT_BYTES = 64 << 20
_ARCHIVES = (".tar.gz", ".zip", ".tar.bz2", ".tgz", ".tar.xz")


class AnswerError(ValueError):
    """A document is none of an index's; the message says why."""


class Release(NamedTuple):
    """A release that can be installed: when its first file was uploaded, None where the index does not say."""

    version: str
    key: versions.Key
    uploaded: datetime | None
    requires_python: str


class Project(NamedTuple):
    """The releases of a package, the oldest first, without those that were withdrawn."""

    name: str
    releases: tuple[Release, ...]

    def find(self, version: str) -> Release | None:
        """Return a release, however its version is spelt; None where there is none."""
        try:
            key = versions.python(version)
        except versions.VersionError:
            return None
        return next((r for r in self.releases if r.key == key), None)


class _File(msgspec.Struct, rename="kebab"):
    filename: str
    upload_time: datetime | None = None
    requires_python: str | None = None
    yanked: bool | str = False


class _Document(msgspec.Struct):
    name: str
    files: list[_File]


_DOCUMENT = msgspec.json.Decoder(_Document)


def parse(content: bytes, name: str) -> Project:
    """Return what an index says about a package.

    Args:
        content: The document, at most DOCUMENT_BYTES.
        name: The package that was asked for.

    Raises:
        AnswerError: It is no such document, or another package's.
    """
    if len(content) > DOCUMENT_BYTES:
        raise AnswerError(f"the index's answer is larger than {DOCUMENT_BYTES >> 20} MiB")
    try:
        document = _DOCUMENT.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise AnswerError(f"the index's answer is no JSON of a package: {type(error).__name__}") from error
    if versions.normalized(document.name) != versions.normalized(name):
        raise AnswerError("the index's answer is about another package")
    found: dict[versions.Key, Release] = {}
    for file in document.files:
        version = version_of(file.filename, name)
        try:
            key = versions.python(version)
        except versions.VersionError:
            continue
        # A yanked file is not installed unless it is asked for; an empty reason is one, too.
        if file.yanked is not False:
            continue
        uploaded = utc(file.upload_time) if file.upload_time is not None else None
        known = found.get(key)
        if known is not None:
            uploaded = min((d for d in (uploaded, known.uploaded) if d is not None), default=None)
        found[key] = Release(version, key, uploaded, file.requires_python or "")
    if not found:
        raise AnswerError("the index lists no release of the package")
    return Project(versions.normalized(name), tuple(found[key] for key in sorted(found)))


def newer(project: Project, version: str, python: str) -> list[Release]:
    """Return the releases that an upgrade from a version may choose from, the oldest first.

    Args:
        project: What the index says.
        version: What is installed. Candidates and the like count only where this is one.
        python: The running Python's version; releases that it cannot use are left out.

    Raises:
        VersionError: The installed version has no place in the order.
    """
    here = versions.python(version)
    early = versions.is_prerelease(here)
    return [
        r
        for r in project.releases
        if r.key > here and (early or not versions.is_prerelease(r.key)) and versions.allows(r.requires_python, python)
    ]


def version_of(filename: str, name: str) -> str:
    """Return the version in the name of a wheel or source archive; nothing where there is none."""
    if filename.endswith(".whl"):
        parts = filename.split("-")
        return parts[1] if len(parts) >= 5 and versions.normalized(parts[0]) == versions.normalized(name) else ""
    for ending in _ARCHIVES:
        if filename.endswith(ending):
            stem = filename.removesuffix(ending)
            for at in (i for i, c in enumerate(stem) if c == "-"):
                if versions.normalized(stem[:at]) == versions.normalized(name):
                    return stem[at + 1 :]
    return ""
