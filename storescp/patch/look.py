"""The edge of the report: reads what the folder holds, looks at the machine, remembers what was first seen."""

from __future__ import annotations

import hashlib
import os
from datetime import datetime
from pathlib import Path

from storescp.errors import StrongroomError
from storescp.patch import debian, index, inventory, judge_debian, osv
from storescp.patch import report as reports
from storescp.patch.folder import (
    Folder,
    Manifest,
    Origin,
    Seen,
    Windows,
    load,
    open_regular,
    read_answer,
    read_changelog,
    read_feed,
    save,
)
from storescp.patch.items import Bench, Evidence
from storescp.patch.settings import PatchAge

_SLICE = 1 << 20


def report(settings: PatchAge, folder: Folder, now: datetime) -> reports.Report:
    """Make the report, and write down what was seen for the first time, where that can be written.

    Raises:
        StrongroomError: A file of the report's own cannot be read.
    """
    found = inventory.collect()
    remembers = _writable(folder.path)
    seen = (load(folder.seen, Seen) or Seen()).items
    windows = (load(folder.windows, Windows) or Windows()).windows
    bench = Bench(settings, now, seen, windows, remembers=remembers)
    made = reports.assemble(found, evidence(settings, folder, found, now), bench)
    if remembers and made.seen != seen:
        try:
            save(folder.seen, Seen(items=made.seen))
        except OSError as error:
            # The next report would begin to count anew.
            raise StrongroomError(f"{folder.seen} cannot be written: {error.strerror}") from error
    return made


def evidence(settings: PatchAge, folder: Folder, found: inventory.Inventory, now: datetime) -> Evidence:
    """Read what was fetched and imported about what runs here."""
    packages = {("PyPI", d.name) for d in found.distributions}
    sources = {judge_debian.advised_as(p.source, p.source_version)[0] for p in found.debian.packages}
    packages |= {(f"Debian:{found.debian.release}", source) for source in sources}
    repositories = {component.repository for component in found.components}
    feeds: dict[str, osv.Feed | str] = {}
    for ecosystem in settings.ecosystems:
        try:
            feeds[ecosystem] = read_feed(folder, ecosystem, packages, repositories, now)
        except osv.FeedError as error:
            feeds[ecosystem] = str(error)
    answers: dict[str, tuple[index.Project, datetime] | str] = {}
    try:
        manifest = load(folder.manifest, Manifest) or Manifest()
        problem = "" if manifest.packages else "the package index was not asked"
    except StrongroomError as error:
        manifest, problem = Manifest(), str(error)
    for distribution in found.distributions:
        try:
            answers[distribution.name] = problem or read_answer(folder, manifest, distribution.name)
        except index.AnswerError as error:
            answers[distribution.name] = str(error)
    changelogs: dict[tuple[str, str], list[debian.Entry] | str] = {}
    for offer in judge_debian.offered(found.debian):
        try:
            changelogs[offer.source, offer.candidate] = read_changelog(folder, offer.source, offer.candidate)
        except debian.DebianError as error:
            changelogs[offer.source, offer.candidate] = str(error)
    return Evidence(feeds, answers, changelogs)


def bring(folder: Folder, feed: Path, ecosystem: str, sha256: str, now: datetime) -> osv.Feed:
    """Take a carried export in, whole or not at all.

    Raises:
        StrongroomError: It does not match its digest, is no export, or is older than the one that is here.
        OSError: It cannot be written.
    """
    target = folder.feeds(ecosystem)[-1]
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    try:
        if _copy(feed, part) != sha256:
            hint = "copy it again; if that does not help, it is not what was downloaded"
            raise StrongroomError(f"{feed} does not match its digest; nothing was imported", hint=hint)
        try:
            with open_regular(part) as file:
                found = osv.read(file, ecosystem, (), (), now)
        except osv.FeedError as error:
            raise StrongroomError(f"{feed} is no usable OSV export: {error}") from error
        before = load(target.with_suffix(".json"), Origin)
        if before is not None and before.date is not None and before.date > found.date:
            hint = f"remove {target} if the older one is wanted all the same"
            raise StrongroomError(f"{feed} is older than the export that was imported before", hint=hint)
        os.rename(part, target)
        origin = Origin(sha256=sha256, brought=now, source=feed.name, date=found.date)
        save(target.with_suffix(".json"), origin)
        return found
    finally:
        part.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> str:
    digest, total = hashlib.sha256(), 0
    try:
        reading = source.open("rb")
    except OSError as error:
        raise StrongroomError(f"{source} cannot be read: {error.strerror}") from error
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with reading, os.fdopen(os.open(target, flags, 0o644), "wb") as writing:
        while block := reading.read(_SLICE):
            total += len(block)
            if total > osv.FILE_BYTES:
                raise StrongroomError(f"{source} is larger than {osv.FILE_BYTES >> 30} GiB")
            digest.update(block)
            writing.write(block)
        writing.flush()
        os.fsync(writing.fileno())
    return digest.hexdigest()


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
