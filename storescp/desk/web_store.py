"""STOW-RS: instances come in one request, each answered for by itself. Source: PS3.18 10.5."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import anyio
import msgspec
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from storage.attributes import is_uid
from storescp.config import Config
from storescp.desk import web_accept
from storescp.desk.storing import Storing
from storescp.desk.web_accept import DICOM
from storescp.desk.web_errors import Refusal
from storescp.desk.web_parts import Outcome, Parts, PartsError
from storescp.desk.web_search import PREFIX, accepted
from storescp.desk.web_stream import BrokenOffError, Threads
from storescp.gate.describe import Describer
from storescp.gate.journal import studies
from storescp.gate.origin import Origin, new_association_id

# What is handed to a thread at a time.
_PIECE_BYTES = 256 << 10
_NEEDED = 'a store is multipart/related; type="application/dicom"; boundary=..., a DICOM file in each part'


class WebStore:
    """Stores instances."""

    def __init__(self, config: Config, storing: Storing) -> None:
        self._storing = storing
        self._title = config.settings.gate.ae_title
        self._idle = float(config.settings.desk.idle_seconds)
        self._part_seconds = float(config.settings.gate.message_seconds)
        self._threads = Threads(config.settings.desk.maximum_associations)

    async def store(self, request: Request) -> Response:
        """Store what a request brings, in the study that its path names, or in any."""
        told, peer = request.state.told, request.state.peer
        told.kind = "store"
        study = request.path_params.get("study", "")
        if study and not is_uid(study):
            raise Refusal(400, "the study is no UID")
        if not web_accept.documents(accepted(request)):
            raise Refusal(406, "the answer is application/dicom+json")
        boundary = _boundary(request.headers.get("content-type", ""))
        origin = Origin(
            new_association_id(), peer.ae_title, self._title, request.state.address, request.state.fingerprint
        )
        describer = Describer()
        try:
            parts = Parts(
                boundary,
                lambda uids: self._storing.begin(uids, peer, origin, describer, study),
                lambda outcome: self._storing.took(peer, outcome.size),
            )
        except PartsError as error:
            raise Refusal(400, str(error)) from None
        told.taking = True
        tally = _Tally(self._storing, origin)
        ending = "broken off"
        try:
            await self._take(request, parts)
            ending = "done"
        finally:
            with anyio.CancelScope(shield=True):
                await self._threads.run(parts.close)
            tally.end(parts.outcomes, ending)
        told.instances = sum(outcome.reason is None for outcome in parts.outcomes)
        status, document = answer(parts.outcomes, request.state.origin + PREFIX)
        return Response(msgspec.json.encode(document), status, media_type=web_accept.JSON)

    async def _take(self, request: Request, parts: Parts) -> None:
        """Take the whole body.

        Raises:
            Refusal: It is no multipart body, or stops coming.
            BrokenOffError: The client is gone.
        """
        body = aiter(request.stream())
        held, length, more = list[bytes](), 0, True
        try:
            while more:
                async with asyncio.timeout(self._idle):
                    piece = await anext(body, None)
                request.state.told.taken = piece is None
                more = piece is not None
                if piece:
                    held.append(piece)
                    length += len(piece)
                if length >= _PIECE_BYTES or (length and not more):
                    whole, held, length = b"".join(held), [], 0
                    await self._threads.run(lambda: parts.feed(whole))  # noqa: B023 (it runs before the next turn)
                if time.monotonic() - parts.began > self._part_seconds:
                    raise TimeoutError
        except PartsError as error:
            raise Refusal(400, str(error)) from None
        except TimeoutError:
            raise Refusal(408, "the body stopped coming") from None
        except ClientDisconnect:
            raise BrokenOffError("the client is gone before the end of what it stores") from None
        if not parts.ended:
            raise Refusal(400, "the body ends before its last boundary; parts that were whole are stored")


class _Tally:
    """What a request stored, for the audit chain: as an association is recorded."""

    def __init__(self, storing: Storing, origin: Origin) -> None:
        self._storing = storing
        self._who = {
            "association": origin.association,
            "calling": origin.calling,
            "address": origin.address,
            "certificate": origin.certificate,
        }
        storing.journal.event("association-begun", by="web", **self._who)

    def end(self, outcomes: Sequence[Outcome], ending: str) -> None:
        stored, reasons = dict[str, int](), dict[str, int]()
        for outcome in outcomes:
            if outcome.reason is None:
                stored[outcome.study] = stored.get(outcome.study, 0) + 1
            else:
                status = f"{outcome.reason.status:04X}"
                reasons[status] = reasons.get(status, 0) + 1
        self._storing.journal.event(
            "association-ended",
            by="web",
            **self._who,
            ending=ending,
            stored=sum(stored.values()),
            refused=sum(reasons.values()),
            bytes=sum(outcome.size for outcome in outcomes),
            reasons=reasons,
            studies=studies(stored),
        )


def answer(outcomes: Sequence[Outcome], base: str) -> tuple[int, dict[str, Any]]:
    """Return status and document of the answer to a request that was read to its end.

    Args:
        outcomes: What became of its parts, in their order.
        base: The address of the service.
    """
    stored = [outcome for outcome in outcomes if outcome.reason is None]
    document = dict[str, Any]()
    places = {outcome.study for outcome in stored}
    if len(places) == 1:
        document["00081190"] = {"vr": "UR", "Value": [f"{base}/studies/{places.pop()}"]}
    failed = [outcome for outcome in outcomes if outcome.reason is not None and outcome.sop_instance]
    others = [outcome for outcome in outcomes if outcome.reason is not None and not outcome.sop_instance]
    sequences = {
        "00081198": [_reference(outcome) | _reason(outcome) for outcome in failed],
        "00081199": [_reference(outcome) | _place(outcome, base) for outcome in stored],
        "0008119A": [_reason(outcome) for outcome in others],
    }
    document |= {tag: {"vr": "SQ", "Value": items} for tag, items in sequences.items() if items}
    if not outcomes:
        return 400, document
    return (200 if len(stored) == len(outcomes) else 202 if stored else 409), document


def _reference(outcome: Outcome) -> dict[str, Any]:
    return {
        "00081150": {"vr": "UI", "Value": [outcome.sop_class]},
        "00081155": {"vr": "UI", "Value": [outcome.sop_instance]},
    }


def _reason(outcome: Outcome) -> dict[str, Any]:
    return {"00081197": {"vr": "US", "Value": [outcome.reason.status if outcome.reason is not None else 0]}}


def _place(outcome: Outcome, base: str) -> dict[str, Any]:
    url = f"{base}/studies/{outcome.study}/series/{outcome.series}/instances/{outcome.sop_instance}"
    return {"00081190": {"vr": "UR", "Value": [url]}}


def _boundary(content_type: str) -> bytes:
    """Return the boundary of a body.

    Raises:
        Refusal: It is of another kind than is stored here.
    """
    kind, parameters = parse_options_header(content_type.encode("latin-1"))
    inner = parameters.get(b"type", DICOM.encode()).lower()
    if kind.lower() != b"multipart/related" or inner != DICOM.encode() or b"boundary" not in parameters:
        raise Refusal(415, _NEEDED)
    return bytes(parameters[b"boundary"])
