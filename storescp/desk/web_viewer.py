"""A built OHIF viewer, served as it lies in a folder: the files that were there at the start, by their names alone.

Nothing of a request is ever a path: it is looked up in an index. The viewer's own configuration is not served; ours
takes its place, so that it asks this server and nobody else.
"""

from __future__ import annotations

import base64
import hashlib
import mimetypes
import os
import re
import stat
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from storescp.desk.multipart import Buffer
from storescp.desk.web_errors import Refusal
from storescp.desk.web_search import PREFIX
from storescp.desk.web_stream import Streamed, Threads
from storescp.errors import StrongroomError

_FILES_LIMIT = 5000
_READ_BYTES = 256 << 10
_PAGE, _SETTINGS = "index.html", "app-config.js"
# A service worker could keep what patients' pages ask for; maps are for who writes the viewer.
_LEFT_OUT = re.compile(r"(sw\.js|.*\.map)")
_INLINE = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
# One bundle (3.12: onnxruntime's) asks for a name of Node.js's where it runs after a style sheet that came late:
# then nothing would be shown. Any value will do, for what it is used for is not served here.
_BEFORE = b'window.__filename = "/";\n'
_TYPES = {".wasm": "application/wasm", ".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css"}
# Another page of the viewer's, which its script draws: a name without a dot.
_PAGES = re.compile(r"[A-Za-z0-9_-]*(/[A-Za-z0-9_-]*)*", re.ASCII)


class _File(NamedTuple):
    path: Path
    length: int
    kind: str


class Viewer:
    """The files of a folder."""

    def __init__(self, folder: Path, most: int) -> None:
        """Make the index.

        Raises:
            StrongroomError: The folder holds no viewer.
        """
        self._threads = Threads(most)
        self._files = _indexed(folder)
        page = self._files.pop(_PAGE, None)
        if page is None or not any(name.startswith("app.") for name in self._files):
            raise StrongroomError(
                f"desk.viewer: {folder} holds no built viewer",
                hint="docs/dicomweb.md says how to install one; its index.html is right in this folder",
            )
        self._page = page.path.read_bytes()
        self._files.pop(_SETTINGS, None)
        self._policy = _policy(self._page)
        self._settings = _BEFORE + b"window.config = " + msgspec.json.encode(_settings()) + b";\n"

    async def get(self, request: Request) -> Response:
        """Give a file, or the page that every other name is."""
        request.state.told.kind = "viewer"
        name = request.path_params["path"]
        if name == _SETTINGS:
            return self._answer(Response(self._settings, media_type="text/javascript"))
        found = self._files.get(name)
        if found is not None:
            return self._answer(
                Streamed(self._threads, _content(found), found.kind, length=found.length), "private, max-age=3600"
            )
        if name in {"", _PAGE} or _PAGES.fullmatch(name):
            return self._answer(Response(self._page, media_type="text/html"))
        raise Refusal(404)

    def _answer(self, response: Response, cache: str = "no-store") -> Response:
        headers = {
            "cache-control": cache,
            "content-security-policy": self._policy,
            # Nothing of another origin shares this page's memory, which lets it use threads.
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-embedder-policy": "require-corp",
        }
        response.raw_headers.extend((name.encode(), value.encode()) for name, value in headers.items())
        return response


def _indexed(folder: Path) -> dict[str, _File]:
    """Return the regular files below a folder by their names in URLs; links are not followed."""
    found: dict[str, _File] = {}
    for place, _, names in os.walk(folder, followlinks=False):
        for name in names:
            path = Path(place) / name
            state = path.lstat()
            if not stat.S_ISREG(state.st_mode) or _LEFT_OUT.fullmatch(name):
                continue
            kind = _TYPES.get(path.suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
            found[path.relative_to(folder).as_posix()] = _File(path, state.st_size, kind)
            if len(found) > _FILES_LIMIT:
                raise StrongroomError(f"desk.viewer: {folder} holds more than {_FILES_LIMIT} files")
    return found


def _content(file: _File) -> Generator[Buffer, None, None]:
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        raise Refusal(404) from None
    with os.fdopen(descriptor, "rb") as opened:
        left = file.length
        while left and (piece := opened.read(min(left, _READ_BYTES))):
            left -= len(piece)
            yield piece
    if left:
        raise Refusal(500, "a file of the viewer became shorter")


def _policy(page: bytes) -> str:
    """Return the Content Security Policy of the viewer's pages: its own files, and what its page holds inline."""
    inline = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s).digest()).decode()}'" for s in _INLINE.findall(page)
    )
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src 'self' 'wasm-unsafe-eval' blob: {inline}".rstrip(),
            "worker-src 'self' blob:",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self' blob: data:",
            "manifest-src 'self'",
            "base-uri 'self'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _settings() -> dict[str, object]:
    """Return the viewer's configuration: this server, and no feature that stores or shares."""
    source = {
        "friendlyName": "Strongroom",
        "name": "strongroom",
        "wadoUriRoot": PREFIX,
        "qidoRoot": PREFIX,
        "wadoRoot": PREFIX,
        "qidoSupportsIncludeField": True,
        "supportsReject": False,
        "supportsFuzzyMatching": False,
        "supportsWildcard": True,
        "imageRendering": "wadors",
        "thumbnailRendering": "wadors",
        "enableStudyLazyLoad": True,
        "dicomUploadEnabled": False,
        "omitQuotationForMultipartRequest": True,
        "bulkDataURI": {"enabled": True},
    }
    return {
        "name": "strongroom",
        "routerBasename": "/",
        "extensions": [],
        "modes": [],
        # Its tour of itself would lie over the first study that somebody opens.
        "customizationService": {"ohif.tours": {"$set": []}},
        "showStudyList": True,
        "maxNumberOfWebWorkers": 3,
        "showWarningMessageForCrossOrigin": False,
        "showCPUFallbackMessage": True,
        "showLoadingIndicator": True,
        "strictZSpacingForVolumeViewport": True,
        # It is no medical device, and says so.
        "investigationalUseDialog": {"option": "configure", "days": 30},
        "maxNumRequests": {"interaction": 8, "thumbnail": 4, "prefetch": 4},
        "defaultDataSourceName": "dicomweb",
        "dataSources": [
            {
                "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
                "sourceName": "dicomweb",
                "configuration": source,
            }
        ],
    }
