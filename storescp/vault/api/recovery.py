"""Recovery keys and exports."""

from __future__ import annotations

import base64

import msgspec

from keys.shares import RecoveryKey
from storescp.control import Request, Response, json_response
from storescp.vault.api.requests import Named, Routes
from storescp.vault.erase import Erase
from storescp.vault.recovery import Recovery
from storescp.vault.state import Vault


class RecoveryKeyRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A recovery key's public half."""

    key: RecoveryKey


class RecoveryRequests:
    """Requests about recovery keys and exports."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def routes(self) -> Routes:
        """Return what is answered here."""
        return {
            ("GET", "/v1/recovery"): self._recovery,
            ("POST", "/v1/recovery"): self._recovery_add,
            ("POST", "/v1/recovery/export"): self._recovery_export,
            ("POST", "/v1/recovery/confirm"): self._recovery_confirm,
            ("POST", "/v1/recovery/retire"): self._recovery_retire,
        }

    def _recovery(self, _request: Request) -> Response:
        found = Recovery(self._vault)
        keys = [{k: getattr(key, k) for k in ("id", "created", "shares", "threshold")} for key in found.recovery_keys()]
        return json_response({"format": 1, "keys": keys, "exports": found.exports()})

    def _recovery_add(self, request: Request) -> Response:
        asked: RecoveryKeyRequest = request.json(RecoveryKeyRequest)
        Recovery(self._vault).add(request.uid, asked.key)
        return json_response({"id": asked.key.id})

    def _recovery_export(self, request: Request) -> Response:
        made = Recovery(self._vault).export(request.uid)
        items = [msgspec.to_builtins(one) | {"content": base64.b64encode(content).decode()} for one, content in made]
        return json_response({"format": 1, "items": items})

    def _recovery_confirm(self, request: Request) -> Response:
        asked: Named = request.json(Named)
        return json_response(Recovery(self._vault).confirm(request.uid, asked.id))

    def _recovery_retire(self, request: Request) -> Response:
        asked: Named = request.json(Named)
        Recovery(self._vault).retire(request.uid, asked.id)
        Erase(self._vault).finalize()
        return json_response({"id": asked.id})
