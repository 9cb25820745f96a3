"""Fetching patch feeds into an inbox: HTTPS alone, bounded, conditional, resumable, each file whole or not there.

The standard library's client with the system's authorities and the environment's proxies; the process holds no key and
reaches no store. What it brings is checked by who reads it. Debian's packages come through apt, which checks them.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import http.client
import io
import os
import re
import ssl
import subprocess
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote, urlsplit

from keys import encoding
from storescp import __version__
from storescp.errors import StrongroomError
from storescp.patch import debian, index, judge_debian, osv, system
from storescp.patch.folder import Folder, Manifest, Origin, digest, load, open_regular, save
from storescp.patch.settings import PatchAge, url_problem

# Between two arrivals of bytes, and for a whole file.
_SILENCE_SECONDS = 60
_FILE_SECONDS = 3600
_SLICE = 1 << 20
_PACKAGE_BYTES = 512 << 20
_TRIES = 3
_URI = re.compile(r"'[^']*' ([A-Za-z0-9.+-]+)_\S+\.deb (\d+)( .*)?")


class FetchError(Exception):
    """Something could not be fetched; the message says why, and what is there stays."""


class Outcome(NamedTuple):
    """How one errand ended: ``fetched``, ``unchanged`` or ``failed``, and what to say of it."""

    what: str
    state: str
    detail: str = ""


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme != "https":
            raise FetchError("the server redirects to something that is not https://")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Client:
    """Downloads over HTTPS."""

    def __init__(self, context: ssl.SSLContext | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._opener = urllib.request.OpenerDirector()
        # Not build_opener: it would also speak http, ftp, file and data.
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPSHandler(context=context or ssl.create_default_context()),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
            _Redirects(),
        ):
            self._opener.add_handler(handler)

    def download(self, url: str, target: Path, known: Origin | None, most: int, accept: str = "*/*") -> Origin | None:
        """Bring a file, or go on where an earlier download of the same content broke off.

        Args:
            url: ``https://...``
            target: Replaced when everything arrived, not before.
            known: What is there already; None to have it in any case.
            most: Bytes; more is an error.
            accept: The content type that is asked for.

        Returns:
            Where it came from; None where what is known is still current.

        Raises:
            FetchError: The server cannot be reached, refuses, or sends too much or too little.
            OSError: The disk refused it.
        """
        if problem := url_problem(url):
            raise FetchError(problem)
        target.parent.mkdir(parents=True, exist_ok=True)
        part, begun = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
        headers = {"Accept": accept, "User-Agent": f"strongroom/{__version__}", "Accept-Encoding": "identity"}
        if known is not None and known.etag:
            headers["If-None-Match"] = known.etag
        offset = _resumable(part, begun, url)
        if offset:
            earlier = load(begun, Origin)
            headers |= {"Range": f"bytes={offset}-", "If-Range": earlier.etag if earlier else ""}
        try:
            with self._opener.open(urllib.request.Request(url, headers=headers), timeout=_SILENCE_SECONDS) as answer:  # noqa: S310
                return self._store(answer, url, target, offset, most)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.HTTPStatus.NOT_MODIFIED and known is not None:
                return None
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            raise FetchError(f"the server answers {error.code}") from error
        except urllib.error.URLError as error:
            raise FetchError(f"the server cannot be reached: {_why(error.reason)}") from error
        except (http.client.HTTPException, TimeoutError, ssl.SSLError, ConnectionError, ValueError) as error:
            raise FetchError(f"the transfer broke off: {_why(error)}") from error

    def _store(self, answer: Any, url: str, target: Path, offset: int, most: int) -> Origin:
        part, begun = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise FetchError("the server packs what was not asked to be packed")
        etag = answer.headers.get("ETag", "")
        going_on = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        if going_on and not answer.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise FetchError("the server sends another part than the one that was asked for")
        length = answer.headers.get("Content-Length")
        expected = (offset if going_on else 0) + int(length) if length is not None else None
        if expected is not None and expected > most:
            raise FetchError(f"it is larger than {most >> 20} MiB")
        deadline = self._clock() + _FILE_SECONDS
        if not going_on:
            part.unlink(missing_ok=True)
            # A weak validator does not promise the same bytes.
            resumable = etag if etag and not etag.startswith("W/") else ""
            save(begun, Origin(sha256="", brought=datetime.now(UTC), source=url, etag=resumable))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(part, flags, 0o644), "ab") as file:
            total = offset if going_on else 0
            while block := answer.read(_SLICE):
                total += len(block)
                if total > most:
                    part.unlink()
                    raise FetchError(f"it is larger than {most >> 20} MiB")
                if self._clock() > deadline:
                    raise FetchError(f"it did not arrive in {_FILE_SECONDS // 60} minutes; the next run goes on")
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        if expected is not None and total != expected:
            raise FetchError(f"{total} of {expected} bytes arrived; the next run goes on")
        with open_regular(part) as made:
            sha256 = digest(made, most)
        os.rename(part, target)
        begun.unlink(missing_ok=True)
        encoding.sync_folder(target.parent)
        return Origin(sha256=sha256, brought=datetime.now(UTC), source=url, etag=etag)


@contextlib.contextmanager
def alone(folder: Folder) -> Iterator[None]:
    """Keep other fetching processes out of the inbox.

    Raises:
        StrongroomError: One is running, or the inbox cannot be written.
    """
    try:
        folder.inbox.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.inbox / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise StrongroomError(f"{folder.inbox} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise StrongroomError(f"another process fetches into {folder.inbox}", hint="wait until it ends") from error
    finally:
        os.close(descriptor)


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
            yield Outcome(what, "failed", _why(error))


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
            yield Outcome(f"{name} on the package index", "failed", _why(error))
    try:
        save(folder.manifest, Manifest(packages=kept))
    except OSError as error:
        yield Outcome("the package index's answers", "failed", _why(error))


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
                system.run(["apt-get", "-q", "download", word], Path(work), _FILE_SECONDS)
                content = next((changelog_of(file) for file in Path(work).glob("*.deb")), b"")
            if content and debian.parse_changelog(content)[0].source == offer.source:
                target = folder.changelog(offer.source, offer.candidate)
                target.parent.mkdir(parents=True, exist_ok=True)
                encoding.replace(target, content, mode=0o644)
                return Outcome(what, "fetched")
            problem = "its packages hold none"
        except (debian.DebianError, OSError) as error:
            problem = _why(error)
    return Outcome(what, "failed", problem)


def _intact(target: Path) -> Origin | None:
    origin = load(target.with_suffix(".json"), Origin)
    return origin if origin is not None and _matches(target, origin, osv.FILE_BYTES) else None


def _matches(target: Path, origin: Origin, most: int) -> bool:
    try:
        with open_regular(target) as file:
            return digest(file, most) == origin.sha256
    except (OSError, osv.FeedError):
        return False


def _again(known: Origin) -> Origin:
    return Origin(sha256=known.sha256, brought=datetime.now(UTC), source=known.source, etag=known.etag)


def _resumable(part: Path, begun: Path, url: str) -> int:
    """Return how many bytes of an earlier download can stay."""
    try:
        earlier = load(begun, Origin)
        size = part.lstat().st_size
    except (StrongroomError, OSError):
        return 0
    return size if earlier is not None and earlier.etag and earlier.source == url else 0


def _why(error: object) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate does not hold: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
