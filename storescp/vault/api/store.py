"""Unlocking, and what the store holds: lists, instances, certificates, and looking after it."""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec

from keys import authority
from keys.seal import plain_length
from storage.attributes import is_uid
from storage.search import LEVELS, FilterError, Filters
from storescp.control import Request, Response, json_response, lines_response
from storescp.errors import StrongroomError
from storescp.vault.api.requests import Routes, SecretRequest, told
from storescp.vault.contents import Contents
from storescp.vault.opened import Open
from storescp.vault.scrub import Scrub
from storescp.vault.state import Vault
from storescp.vault.verify import verify

# An index is filled for so long at a time.
_SLICE_SECONDS = 0.5

_Fingerprint = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]

log = logging.getLogger(__name__)


class SearchRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What to list."""

    level: str
    filters: Filters = msgspec.field(default_factory=Filters)


class SendingRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A study that is taken out for certain recipients: SHA-256 of their certificates and of the signer's."""

    study: str
    to: Annotated[list[_Fingerprint], msgspec.Meta(min_length=1, max_length=50)]
    signer: _Fingerprint


class IssueRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A certificate to issue: for a peer by name, or for a server by names and addresses."""

    csr: bytes
    peer: str = ""
    server: list[str] = msgspec.field(default_factory=list)
    days: int = 730


class VerifyRequest(msgspec.Struct, forbid_unknown_fields=True):
    """How fast to read, in MB/s; 0 for as fast as it goes."""

    rate: float = 0.0


class ScrubRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Whether all packs are read, not only the next slice of them."""

    whole: bool = False


