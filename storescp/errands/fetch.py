"""Fetching patch feeds into an inbox; a process that holds no key and reaches no store.

What it brings is checked by who reads it. Debian's packages come through apt, which checks them.
"""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import quote

from keys import encoding
from storescp.errands.download import FILE_SECONDS, Client, FetchError, why
from storescp.errors import StrongroomError
from storescp.patch import debian, index, judge_debian, osv, system
from storescp.patch.folder import Folder, Manifest, Origin, digest, load, open_regular, save
from storescp.patch.settings import PatchAge

_PACKAGE_BYTES = 512 << 20
_TRIES = 3
_URI = re.compile(r"'[^']*' ([A-Za-z0-9.+-]+)_\S+\.deb (\d+)( .*)?")


# What pip falls back to stands in pip alone.
_PIP_DEFAULT = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"


class Outcome(NamedTuple):
    """How one errand ended: ``fetched``, ``unchanged`` or ``failed``, and what to say of it."""

    what: str
    state: str
    detail: str = ""


def pip_index() -> str:
    """Return the package index that pip installs from here.

    Raises:
        StrongroomError: There is no pip that says it.
    """
    for command in (["-m", "pip", "config", "get", "global.index-url"], ["-c", _PIP_DEFAULT]):
        told = subprocess.run([sys.executable, "-P", *command], capture_output=True, text=True, check=False)
        if told.returncode == 0 and told.stdout.strip():
            return told.stdout.strip()
    raise StrongroomError(
        "which package index to ask is not known", hint="patch_age.index or --index names it; there is no pip here"
    )


def exports(client: Client, settings: PatchAge, folder: Folder) -> Iterator[Outcome]:
    """Fetch OSV's exports."""
    for ecosystem in settings.ecosystems:
        what = f"OSV export of {ecosystem}"
        target = folder.feeds(ecosystem)[0]
        url = f"{settings.osv.rstrip('/')}/{quote(ecosystem)}/all.zip"
        try:
            known = _intact(target)
            origin = client.download(url, target, known, osv.FILE_BYTES)
            if origin is not None:
                save(target.with_suffix(".json"), origin)
            yield Outcome(what, "fetched" if origin else "unchanged", f"{target.stat().st_size:,} bytes")
        except (FetchError, OSError, StrongroomError) as error:
            yield Outcome(what, "failed", why(error))


def answers(client: Client, settings: PatchAge, folder: Folder, names: Sequence[str]) -> Iterator[Outcome]:
    """Ask the package index about packages."""
    try:
        manifest = load(folder.manifest, Manifest) or Manifest()
    except StrongroomError:
        # Whoever damaged it, everything is asked again.
        manifest = Manifest()
    kept: dict[str, Origin] = {name: manifest.packages[name] for name in names if name in manifest.packages}
    for name in names:
        url = f"{settings.index.rstrip('/')}/{quote(name, safe='')}/"
        target = folder.answer(name)
        known = kept.get(name)
        try:
            if known is not None and (known.source != url or not _matches(target, known, index.DOCUMENT_BYTES)):
                known = None
            origin = client.download(url, target, known, index.DOCUMENT_BYTES, index.ACCEPT)
            # An index has no date of its own: what counts is when it was asked.
            kept[name] = origin or _again(known or kept[name])
            yield Outcome(f"{name} on the package index", "fetched" if origin else "unchanged")
        except (FetchError, OSError, StrongroomError) as error:
            yield Outcome(f"{name} on the package index", "failed", why(error))
    try:
        save(folder.manifest, Manifest(packages=kept))
    except OSError as error:
        yield Outcome("the package index's answers", "failed", why(error))


