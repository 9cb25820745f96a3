"""Recovery keys and exports, backups and drills."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec

from keys.shares import RecoveryKey
from storescp.control import Request, Response, json_response, lines_response
from storescp.vault.api.requests import Named, Routes, told
from storescp.vault.backup import Backups
from storescp.vault.erase import Erase
from storescp.vault.recovery import Recovery
from storescp.vault.state import Vault


class RecoveryKeyRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A recovery key's public half."""

    key: RecoveryKey


class BackupRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Where to put a backup, how many to keep there (0: all), and why it has no recovery export."""

    folder: str
    keep: int = 0
    without_export: str = ""


class DrillRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A drill's signed statement."""

    statement: bytes


class RecoveryRequests:
    """Requests about recovery keys, exports, backups and drills."""

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
            ("GET", "/v1/backups"): self._backups,
            ("POST", "/v1/backups"): self._backup,
            ("POST", "/v1/backups/confirm"): self._backup_confirm,
            ("POST", "/v1/drills"): self._drilled,
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

    # --- backups

    def _backups(self, _request: Request) -> Response:
        return json_response({"format": 1, "items": Backups(self._vault).known()})

    def _backup(self, request: Request) -> Response:
        asked: BackupRequest = request.json(BackupRequest)
        self._vault.unlocked()
        made = Backups(self._vault).run(
            request.uid, Path(asked.folder), keep=asked.keep, without_export=asked.without_export
        )
        return lines_response(told(made), at_once=True)

    def _backup_confirm(self, request: Request) -> Response:
        asked: Named = request.json(Named)
        return json_response(Backups(self._vault).confirm(request.uid, asked.id))

    def _drilled(self, request: Request) -> Response:
        asked: DrillRequest = request.json(DrillRequest)
        return json_response(Backups(self._vault).drilled(request.uid, asked.statement))
