"""QIDO-RS's requests: a query in a thread, its results as one JSON document. Source: PS3.18 10.6."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from storescp.desk import web_accept
from storescp.desk.asking import Asking
from storescp.desk.web_accept import AcceptError
from storescp.desk.web_errors import Refusal
from storescp.desk.web_query import SERIES, STUDY, ParameterError, Search, document, search
from storescp.desk.web_stream import Threads

PREFIX = "/dicomweb"
_MORE = "there are additional results that can be requested"


class Searching:
    """Searches for studies, series and instances."""

    def __init__(self, asking: Asking, most: int) -> None:
        self._asking = asking
        self._threads = Threads(most)

    async def studies(self, request: Request) -> Response:
        """Search for studies."""
        return await self._search(request, "STUDY")

    async def series(self, request: Request) -> Response:
        """Search for series, of a study or of all."""
        return await self._search(request, "SERIES")

    async def instances(self, request: Request) -> Response:
        """Search for instances, of a series, of a study or of all."""
        return await self._search(request, "IMAGE")

    async def _search(self, request: Request, level: str) -> Response:
        request.state.told.kind = f"search {level.lower()}"
        kind = web_accept.documents(accepted(request))
        if not kind:
            raise Refusal(406, "results are application/dicom+json")
        path = {
            tag: request.path_params[name]
            for name, tag in (("study", STUDY), ("series", SERIES))
            if name in request.path_params
        }
        try:
            asked = search(level, path, request.query_params.multi_items())
        except ParameterError as error:
            raise Refusal(400, str(error)) from None
        base = request.state.origin + PREFIX
        found, more = await self._threads.run(lambda: self._found(request.state.peer.ae_title, asked, base))
        request.state.told.instances = len(found)
        warnings = [*asked.warnings, *([_MORE] if more else [])]
        headers = [(b"warning", f'299 {base}: "{text}"'.encode("ascii")) for text in warnings]
        body = b"[" + b",".join(found) + b"]"
        response = Response(body, media_type=kind) if found else Response(status_code=204)
        response.raw_headers.extend(headers)
        return response

    def _found(self, peer: str, asked: Search, base: str) -> tuple[list[bytes], bool]:
        found = list[bytes]()
        with self._asking.found(peer, "web", asked.query) as rows:
            for row in rows:
                if len(found) == asked.most:
                    return found, True
                found.append(msgspec.json.encode(document(row, asked, base)))
        return found, False


def accepted(request: Request) -> list[web_accept.Range]:
    """Return what a client accepts; the URL's parameter counts before the header (PS3.18 8.3.3.1).

    Raises:
        Refusal: It cannot be read.
    """
    try:
        return web_accept.ranges(request.query_params.get("accept") or ", ".join(request.headers.getlist("accept")))
    except AcceptError as error:
        raise Refusal(400, str(error)) from None
