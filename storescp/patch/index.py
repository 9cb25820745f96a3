"""A package index's JSON: which releases there are, and when each was uploaded.

Source: the simple repository API, PEP 691 (JSON) and PEP 700 (``upload-time``); PEP 592 (yanked), PEP 503 (names).
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import NamedTuple

import msgspec

from storescp.patch import versions
from storescp.patch.osv import utc

ACCEPT = "application/vnd.pypi.simple.v1+json"
DOCUMENT_BYTES = 64 << 20
_INTERPRETER = re.compile(r"(py|cp)([23])([0-9]{0,3})", re.ASCII)
_ARCHIVES = (".tar.gz", ".zip", ".tar.bz2", ".tgz", ".tar.xz")


class AnswerError(ValueError):
    """A document is none of an index's; the message says why."""


class Release(NamedTuple):
    """A release that was not withdrawn.

    Attributes:
        uploaded: When its first file was; None where the index does not say.
        requires_python: As in ``>=3.9``.
        tags: What its wheels are for, as in ``cp311-abi3-manylinux_2_17_x86_64``; None where it has its source.
    """

    version: str
    key: versions.Key
    uploaded: datetime | None
    requires_python: str = ""
    tags: frozenset[str] | None = None


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
        tags = frozenset({_tag(file.filename)}) if file.filename.endswith(".whl") else None
        if (known := found.get(key)) is not None:
            uploaded = min((d for d in (uploaded, known.uploaded) if d is not None), default=None)
            tags = tags | known.tags if tags is not None and known.tags is not None else None
        found[key] = Release(version, key, uploaded, file.requires_python or "", tags)
    if not found:
        raise AnswerError("the index lists no release of the package")
    return Project(versions.normalized(name), tuple(found[key] for key in sorted(found)))


def newer(project: Project, version: str) -> list[Release]:
    """Return the releases after a version, the oldest first; candidates and the like only where it is one itself.

    Raises:
        VersionError: The installed version has no place in the order.
    """
    here = versions.python(version)
    early = versions.is_prerelease(here)
    return [r for r in project.releases if r.key > here and (early or not versions.is_prerelease(r.key))]


def usable(release: Release, python: str) -> bool:
    """Tell whether a Python of this version, on Linux, can use a release."""
    fits = release.tags is None or any(_fits(tag, python) for tag in release.tags)
    return fits and versions.allows(release.requires_python, python)


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


def _tag(filename: str) -> str:
    return "-".join(filename.removesuffix(".whl").split("-")[-3:])


def _fits(tag: str, python: str) -> bool:
    interpreters, abis, platforms = tag.split("-")
    if platforms != "any" and "linux" not in platforms:
        return False
    major, minor = (int(part) for part in python.split(".")[:2])
    for interpreter in interpreters.split("."):
        found = _INTERPRETER.fullmatch(interpreter)
        if found is None or int(found[2]) != major:
            continue
        # Pure Python, or the stable interface, is for this version and all later ones.
        if found[1] == "py" or "abi3" in abis.split("."):
            if int(found[3] or 0) <= minor:
                return True
        elif int(found[3] or 0) == minor:
            return True
    return False
