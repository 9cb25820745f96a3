"""Downloading over HTTPS: bounded, conditional, resumable, each file whole or not there.

The standard library's client with the system's authorities and the environment's proxies, without other schemes.
"""

from __future__ import annotations

import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from keys import encoding
from storescp import __version__
from storescp.errors import StrongroomError
from storescp.patch.folder import Origin, digest, load, open_regular, save
from storescp.patch.settings import url_problem

# Between two arrivals of bytes, and for a whole file.
_SILENCE_SECONDS = 60
FILE_SECONDS = 3600
_SLICE = 1 << 20


class FetchError(Exception):
    """Something could not be fetched; the message says why, and what is there stays."""


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
            raise FetchError(f"the server cannot be reached: {why(error.reason)}") from error
        except (http.client.HTTPException, TimeoutError, ssl.SSLError, ConnectionError, ValueError) as error:
            raise FetchError(f"the transfer broke off: {why(error)}") from error

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
        deadline = self._clock() + FILE_SECONDS
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
                    raise FetchError(f"it did not arrive in {FILE_SECONDS // 60} minutes; the next run goes on")
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


def _resumable(part: Path, begun: Path, url: str) -> int:
    """Return how many bytes of an earlier download can stay."""
    try:
        earlier = load(begun, Origin)
        size = part.lstat().st_size
    except (StrongroomError, OSError):
        return 0
    return size if earlier is not None and earlier.etag and earlier.source == url else 0


def why(error: object) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate does not hold: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