def changelogs(folder: Folder, what: system.Debian) -> Iterator[Outcome]:
    """Bring the changelogs of the packages that apt would install, out of the packages themselves."""
    problem = what.problem or what.upgrades_problem
    if not what.release:
        return
    if problem or what.upgrades is None:
        yield Outcome("Debian's changelogs", "failed", problem)
        return
    missing = [
        offer
        for offer in judge_debian.offered(what)
        if offer.candidate != offer.installed and not folder.changelog(offer.source, offer.candidate).exists()
    ]
    if not missing:
        yield Outcome("Debian's changelogs", "unchanged")
        return
    sources = {p.name: (p.source, p.source_version) for p in what.packages}
    binaries: dict[tuple[str, str], list[str]] = {}
    for upgrade in what.upgrades.upgrades:
        pair = sources.get(upgrade.package, (upgrade.package, upgrade.installed))
        binaries.setdefault(pair, []).append(f"{upgrade.package}={upgrade.candidate}")
    try:
        every = [word for offer in missing for word in binaries[offer[:2]]]
        sizes = package_sizes(system.run(["apt-get", "download", "--print-uris", *every]))
    except debian.DebianError as error:
        yield Outcome("Debian's changelogs", "failed", str(error))
        return
    for offer in missing:
        known = [(sizes[name], word) for word in binaries[offer[:2]] if (name := word.partition("=")[0]) in sizes]
        small = [word for size, word in sorted(known) if size <= _PACKAGE_BYTES][:_TRIES]
        yield _changelog(folder, offer, small)


def package_sizes(text: str) -> dict[str, int]:
    """Return the bytes of each package in what ``apt-get download --print-uris`` printed."""
    found = (_URI.fullmatch(line) for line in text.splitlines())
    return {match[1]: int(match[2]) for match in found if match}


def changelog_of(package: Path) -> bytes:
    """Return the Debian changelog in a binary package; nothing where it has none, or links to another package's.

    Raises:
        DebianError: The package is damaged, or what it holds exceeds a bound.
    """
    # The tool unpacks in its own process; only one member is looked at, and nothing reaches the disk.
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(package)],  # noqa: S607
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None  # noqa: S101
        try:
            return _member(process.stdout)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise debian.DebianError(f"the package cannot be read: {type(error).__name__}") from error
        finally:
            process.kill()


def _member(stream: IO[bytes]) -> bytes:
    names = re.compile(r"\./usr/share/doc/[^/]+/changelog(\.Debian)?\.gz")
    found = b""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            match = names.fullmatch(member.name)
            if match is None or not member.isfile() or member.size > debian.CHANGELOG_BYTES:
                continue
            packed = archive.extractfile(member)
            content = gzip.GzipFile(fileobj=io.BytesIO(packed.read() if packed else b"")).read(
                debian.CHANGELOG_BYTES + 1
            )
            if len(content) > debian.CHANGELOG_BYTES:
                raise debian.DebianError("a changelog is larger than its bound")
            if match[1]:
                return content
            # A native package's; where there is the other one too, this is the author's own.
            found = content
    return found


def _changelog(folder: Folder, offer: judge_debian.Offer, binaries: Sequence[str]) -> Outcome:
    what = f"changelog of {offer.source} {offer.candidate}"
    problem = "apt cannot say where the package is"
    for word in binaries:
        try:
            with tempfile.TemporaryDirectory(dir=folder.inbox) as work:
                system.run(["apt-get", "-q", "download", word], Path(work), FILE_SECONDS)
                content = next((changelog_of(file) for file in Path(work).glob("*.deb")), b"")
            if content and debian.parse_changelog(content)[0].source == offer.source:
                target = folder.changelog(offer.source, offer.candidate)
                target.parent.mkdir(parents=True, exist_ok=True)
                encoding.replace(target, content, mode=0o644)
                return Outcome(what, "fetched")
            problem = "its packages hold none"
        except (debian.DebianError, OSError) as error:
            problem = why(error)
    return Outcome(what, "failed", problem)


def _intact(target: Path) -> Origin | None:
    try:
        origin = load(target.with_suffix(".json"), Origin)
    except StrongroomError:
        # Whoever damaged it, the export is fetched again.
        return None
    return origin if origin is not None and _matches(target, origin, osv.FILE_BYTES) else None


def _matches(target: Path, origin: Origin, most: int) -> bool:
    try:
        with open_regular(target) as file:
            return digest(file, most) == origin.sha256
    except (OSError, osv.FeedError):
        return False


def _again(known: Origin) -> Origin:
    return Origin(sha256=known.sha256, brought=datetime.now(UTC), source=known.source, etag=known.etag)