class Store:
    """Requests about the store as a whole."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._auditor = vault.auditor

    def routes(self) -> Routes:
        """Return what is answered here."""
        return {
            ("POST", "/v1/unlock"): self._unlock,
            ("POST", "/v1/lock"): self._lock,
            ("GET", "/v1/locked"): self._locked,
            ("POST", "/v1/search"): self._search,
            ("POST", "/v1/export-begun"): self._sending,
            ("POST", "/v1/certificates"): self._issue,
            ("POST", "/v1/verify"): self._verify,
            ("POST", "/v1/reindex"): self._reindex,
            ("GET", "/v1/scrub"): self._scrub_status,
            ("POST", "/v1/scrub"): self._scrub,
            ("POST", "/v1/upgrade"): self._upgrade,
        }

    def _unlock(self, request: Request) -> Response:
        self._vault.try_unlock(request.json(SecretRequest).secret(), request.uid)
        return json_response({"locked": False})

    def _locked(self, _request: Request) -> Response:
        return json_response({"locked": self._vault.opened is None})

    def _lock(self, request: Request) -> Response:
        self._vault.lock(uid=request.uid)
        return json_response({"locked": True})

    def _upgrade(self, request: Request) -> Response:
        self._auditor.record("upgrade", uid=request.uid)
        return json_response({"done": self._vault.upgrade(request.json(SecretRequest).secret())})

    def _search(self, request: Request) -> Response:
        asked: SearchRequest = request.json(SearchRequest)
        if asked.level not in LEVELS:
            raise StrongroomError(f"no such level: {asked.level}")
        self._vault.unlocked()
        self._auditor.record("query", uid=request.uid, level=asked.level, filters=msgspec.to_builtins(asked.filters))
        self._vault.admit()
        rows = self._rows(asked)
        try:
            # The first row is fetched before the answer begins: a bad filter is an error and no broken answer.
            first = next(rows, None)
        except FilterError as error:
            raise StrongroomError(str(error)) from error
        return lines_response(itertools.chain([] if first is None else [first], rows))

    def _rows(self, asked: SearchRequest) -> Iterator[dict[str, Any]]:
        with self._vault.unlocked().reader() as reader:
            for row in reader.index.search(asked.level, asked.filters):
                if asked.level == "instance":
                    row["bytes"] = plain_length(row.pop("dataset_length"))
                yield row

    def _sending(self, request: Request) -> Response:
        asked: SendingRequest = request.json(SendingRequest)
        with self._vault.unlocked().reader() as reader:
            # A UID is no pattern, so that this finds just the one.
            if not is_uid(asked.study) or not any(reader.index.search("study", Filters(study=asked.study))):
                raise StrongroomError("there is no such study")
        self._auditor.sending(request.uid, asked.study, to=asked.to, signer=asked.signer)
        return json_response({})

    def instance(self, request: Request, text: str) -> Response:
        """Stream one data set, named by its pack and object id: both stay when a pack is admitted."""
        found = re.fullmatch(r"([0-9a-f]{32})/([0-9a-f]{32})", text, re.ASCII)
        if found is None:
            raise StrongroomError("no such instance")
        opened = self._vault.unlocked()
        parts = self._reading(opened, request.uid, found[1], bytes.fromhex(found[2]))
        # Opened before the answer begins: what cannot be found is an error and no broken answer.
        first = next(parts)
        # Its length is known, but chunks can end with the word that they are not whole.
        return Response(itertools.chain([first], parts))

    def _reading(self, opened: Open, uid: int, pack_id: str, object_id: bytes) -> Iterator[bytes]:
        """Yield nothing once the instance is found and recorded, and then its data set."""
        with opened.reader() as reader, Contents(self._vault, opened, reader) as contents:
            place = contents.place(pack_id, object_id)
            self._auditor.exporting(uid, reader.index.study_of(place.pack_id))
            content = contents.dataset(place)
            yield b""
            yield from content

    def _verify(self, request: Request) -> Response:
        asked: VerifyRequest = request.json(VerifyRequest)
        opened = self._vault.unlocked()
        self._auditor.record("verify", uid=request.uid)
        self._vault.admit()
        return lines_response(verify(opened, rate=asked.rate * 1e6), at_once=True)

    def _scrub_status(self, _request: Request) -> Response:
        return json_response({"format": 1, **Scrub(self._vault).status()})

    def _scrub(self, request: Request) -> Response:
        asked: ScrubRequest = request.json(ScrubRequest)
        self._vault.unlocked()
        return lines_response(told(Scrub(self._vault).run(request.uid, whole=asked.whole)), at_once=True)

    def _reindex(self, request: Request) -> Response:
        with self._vault.admitting():
            opened = self._vault.unlocked()
            self._auditor.record("reindex", uid=request.uid)
            if opened.index.filled_to() is None:
                opened.admission.begin_filling()
        return lines_response(told(self._filling()), at_once=True)

    def _filling(self) -> Iterator[dict[str, Any]]:
        while (state := self._vault.fill(_SLICE_SECONDS)) is not None:
            yield {"kind": "progress", "done": state[0], "total": state[1]}
            # Whoever waits for the vault's state gets it.
            time.sleep(0.01)
        self._vault.admit()
        with self._vault.unlocked().reader() as reader:
            yield {"kind": "counts", **reader.index.counts()}

    def _issue(self, request: Request) -> Response:
        asked: IssueRequest = request.json(IssueRequest)
        ca = self._vault.unlocked().ring.body.authority
        if ca is None:
            raise StrongroomError(
                "this store has no certificate authority of its own",
                hint="bind a certificate of yours: 'strongroom peer add TITLE --certificate FILE'",
            )
        now = datetime.now(UTC)
        self._auditor.record(
            "certificate-issued", uid=request.uid, peer=asked.peer, server=asked.server, days=asked.days
        )
        try:
            if asked.server:
                pem = authority.issue_server(ca, asked.csr, asked.server, now, asked.days)
            else:
                pem = authority.issue_peer(ca, asked.csr, asked.peer, now, asked.days)
        except authority.RequestError as error:
            raise StrongroomError(str(error)) from error
        log.info("issued a certificate")
        return json_response({"certificate": pem.decode(), "authority": ca.certificate})
