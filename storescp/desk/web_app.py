"""The application around every request: who asks, from where, within what; what it is answered, and what the log says.

Nothing of a request's address goes into the log: it holds UIDs and names of patients.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from storescp.config import Config
from storescp.desk.asking import Asking, AskingError
from storescp.desk.storing import Storing
from storescp.desk.web_errors import Refusal, refusal
from storescp.desk.web_peer import asking as peer_asking
from storescp.desk.web_peer import may_read, may_store
from storescp.desk.web_retrieve import Retrieving
from storescp.desk.web_search import PREFIX, Searching
from storescp.desk.web_server import HEAD_BYTES, Wire
from storescp.desk.web_store import WebStore
from storescp.desk.web_stream import BrokenOffError, Told
from storescp.desk.web_viewer import Viewer
from storescp.gate.connection import Policy

_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?", re.ASCII)
_HEADERS = (
    # Patients' data stays in no cache and on no disk of a browser's.
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; sandbox"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
# Of a body that is refused, what is still read.
_TAKE_BYTES, _TAKE_SECONDS = 1 << 20, 2.0
_RETRY_SECONDS = "60"
_STUDY = "/studies/{study}"
_SERIES = _STUDY + "/series/{series}"
_INSTANCE = _SERIES + "/instances/{instance}"

log = logging.getLogger(__name__)


def application(config: Config, policy: Callable[[], Policy], asking: Asking, storing: Storing | None) -> ASGIApp:
    """Return the whole application."""
    return Front(policy, _router(config, asking, storing))


def _router(config: Config, asking: Asking, storing: Storing | None) -> ASGIApp:
    store = WebStore(config, storing).store if storing is not None else _no_store
    searching = Searching(asking, config.settings.desk.maximum_associations)
    retrieving = Retrieving(asking, config.settings.desk.maximum_associations)
    routes = [
        Route(PREFIX + "/studies", searching.studies, methods=["GET"]),
        Route(PREFIX + "/series", searching.series, methods=["GET"]),
        Route(PREFIX + "/instances", searching.instances, methods=["GET"]),
        Route(PREFIX + _STUDY + "/series", searching.series, methods=["GET"]),
        Route(PREFIX + _STUDY + "/instances", searching.instances, methods=["GET"]),
        Route(PREFIX + _SERIES + "/instances", searching.instances, methods=["GET"]),
        Route(PREFIX + "/studies", store, methods=["POST"]),
        Route(PREFIX + _STUDY, store, methods=["POST"]),
        Route(PREFIX + _INSTANCE + "/frames/{frames}/rendered", retrieving.rendered, methods=["GET"]),
        Route(PREFIX + _INSTANCE + "/frames/{frames}", retrieving.frames, methods=["GET"]),
        Route(PREFIX + _INSTANCE + "/rendered", retrieving.rendered, methods=["GET"]),
        Route(PREFIX + _INSTANCE + "/bulkdata/{path:path}", retrieving.bulkdata, methods=["GET"]),
    ]
    for place in (_STUDY, _SERIES, _INSTANCE):
        routes += [
            Route(PREFIX + place, retrieving.objects, methods=["GET"]),
            Route(PREFIX + place + "/metadata", retrieving.metadata, methods=["GET"]),
        ]
    if config.desk_viewer is not None:
        viewer = Viewer(config.desk_viewer, config.settings.desk.maximum_associations)
        # What is below the service's own prefix and nothing of it, is nothing of the viewer's either.
        routes.append(Route(PREFIX + "{path:path}", _nowhere, methods=["GET"]))
        routes.append(Route("/{path:path}", viewer.get, methods=["GET"]))
    return Router(routes, redirect_slashes=False)


async def _nowhere(request: Request) -> Response:
    raise Refusal(404)


async def _no_store(request: Request) -> Response:
    request.state.told.kind = "store"
    raise Refusal(503, "nothing can be stored here; the desk's log says why", retry_after=_RETRY_SECONDS)


class Front:
    """Lets in whom the policy knows, and answers what goes wrong."""

    def __init__(self, policy: Callable[[], Policy], inner: ASGIApp) -> None:
        self._policy = policy
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        told, wire = Told(), scope["state"]["wire"]
        answering = _Answering(send, told)
        peer_title = "nobody"
        try:
            peer = peer_asking(self._policy(), wire.chain, wire.address, datetime.now(UTC))
            if peer is None:
                raise Refusal(403, connection="close")
            peer_title = peer.ae_title
            scope["state"] |= {"peer": peer, "told": told, "origin": self._checked(scope)}
            scope["state"] |= {"address": wire.address, "fingerprint": wire.fingerprint}
            if not (may_store(peer) if scope["method"] == "POST" else may_read(peer)):
                raise Refusal(403)
            await self._inner(scope, receive, answering)
        except (Refusal, AskingError) as error:
            await _let_read(scope, receive, told)
            await self._refuse(refusal(error) if isinstance(error, AskingError) else error, answering, wire, scope)
        except BrokenOffError as error:
            log.warning("web: an answer to %s ends early: %s", peer_title, error)
            wire.abort()
        except Exception:
            log.exception("web: a request of %s met an error of ours", peer_title)
            await self._refuse(Refusal(500, "an error of the server's own"), answering, wire, scope)
        finally:
            method = scope["method"] if scope["method"] in {"GET", "HEAD", "POST"} else "other"
            log.info("web: %s %s %s: %d, %d instances", peer_title, method, told.kind, told.status, told.instances)

    def _checked(self, scope: Scope) -> str:
        """Return the origin that a request was made to.

        Raises:
            Refusal: It comes from a page of another origin, or has a body that nothing here takes.
        """
        size = len(scope["raw_path"]) + len(scope["query_string"])
        if size + sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD_BYTES:
            raise Refusal(431, "the request's head is too long", connection="close")
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not _HOST.fullmatch(host):
            raise Refusal(400, "the request names no host")
        origin = f"https://{host.lower()}"
        named = headers.get(b"origin")
        if named is not None and named.decode("latin-1").lower() not in {origin, origin.removesuffix(":443")}:
            raise Refusal(403)
        # A link to the viewer may stand anywhere; what it shows, it asks for itself.
        follows = headers.get(b"sec-fetch-mode") == b"navigate" and headers.get(b"sec-fetch-dest") == b"document"
        link = follows and not scope["path"].startswith(PREFIX)
        if not link and headers.get(b"sec-fetch-site", b"none") not in {b"none", b"same-origin"}:
            raise Refusal(403)
        has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        if has_body and scope["method"] != "POST":
            raise Refusal(413, "this request has no body", connection="close")
        return origin

    async def _refuse(self, refused: Refusal, answering: _Answering, wire: Wire, scope: Scope) -> None:
        if answering.begun:
            # What was sent is not whole, and must not look so.
            log.warning("web: an answer ends early: %s", refused.text)
            wire.abort()
            return
        headers = {name.replace("_", "-"): value for name, value in refused.headers.items()}
        if scope["method"] == "POST":
            # What it brings is not read, or no further.
            headers["connection"] = "close"
        await PlainTextResponse(refused.text, refused.status, headers)(scope, _nothing, answering)


async def _let_read(scope: Scope, receive: Receive, told: Told) -> None:
    """Take a short body that is refused: whoever is still sending when the connection is closed reads no answer."""
    waits = b"expect" in dict(scope["headers"]) and not told.taking
    if scope["method"] != "POST" or told.taken or waits:
        return
    taken = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_TAKE_SECONDS):
            while taken < _TAKE_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


class _Answering:
    """Sends an answer, with the headers that every one has."""

    def __init__(self, send: Send, told: Told) -> None:
        self._send = send
        self._told = told
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self._told.status = message["status"]
            names = {name for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *((n, v) for n, v in _HEADERS if n not in names)]
        await self._send(message)


async def _nothing() -> Any:
    return {"type": "http.disconnect"}
