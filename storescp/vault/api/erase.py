"""Erasures of studies."""

from __future__ import annotations

import msgspec

from storage import attributes
from storescp.control import Request, Response, json_response, lines_response
from storescp.errors import StrongroomError
from storescp.vault.api.requests import Routes, told
from storescp.vault.erase import Erase
from storescp.vault.state import Vault


class EraseRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Which study to erase, and why."""

    study: str
    reason: str


class Erasures:
    """Requests about erasures."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def routes(self) -> Routes:
        """Return what is answered here."""
        return {
            ("POST", "/v1/erase"): self._erase,
            ("GET", "/v1/erasures"): self._erasures,
        }

    def _erase(self, request: Request) -> Response:
        asked: EraseRequest = request.json(EraseRequest)
        self._vault.unlocked()
        if not attributes.is_uid(asked.study):
            raise StrongroomError(f"'{asked.study}' is no UID")
        return lines_response(told(Erase(self._vault).run(request.uid, asked.study, asked.reason)), at_once=True)

    def _erasures(self, _request: Request) -> Response:
        with self._vault.admitting():
            found = self._vault.unlocked().ledger.erasures()
        items = [
            {k: v for k, v in msgspec.to_builtins(e).items() if k not in {"tag", "packs", "fenced"}} for e in found
        ]
        return json_response({"format": 1, "items": items})
